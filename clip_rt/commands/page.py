"""Images with captions as a page of HTML that needs nothing else, on any screen, light or dark."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from clip_rt.commands.sheet import Caption

MAX_TILES = 5_000
"""Of a page: some 40 MB, which browsers still scroll."""
JPEG_QUALITY = 82

# Neither the page nor what is written into it can fetch or run anything.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{
  --page: #f6f8fa; --card: #fff; --ink: #1f2328; --faint: #59636e; --line: #d1d9e0;
  --track: #eef1f4; --bar: #9ec5fe; --error: #b42318;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --page: #0d1117; --card: #161b22; --ink: #e6edf3; --faint: #9198a1; --line: #30363d;
    --track: #21262d; --bar: #1f4f8f; --error: #ff9a8f;
  }}
}}
* {{ box-sizing: border-box; }}
body {{
  margin: 0; padding: 1rem; background: var(--page); color: var(--ink);
  font: 0.9375rem/1.4 system-ui, sans-serif;
}}
header, footer {{ margin: 0 auto 1rem; max-width: 90rem; color: var(--faint); }}
h1 {{ margin: 0; font-size: 1.125rem; color: var(--ink); overflow-wrap: anywhere; }}
main {{
  display: grid; gap: 0.75rem; max-width: 90rem; margin: 0 auto 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(14rem, 100%), 1fr));
}}
figure {{
  margin: 0; padding: 0.75rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 0.5rem;
}}
.picture {{
  display: flex; align-items: center; justify-content: center; height: 11rem;
  border-radius: 0.25rem; background: var(--track);
}}
img {{ max-width: 100%; max-height: 100%; border-radius: 0.25rem; }}
figcaption b {{
  display: block; margin: 0.5rem 0 0.25rem; font-weight: normal; font-size: 0.8125rem;
  color: var(--faint); overflow-wrap: anywhere;
}}
figcaption span {{
  display: block; margin-top: 0.25rem; padding: 0.0625rem 0.375rem; border-radius: 0.25rem;
  overflow-wrap: anywhere;
}}
.bar {{
  background: linear-gradient(to right, var(--bar) var(--share), var(--track) var(--share));
}}
.error {{ color: var(--error); }}
</style>
</head>
<body>
<header><h1>{title}</h1></header>
<main>
"""
FOOT = """</main>
<footer>{words}</footer>
</body>
</html>
"""


class Page:
    """A page that is written as images come; it is there when it is whole, and not before.

    Args:
        path: Of the file.
        title: Any text.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, title: str) -> None:
        self._path = path
        self._unfinished = path.with_name(path.name + ".unfinished")
        self._num_shown = 0
        self._num_left_out = 0
        # Names of files may be no text.
        self._file = self._unfinished.open("w", encoding="utf-8", errors="backslashreplace")
        self._file.write(HEAD.format(title=escape(title)))

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._file:
            words = f"{self._num_shown:,} images"
            if self._num_left_out:
                words += f"; {self._num_left_out:,} more are not shown"
            self._file.write(FOOT.format(words=words))
        if error is None:
            os.replace(self._unfinished, self._path)
        else:
            with suppress(OSError):
                self._unfinished.unlink()

    @property
    def has_room(self) -> bool:
        """Whether another image is shown."""
        return self._num_shown < MAX_TILES

    def add(self, name: str, thumbnail: Image.Image | None, captions: Sequence[Caption]) -> None:
        """Add an image; None has an empty place."""
        if not self.has_room:
            self._num_left_out += 1
            return
        self._num_shown += 1
        picture = (
            "" if thumbnail is None else f'<img alt="{escape(name)}" src="{_embed(thumbnail)}">'
        )
        lines = "".join(map(_write_caption, captions))
        self._file.write(
            f'<figure><div class="picture">{picture}</div>'
            f"<figcaption><b>{escape(name)}</b>{lines}</figcaption></figure>\n"
        )


def _embed(image: Image.Image) -> str:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")


def _write_caption(caption: Caption) -> str:
    if caption.is_error:
        return f'<span class="error">{escape(caption.text)}</span>'
    if caption.share is None:
        return f"<span>{escape(caption.text)}</span>"
    share = 100 * min(max(caption.share, 0.0), 1.0)
    return f'<span class="bar" style="--share:{share:.1f}%">{escape(caption.text)}</span>'
