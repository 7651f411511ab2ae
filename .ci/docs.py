"""A hook of MkDocs: pages and files outside docs/ that the documentation shows or links to.

Links are written as they work in a checkout. Here those that lead out of docs/ become links within
the site: to a page, where the file is one of `PAGES`, else to a copy of the file.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
    "model_repository/README.md": "model-card.md",
}
"""Pages of the site that lie outside docs/, with their names there."""
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add pages and linked files from outside docs/."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text("utf-8")))
    pages = {f"docs/{each.src_uri}" for each in files.documentation_pages()}
    for source in sorted({*PAGES, *(each for each in pages if (ROOT / each).is_file())}):
        for path in _linked((ROOT / source).read_text("utf-8"), source):
            name = _name_in_site(path)
            if name not in files.src_uris:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links within the site of those that lead to a file of the checkout."""
    sources: Mapping[str, str] = {name: source for source, name in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def replace(match: re.Match[str]) -> str:
        path = _path_of(match[1], source)
        return _name_in_site(path) if (ROOT / path).is_file() else match[1]

    return LINK.sub(replace, markdown)


def _linked(text: str, source: str) -> Iterator[str]:
    """Yield the files that a page links to, by their paths in the checkout."""
    for link in LINK.findall(text):
        path = _path_of(link, source)
        if (ROOT / path).is_file():
            yield path


def _path_of(link: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _name_in_site(path: str) -> str:
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"
