"""A folder of a user's goes in; which of its files are images, and what was left out and why, out.

Training, evaluation and export read folders through this alone, so that all see the same images and
classes. Nothing is opened but files without an ending, whose first bytes tell whether they are
images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from clip_rt.errors import InputError
from training.data.pairs import IMAGE_EXTENSIONS, Skips

FolderKind = Literal["auto", "classes", "captions"]
"""How a folder is to be read: as a folder of images for each class, as images with their captions
in text files beside them, or as what it looks like."""

UNREAD_IMAGES = frozenset(
    "tif tiff heic heif hif avif avifs jxl jp2 j2k jpf jpx jxr wdp svg svgz ico icns psd".split()
    + "tga ppm pgm pbm pnm pcx dds exr hdr dib xcf dng cr2 cr3 nef arw orf rw2 raf".split()
)
"""Endings of images whose decoders are not run here."""
LEFTOVER = "hidden, or left behind by another program"
"""Reason of what is no data: `.ipynb_checkpoints`, `__MACOSX`, `@eaDir`, `._photo.jpg`, ..."""
_LEFTOVERS = frozenset(
    (
        *("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information"),
        *("lost+found", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)
MIN_CAPTIONED = 0.8
"""Share of images with a text beside them from which on a folder is one of captions."""
_HEAD_BYTES = 16


def is_leftover(name: str) -> bool:
    """Say whether a file or folder of this name is no data, wherever it is."""
    is_hidden = name.startswith(".") and name not in (".", "..")
    return is_hidden or name.lower() in _LEFTOVERS


def skip_leftover(name: str, place: str, skips: Skips) -> None:
    """Count an image among what is no data, and note anything else, by its `place`."""
    (skips.add if _ends_like_an_image(name) else skips.note)(LEFTOVER, place)


def unread_reason(extension: str) -> str | None:
    """Say why an image with this ending, lower case without its dot, is left out; None if not."""
    return (
        f"image of a kind that is not read (.{extension})" if extension in UNREAD_IMAGES else None
    )


@dataclass(frozen=True)
class Tree:
    """The images below a folder."""

    folder: Path
    images: tuple[str, ...]
    """Relative to the folder; of each folder first its files, then its folders, in order."""
    captioned: frozenset[str]
    """Those with a .txt of the same name beside them."""
    skips: Skips
    """What looks like an image and is left out; what is no data is only noted."""
    folders: tuple[str, ...]
    """Every folder below, relative to it."""

    @cached_property
    def class_prefix(self) -> str:
        """What stands before the class in the name of each image; it ends in a separator.

        A folder that holds only one folder of folders is stepped into, as archives of data sets are
        often packed.
        """
        prefix = ""
        while self.images:
            rest = [name[len(prefix) :] for name in self.images]
            first = {name.split(os.sep, 1)[0] for name in rest}
            if len(first) > 1 or any(name.count(os.sep) < 2 for name in rest):
                break
            prefix += first.pop() + os.sep
        return prefix

    def class_of(self, name: str) -> str | None:
        """Return the folder of the class of an image; None if it is in none."""
        first, separator, _ = name[len(self.class_prefix) :].partition(os.sep)
        return first if separator else None

    def note_empty_classes(self) -> None:
        """Note the class folders that hold no image."""
        full = {self.class_of(name) for name in self.images}
        for folder in self.folders:
            name = folder.removeprefix(self.class_prefix)
            if folder.startswith(self.class_prefix) and os.sep not in name and name not in full:
                self.skips.note("class folder without an image", folder)

    @property
    def holds_captions(self) -> bool | None:
        """Say whether the images are described by texts beside them; None is undecided."""
        if not self.captioned:
            return False
        is_flat = not any(os.sep in name for name in self.images)
        if is_flat or len(self.captioned) >= MIN_CAPTIONED * len(self.images):
            return True
        return None


def read_tree(folder: Path) -> Tree:
    """List the images below a folder; links to folders are followed.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)[:200]!r}.")
    skips = Skips()
    images: list[str] = []
    captioned: list[str] = []
    folders: list[str] = []
    for parent, files in _walk(folder, folders, skips):
        texts = {os.path.splitext(name)[0] for name in files if name.endswith(".txt")}
        for name in files:
            stem, ending = os.path.splitext(name)
            extension = ending.lstrip(".").lower()
            path = os.path.join(parent, name)
            if extension in IMAGE_EXTENSIONS:
                images.append(path)
                if stem in texts:
                    captioned.append(path)
            elif reason := unread_reason(extension):
                skips.add(reason, path)
            elif not ending and _is_image(folder / path):
                skips.add("image without an ending", path)
    return Tree(folder, tuple(images), frozenset(captioned), skips, tuple(folders))


def _walk(root: Path, folders: list[str], skips: Skips) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder, relative to `root`, with its files; add those below it to `folders`."""
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        parent, ancestors = waiting.pop()
        try:
            status = os.stat(root / parent)
            with os.scandir(root / parent) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            skips.add(f"folder cannot be read: {error.strerror}", parent)
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            skips.note("link to a folder around it", parent)
            continue
        files = []
        inner = []
        for entry in entries:
            path = os.path.join(parent, entry.name)
            if is_leftover(entry.name):
                _skip_leftovers(root, path, skips)
            elif _is_folder(entry):
                inner.append(path)
            else:
                files.append(entry.name)
        folders += inner
        waiting += [(path, ancestors | {identity}) for path in reversed(inner)]
        yield parent, files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link that leads to itself.
        return False


def _skip_leftovers(root: Path, path: str, skips: Skips) -> None:
    """Count each image in what is no data, and note the rest."""
    inside = [path]
    if (root / path).is_dir() and not (root / path).is_symlink():
        inside = [
            os.path.relpath(os.path.join(parent, name), root)
            for parent, _, files in os.walk(root / path)
            for name in files
        ]
    images = [each for each in inside if _ends_like_an_image(each)]
    for each in images or [path]:
        skip_leftover(each, each, skips)


def _ends_like_an_image(name: str) -> bool:
    extension = os.path.splitext(name)[1].lstrip(".").lower()
    return extension in IMAGE_EXTENSIONS or unread_reason(extension) is not None


def _is_image(path: Path) -> bool:
    """Look at the first bytes of a regular file."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False
    return (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*"))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or head[4:12] in (b"ftypheic", b"ftypmif1", b"ftypavif")
    )
