"""Tar files in, the samples in them out: WebDataset's layout, read without trust.

A sample is the consecutive members that share a name up to its first dot: `a.jpg`, `a.txt` and
`a.json` are one. Only images, txt, json and cls are read, whatever else there is. Nothing is
extracted, and member names are never used as paths.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from webdataset.tariterators import base_plus_ext

from clip_rt.errors import InputError
from clip_rt.inputs.decoding import MAX_BYTES
from training.data.pairs import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    MAX_JSON_BYTES,
    BadSampleError,
    Skips,
)
from training.data.tree import LEFTOVER, is_leftover, skip_leftover, unread_reason

T = TypeVar("T")

_MAX_SIZE_BYTES = {
    "txt": MAX_CAPTION_BYTES,
    "json": MAX_JSON_BYTES,
    "cls": 32,
}
"""Largest member that is read, of each kind but images."""
_CODE_EXTENSIONS = frozenset("pkl pickle pyd pyc pth pt ckpt npy npz joblib ten tb mp".split())
"""What WebDataset's decoders may run or unpickle; told to the user, because it is unusual."""
_MAX_HEADER_BYTES = 64 * 1024
"""Largest extended header (a long name, PAX records) that is read into memory."""
_EXTENDED = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


CUT_OFF = "cut off by the end of its shard"
"""Reason of samples that may lack members because the shard does."""
_METADATA = re.compile(r"__[^/]*__($|/)")
"""Members that WebDataset leaves out too."""


class Header(tarfile.TarInfo):
    """A member's header, its size checked before anything is read or skipped by it."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        """Parse a block of 512 bytes; tarfile calls this for each header."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENDED and header.size > _MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header claims {header.size} bytes")
        return header


def read_samples(
    tar: tarfile.TarFile,
    shard: str,
    skips: Skips,
    read: Callable[[tarfile.TarInfo], T],
    *,
    max_bytes: int = MAX_BYTES,
) -> Iterator[tuple[str, dict[str, T]]]:
    """Yield the name of each good sample with what `read` makes of its members, by extension.

    `read` may raise BadSampleError; it gets no image of more than `max_bytes`. What is left out is
    counted in `skips`, each sample once.
    """
    max_size_bytes = _MAX_SIZE_BYTES | dict.fromkeys(IMAGE_EXTENSIONS, max_bytes)
    name, parts, reason = "", dict[str, T](), ""
    unread: str | None = None

    def why_not() -> str | None:
        """Say why the sample is left out, if it is."""
        return reason or (unread if parts.keys().isdisjoint(IMAGE_EXTENSIONS) else None)

    damages = skips.counts["damaged shard"]
    for header in _headers(tar, shard, skips):
        base, extension = base_plus_ext(header.name)
        refused = _refuse(header)
        if not refused and not header.isdir() and _is_leftover(header.name):
            skip_leftover(header.name, f"{shard}, {header.name!r}", skips)
            continue
        if base is None or header.isdir() or _METADATA.match(header.name):
            if refused:
                skips.add(refused, f"{shard}, {header.name!r}")
            continue
        if base != name:
            if left_out := why_not():
                skips.add(left_out, f"{shard}, {name!r}")
            elif parts:
                yield name, parts
            name, parts, reason, unread = base, {}, "", None
        extension = extension.lower()
        if refused or extension in parts:
            reason = reason or refused or "two members of one name"
        elif extension in _CODE_EXTENSIONS:
            skips.ignored[f".{extension}"] += 1
        elif extension not in max_size_bytes:
            unread = unread or unread_reason(extension)
        elif not reason:
            try:
                if header.size > max_size_bytes[extension]:
                    way_out = " (--max-bytes)" if extension in IMAGE_EXTENSIONS else ""
                    raise BadSampleError(f"{extension} too large{way_out}", name)
                parts[extension] = read(header)
            except BadSampleError as error:
                reason = error.reason
    if skips.counts["damaged shard"] > damages and parts:
        reason = reason or CUT_OFF
    if left_out := why_not():
        skips.add(left_out, f"{shard}, {name!r}")
    elif parts:
        yield name, parts


def _is_leftover(name: str) -> bool:
    return any(map(is_leftover, name.replace("\\", "/").split("/")))


def _headers(tar: tarfile.TarFile, shard: str, skips: Skips) -> Iterator[tarfile.TarInfo]:
    """Yield header after header until the end of the archive or the first damage."""
    last = -1
    while True:
        try:
            header = tar.next()
        # On damaged headers tarfile raises nearly anything.
        except Exception as error:
            skips.add("damaged shard", f"{shard}: {error}")
            return
        if header is None:
            return
        # A size in PAX records may be negative and would lead back, for ever (CVE-2025-8194).
        if header.offset <= last or header.size < 0:
            skips.add("damaged shard", f"{shard}: headers go backwards")
            return
        last = header.offset
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        yield header


def _refuse(header: tarfile.TarInfo) -> str:
    """Say why a member is not to be trusted; empty if it is."""
    if not header.isdir() and (not header.isreg() or header.issparse()):
        return "link, device or other special member"
    name = header.name.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return "member name leaves its folder"
    return ""


def read_shard(path: Path, *, max_bytes: int = MAX_BYTES) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield name and members of each sample of a shard that must be whole.

    Raises:
        InputError: the shard is damaged or holds anything that is left out elsewhere, but for what
            other programs left in it.
    """
    skips = Skips()
    with path.open("rb") as file:
        samples = list(index_samples(file, str(path), skips, max_bytes=max_bytes))
        if lost := skips.without(LEFTOVER):
            raise InputError(
                f"the shard {path} is damaged or not to be trusted, or holds images that are not "
                f"read here: {lost}."
            )
        for name, extents in samples:
            yield name, {key: read_extent(file, *extent) for key, extent in extents.items()}


def index_samples(
    file: IO[bytes], shard: str, skips: Skips, *, max_bytes: int = MAX_BYTES
) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield name and (offset, size) in bytes of the members of each good sample.

    Headers are read, nothing else. An image has at most `max_bytes`. What is left out is counted in
    `skips`, damage included.
    """
    end = os.fstat(file.fileno()).st_size

    def extent(header: tarfile.TarInfo) -> tuple[int, int]:
        if header.offset_data + header.size > end:
            raise BadSampleError(CUT_OFF, header.name)
        return header.offset_data, header.size

    try:
        tar = tarfile.TarFile(fileobj=file, tarinfo=Header)
    except Exception as error:
        skips.add("unreadable shard", f"{shard}: {error}")
        return
    damages = skips.counts["damaged shard"]
    yield from read_samples(tar, shard, skips, extent, max_bytes=max_bytes)
    # tarfile takes a damaged header for the end, which is marked by zeros.
    if damages == skips.counts["damaged shard"] and any(read_extent(file, tar.offset, 512) or b"?"):
        skips.add("damaged shard", f"{shard}: no end mark at byte {tar.offset}")


def read_extent(file: IO[bytes], offset: int, size: int) -> bytes:
    """Read a part of a file, wherever it stands; shorter if the file ends."""
    return os.pread(file.fileno(), size, offset)
