"""How the repository's Markdown becomes a site, without changing what GitHub shows.

README.md, README_CN.md and CHANGELOG.md become pages, so nothing is written twice. A link that leaves docs/ leads to
the repository where mkdocs.yml has a repo_url; until it has one, such a link is shown as its text and the file's path:
copied into the site, a config or a record would be there without what it belongs to.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
BORROWED = {"README.md": "index.md", "README_CN.md": "index_cn.md", "CHANGELOG.md": "changes.md"}
LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\((?!https?://|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
BROKEN = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef])\n(?=[\u3000-\u9fff\uff00-\uffef])")  # would become a space
PICTURE = re.compile(r"!\[([^\]]*)\]\(docs/([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/."""
    for source, page in BORROWED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=PICTURE.sub(r"![\1](\2)", text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn each link into one within the site, to the repository, or into text."""
    name = page.file.src_uri
    outside = {page: source for source, page in BORROWED.items()}.get(name)
    folder = "" if outside else "docs"

    def turned(match: re.Match) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in BORROWED:
            return f"[{text}]({BORROWED[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # the strict build names it
        if config.repo_url:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/main/{path}{anchor})"
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return BROKEN.sub("", LINK.sub(turned, markdown))
