"""A contact sheet: images in rows, each with its name and captions below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_rt.inputs.thumbnails import THUMBNAIL_PX

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_TILES = 300
"""Beyond it nobody sees them, and they are all in memory."""
MARGIN_PX, LINE_PX, TITLE_PX = 12, 20, 44
MAX_COLUMNS = 5
INK, FAINT, TRACK, BAR, ERROR = "#1f2328", "#656d76", "#eef1f4", "#9ec5fe", "#b42318"


@dataclass(frozen=True)
class Caption:
    """A line below an image."""

    text: str
    share: float | None = None
    """From 0 to 1, shown as a bar behind the text; None shows none."""
    is_error: bool = False


class Sheet:
    """A contact sheet; written by `save`.

    Args:
        path: Of the file; its suffix is one of `SUFFIXES`.
        title: Any text.
    """

    def __init__(self, path: Path, title: str) -> None:
        self._path = path
        self._title = title
        self._tiles: list[tuple[str, Image.Image | None, Sequence[Caption]]] = []
        self._num_left_out = 0

    @property
    def has_room(self) -> bool:
        """Whether another image is shown."""
        return len(self._tiles) < MAX_TILES

    def add(self, name: str, thumbnail: Image.Image | None, captions: Sequence[Caption]) -> None:
        """Add an image; None has an empty place."""
        if self.has_room:
            self._tiles.append((name, thumbnail, captions))
        else:
            self._num_left_out += 1

    def save(self) -> None:
        """Draw and write it.

        Raises:
            OSError: it cannot be written.
        """
        from PIL import Image, ImageDraw, ImageFont

        num_columns = min(MAX_COLUMNS, max(1, len(self._tiles)))
        num_rows = -(-len(self._tiles) // num_columns)
        num_lines = max((len(captions) for _, _, captions in self._tiles), default=0)
        width = THUMBNAIL_PX[0] + MARGIN_PX
        height = THUMBNAIL_PX[1] + LINE_PX * (1 + num_lines) + 2 * MARGIN_PX
        size = (
            max(num_columns * width + MARGIN_PX, 3 * width),
            TITLE_PX + num_rows * height + MARGIN_PX,
        )
        image = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(image)
        bold, plain = ImageFont.load_default(14), ImageFont.load_default(13)
        note = f" ({self._num_left_out:,} more are not shown)" if self._num_left_out else ""
        title = _elide(pen, self._title, bold, size[0] - 2 * MARGIN_PX - pen.textlength(note, bold))
        pen.text((MARGIN_PX, MARGIN_PX), title + note, INK, bold)
        for position, (name, thumbnail, captions) in enumerate(self._tiles):
            row, column = divmod(position, num_columns)
            left, top = MARGIN_PX + column * width, TITLE_PX + row * height
            room_px = THUMBNAIL_PX[0]
            if thumbnail is None:
                pen.rectangle((left, top, left + room_px - 1, top + THUMBNAIL_PX[1] - 1), TRACK)
            else:
                image.paste(
                    thumbnail,
                    (
                        left + (room_px - thumbnail.width) // 2,
                        top + (THUMBNAIL_PX[1] - thumbnail.height) // 2,
                    ),
                )
            top += THUMBNAIL_PX[1] + 4
            pen.text((left, top), _elide(pen, name, plain, room_px, from_start=True), FAINT, plain)
            for caption in captions:
                top += LINE_PX
                if caption.share is not None:
                    right = left + room_px - 1
                    pen.rectangle((left, top, right, top + LINE_PX - 4), TRACK)
                    if (length := round(room_px * min(max(caption.share, 0.0), 1.0))) > 0:
                        pen.rectangle((left, top, left + length - 1, top + LINE_PX - 4), BAR)
                text = _elide(pen, caption.text, plain, room_px - 6)
                pen.text((left + 4, top), text, ERROR if caption.is_error else INK, plain)
        image.save(self._path)


def _elide(
    pen: ImageDraw.ImageDraw, text: str, font: Font, room_px: float, *, from_start: bool = False
) -> str:
    """Return as much of a text as there is room for; of the name of a file, its end."""
    text = " ".join(text.split())
    if pen.textlength(text, font) <= room_px:
        return text
    # The longest part that fits, by bisection.
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        part = f"...{text[-middle:]}" if from_start else f"{text[:middle]}..."
        if pen.textlength(part, font) <= room_px:
            fits = middle
        else:
            too_long = middle
    return f"...{text[len(text) - fits :]}" if from_start else f"{text[:fits]}..."
