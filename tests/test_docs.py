"""The documentation builds without a warning, and its pages ask no other host for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//"
    r"|<link\b[^>]*\brel=[\"']?(?:stylesheet|preload|icon|preconnect)[^>]*\bhref=[\"']?(?:https?:)?//"
    r"|@import\s+[\"']?(?:url\()?(?:https?:)?//"
)
"""What a browser loads by itself; links that people follow are no part of it."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_site(site):
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= {
        path.stem for path in site.glob("*.html")
    }
    assert "class_embeddings" in (site / "reference.html").read_text("utf-8")
    assert "Retry budget" in (site / "search/search_index.json").read_text("utf-8")


def test_what_pages_link_to_outside_docs_is_in_the_site(site):
    text = (site / "benchmarks.html").read_text("utf-8")
    links = re.findall(r"(?:href|src)=\"?(files/[^\" >]+)", text)
    assert {Path(link).suffix for link in links} >= {".json", ".html", ".png"}
    for link in links:
        assert (site / link).read_bytes() == (ROOT / link.removeprefix("files/")).read_bytes()


def test_pages_load_nothing_from_elsewhere(site):
    assert FETCHED.search('<link rel="stylesheet" href="https://fonts.example/x.css">')
    for path in [*site.glob("*.html"), *site.rglob("*.css")]:
        assert not FETCHED.search(path.read_text("utf-8")), path
