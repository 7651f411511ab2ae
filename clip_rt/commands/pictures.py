"""Answers as pictures, beside the answers: which are asked for, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from clip_rt.commands.page import Page
from clip_rt.commands.sheet import SUFFIXES, Caption, Sheet
from clip_rt.errors import InputError
from clip_rt.inputs.thumbnails import make_thumbnail


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Pictures of the answers, beside the answers.

    Raises:
        InputError: an option cannot be used.
    """

    sheet: Path | None = None
    """A contact sheet to write: .png, .jpg or .webp."""
    html: Path | None = None
    """A page to write, with the images in it."""

    def __post_init__(self) -> None:
        if self.sheet is not None and self.sheet.suffix.lower() not in SUFFIXES:
            raise InputError(f"--sheet is {self.sheet}; it must end in {', '.join(SUFFIXES)}.")
        for option, path in (("sheet", self.sheet), ("html", self.html)):
            if path is not None and not path.absolute().parent.is_dir():
                raise InputError(f"--{option}: there is no folder {path.parent}.")

    @contextmanager
    def begin(self, title: str) -> Iterator[Gallery]:
        """Collect images for the pictures that were asked for; written when it ends well.

        Args:
            title: Of the pictures.

        Raises:
            OSError: one cannot be written.
        """
        with ExitStack() as stack:
            page = None
            if self.html is not None:
                page = stack.enter_context(Page(self.html, title))
            sheet = None if self.sheet is None else Sheet(self.sheet, title)
            yield Gallery(sheet, page)
            if sheet is not None:
                sheet.save()


class Gallery:
    """The pictures that are being made; without any it takes images and does nothing."""

    def __init__(self, sheet: Sheet | None, page: Page | None) -> None:
        self._sheet = sheet
        self._page = page

    def add(self, name: str, read: Callable[[], Path | bytes], captions: Sequence[Caption]) -> None:
        """Add an image.

        Args:
            name: What it is called.
            read: Returns its path or its content; not called where it is not needed. An image that
                cannot be read has an empty place.
            captions: Lines below it.
        """
        wants = [each for each in (self._sheet, self._page) if each is not None and each.has_room]
        thumbnail = make_thumbnail(read) if wants else None
        for each in (self._sheet, self._page):
            if each is not None:
                each.add(name, thumbnail, captions)
