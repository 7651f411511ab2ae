"""Images by the names that people write: files, folders, patterns, tar shards, names on stdin."""

from __future__ import annotations

import contextlib
import glob
import heapq
import io
import itertools
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TextIO

from clip_rt.errors import InputError
from clip_rt.inputs.decoding import MAX_BYTES

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
"""Of the files of a folder or shard that are taken for images; one named by itself may have any."""
SHARD_SUFFIX = ".tar"
STDIN = "-"
MAX_SORTED = 100_000
"""Names that are sorted in memory; more of them by way of temporary files."""
MAX_CAPTION_BYTES = 64 * 1024
"""Largest .txt or .json of a shard that is read for a caption."""


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
    modified_ns: int = 0
    """When the shard was last changed, as it was found; 0 for a file."""
    caption: str | None = None
    """Of the shard's .txt or .json of the same name."""
    problem: str = ""
    """Why no image could be found there: a shard or folder that cannot be read."""

    @property
    def name(self) -> str:
        """What it is called in answers: its path, or `shard.tar/member`."""
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    def read(self) -> bytes:
        """Return its content.

        Raises:
            OSError: it cannot be read, or its shard has changed since it was found.
        """
        if self.problem:
            raise OSError(self.problem)
        with self.path.open("rb") as file:
            if self.modified_ns and os.fstat(file.fileno()).st_mtime_ns != self.modified_ns:
                raise OSError(f"{self.path} has changed since its images were listed")
            file.seek(self.offset_bytes)
            content = file.read(self.size_bytes)
        if len(content) < self.size_bytes:
            raise OSError(f"{self.path} ends within {self.member}")
        return content

    def to_input(self) -> Path | bytes:
        """Return what a client takes for it: a file's path, which it reads on its own threads.

        Of a shard's member its content, as far as an image may be long.

        Raises:
            OSError: it cannot be read.
        """
        if not self.member and not self.problem:
            self.path.stat()  # Said here as a command says it, not as Python is told by a client.
            return self.path
        return replace(self, size_bytes=min(self.size_bytes, MAX_BYTES + 1)).read()


def find_images(names: Iterable[str]) -> Iterator[ImageFile]:
    """Yield the images that names mean, in order, those of a folder or shard by name.

    Memory does not grow with their number. What turns out not to be readable is an image with a
    `problem`: a folder, a shard, a name on stdin that nothing has. It stops nothing.

    Args:
        names: Of files; of folders, which are searched with all below them but what is hidden; of
            tar files; patterns such as `photos/**/*.jpg`; "-" reads one of these a line from stdin.

    Raises:
        InputError: a name means nothing that is there; before anything is yielded.
    """
    checked = list(names)
    for name in checked:
        check_name(name)
    for name in checked:
        if name != STDIN:
            yield from find_named(name)
            continue
        for listed in read_listed():
            yield from find_named(listed)


def read_listed() -> Iterator[str]:
    """Yield the names on stdin, one a line."""
    # As bytes, since names of files need not be in the encoding of text. Not by sys.stdin itself: a
    # daemon thread may be at work on it when Python ends, which then waits for the lock of that.
    try:
        stdin: BinaryIO = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    except io.UnsupportedOperation:  # Something else stands in for it.
        stdin = sys.stdin.buffer
    for line in stdin:
        if listed := os.fsdecode(line.rstrip(b"\r\n")):
            yield listed


def check_name(name: str) -> None:
    """Refuse what means nothing that is there.

    Raises:
        InputError: it does.
    """
    if name == STDIN or os.path.exists(name):
        return
    if not glob.has_magic(name):
        raise InputError(f"there is no file or folder {name[:200]!r}.")
    if next(glob.iglob(name, recursive=True), None) is None:
        raise InputError(f"nothing is named like {name[:200]!r}.")


def sort_names(names: Iterable[str]) -> Iterator[str]:
    """Read all of the names, and return them in order, with `MAX_SORTED` in memory at a time."""
    source, files = iter(names), []
    while len(run := sorted(itertools.islice(source, MAX_SORTED))) == MAX_SORTED:
        # A name may hold any character, but for JSON.
        file = tempfile.TemporaryFile("w+", encoding="ascii")  # noqa: SIM115 - until it is merged
        file.writelines(f"{json.dumps(name)}\n" for name in run)
        file.seek(0)
        files.append(file)
    return _merge(files, run) if files else iter(run)


