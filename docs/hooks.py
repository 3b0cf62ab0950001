"""MkDocs hooks that build the site from the repository's Markdown, which stays readable on GitHub.

README.md, README_CN.md and CHANGELOG.md become pages of the site, so that no text exists twice. A link to a file
outside docs/ leads to the repository if mkdocs.yml has a repo_url. Otherwise it is replaced by its text and the path of
the file, because the site does not contain that file.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE_PAGES = {"README.md": "index.md", "README_CN.md": "index_cn.md", "CHANGELOG.md": "changes.md"}
LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\((?!https?://|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
BROKEN = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef])\n(?=[\u3000-\u9fff\uff00-\uffef])")  # shown as a space
IMAGE = re.compile(r"!\[([^\]]*)\]\(docs/([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages whose source is outside docs/."""
    for source, page in OUTSIDE_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=IMAGE.sub(r"![\1](\2)", text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace each link by a link within the site, a link to the repository, or text."""
    name = page.file.src_uri
    outside = {page: source for source, page in OUTSIDE_PAGES.items()}.get(name)
    folder = "" if outside else "docs"

    def rewritten(match: re.Match) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in OUTSIDE_PAGES:
            return f"[{text}]({OUTSIDE_PAGES[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # the strict build reports it
        if config.repo_url:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/main/{path}{anchor})"
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return BROKEN.sub("", LINK.sub(rewritten, markdown))
