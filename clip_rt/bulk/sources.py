"""Images by the names that people write: files, folders, patterns, tar shards, names on stdin."""

from __future__ import annotations

import glob
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clip_rt.errors import InputError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
"""Of the files of a folder or shard that are taken for images; one named by itself may have any."""
SHARD_SUFFIX = ".tar"
STDIN = "-"


@dataclass(frozen=True)
class ImageFile:
    """An image that was found and not read yet."""

    path: Path
    """Of the file, or of the shard that holds it."""
    member: str = ""
    """Its name within the shard."""
    offset_bytes: int = 0
    size_bytes: int = -1
    """Where it is within the shard; -1 is all of the file."""

    @property
    def name(self) -> str:
        """What it is called in answers: its path, or `shard.tar/member`."""
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    def read(self) -> bytes:
        """Return its content.

        Raises:
            OSError: it cannot be read.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset_bytes)
            return file.read(self.size_bytes)


def find_images(names: Iterable[str]) -> Iterator[ImageFile]:
    """Yield the images that names mean, in order, those of a folder or shard by name.

    Args:
        names: Of files; of folders, which are searched with all below them but what is hidden; of
            tar files; patterns such as `photos/**/*.jpg`; "-" reads one of these a line from stdin.

    Raises:
        InputError: a name means nothing that is there, or a tar file cannot be read.
    """
    for name in names:
        if name == STDIN:
            yield from find_images(filter(None, (line.rstrip("\r\n") for line in sys.stdin)))
        else:
            yield from _find_named(name)


def _find_named(name: str) -> Iterator[ImageFile]:
    path = Path(name)
    if path.is_dir():
        yield from _find_below(path)
    elif path.is_file():
        yield from _open_shard(path) if path.suffix.lower() == SHARD_SUFFIX else [ImageFile(path)]
    elif glob.has_magic(name):
        found = sorted(glob.glob(name, recursive=True))
        if not found:
            raise InputError(f"nothing is named like {name[:200]!r}.")
        for each in found:
            yield from _find_named(each)
    else:
        raise InputError(f"there is no file or folder {name[:200]!r}.")


def _find_below(folder: Path) -> Iterator[ImageFile]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for file in sorted(files):
            path = Path(place, file)
            suffix = path.suffix.lower()
            if suffix == SHARD_SUFFIX:
                yield from _open_shard(path)
            elif suffix in SUFFIXES and not file.startswith("."):
                yield ImageFile(path)


def _open_shard(path: Path) -> Iterator[ImageFile]:
    try:
        # Without compression, so that members can be read by themselves later.
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                    yield ImageFile(path, member.name, member.offset_data, member.size)
                # tarfile keeps what it has seen, which would be all of a large shard.
                shard.members = []
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path} cannot be read as a tar file: {error}.") from error