def _merge(files: Sequence[TextIO], run: Sequence[str]) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(file)
        yield from heapq.merge(*(map(json.loads, file) for file in files), run)


def find_named(name: str) -> Iterator[ImageFile]:
    """Yield the images that a name means, or one with a `problem` where nothing has it."""
    path = Path(name)
    if path.is_dir():
        yield from _find_below(path)
    elif path.is_file() and path.suffix.lower() == SHARD_SUFFIX:
        yield from _open_shard(path)
    elif os.path.exists(name) or not glob.has_magic(name):
        yield ImageFile(path)
    else:
        is_any = False
        for each in sort_names(glob.iglob(name, recursive=True)):
            is_any = True
            # `**` gives folders, and all that is in them beside.
            if "**" not in name or not os.path.isdir(each):
                yield from find_named(each)
        if not is_any:
            yield ImageFile(path, problem=f"nothing is named like {name[:200]!r}")


def _find_below(folder: Path) -> Iterator[ImageFile]:
    try:
        with os.scandir(folder) as entries:
            files = sort_names(each.name for each in entries if _is_wanted(each))
        with os.scandir(folder) as entries:
            folders = sort_names(
                each.name
                for each in entries
                if each.name[0] != "." and each.is_dir(follow_symlinks=False)
            )
    except OSError as error:
        yield ImageFile(folder, problem=f"cannot be searched: {error.strerror}")
        return
    for name in files:
        path = folder / name
        if name.lower().endswith(SHARD_SUFFIX):
            yield from _open_shard(path)
        else:
            yield ImageFile(path)
    for name in folders:
        yield from _find_below(folder / name)


def _is_wanted(entry: os.DirEntry[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    is_wanted = entry.name[0] != "." and (suffix in SUFFIXES or suffix == SHARD_SUFFIX)
    return is_wanted and not entry.is_dir()


def _open_shard(path: Path) -> Iterator[ImageFile]:
    """Yield the images of a shard: those with the same name but for the suffix have one caption."""
    images: list[ImageFile] = []
    captions: dict[str, str] = {}
    key = ""
    try:
        # Without compression, so that members can be read by themselves later.
        with tarfile.open(path, "r:") as shard:
            modified_ns = path.stat().st_mtime_ns
            for member in shard:
                folder, _, file = member.name.rpartition("/")
                name, _, suffix = file.partition(".")
                suffix = "." + suffix.rpartition(".")[2].lower()
                if f"{folder}/{name}" != key:
                    yield from _captioned(images, captions)
                    key, images, captions = f"{folder}/{name}", [], {}
                if member.isfile() and suffix in SUFFIXES:
                    images.append(
                        ImageFile(path, member.name, member.offset_data, member.size, modified_ns)
                    )
                elif member.isfile() and suffix in (".txt", ".json"):
                    captions[suffix] = _read_caption(shard, member)
                # tarfile keeps what it has seen, which would be all of a large shard.
                shard.members = []  # type: ignore[attr-defined]
        yield from _captioned(images, captions)
    except (tarfile.TarError, OSError) as error:
        yield from _captioned(images, captions)
        yield ImageFile(path, problem=f"cannot be read as a tar file to its end: {error}")


def _captioned(images: Iterable[ImageFile], captions: dict[str, str]) -> Iterator[ImageFile]:
    caption = captions.get(".txt") or captions.get(".json") or None
    return (replace(image, caption=caption) for image in images)


def _read_caption(shard: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """Return the caption of a .txt, or of a .json that is an object with one; empty without."""
    file = shard.extractfile(member)
    if file is None or member.size > MAX_CAPTION_BYTES:
        return ""
    text = file.read().decode("utf-8", "replace")
    if not member.name.lower().endswith(".json"):
        return text.strip()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    caption = document.get("caption") if isinstance(document, dict) else None
    return caption.strip() if isinstance(caption, str) else ""
