"""The documentation site builds with `--strict` and loads nothing from other hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_site_has_every_page_in_both_languages(site):
    pages = {path.stem for path in site.glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} | {"index", "index_cn", "changes"} <= pages
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="ascend.html' in home  # docs/ascend.md in README.md
    assert 'href="changes.html' in home
    assert "<code>config/ocrnet/config_ocrnet_hrw48_16k.yml</code>" in home  # a path in the repository is no link
    assert 'id="已验证的内容"' in (site / "index_cn.html").read_text(encoding="utf-8")


def test_site_loads_nothing_from_other_hosts(site):
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        fetched = re.findall(r"""(?:\bsrc=|<link [^>]*href=|url\(|@import )["']?((?:https?:)?//[^"')\s>]+)""", text)
        assert fetched == [], path.name
