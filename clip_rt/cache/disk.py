"""Embeddings in a folder that processes share: files that are written once and checked when read.

A segment is one file: what one call had to make, or several such files merged into one. It appears
whole, by a rename, and never changes. Nothing is locked: writers of the same embeddings write the
same name, and a merged segment goes away only after another holds all that it held.

    magic, 8 bytes | number of embeddings, uint32 | their dimension D, uint32
    the SHA-256 of each one's namespace and label, 32 bytes, ascending
    the SHA-256 of each embedding, 32 bytes
    the embeddings, float32 (N, D), all little-endian

All before the embeddings is the head, and the file is named for the hash of its head. So nothing
that was cut, flipped, renamed or made by someone else is taken for an embedding, and a look-up
reads the heads and the rows it wants. Labels are private; only their hashes are on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from clip_rt.specs import NORM_TOLERANCE

MAX_SMALL_SEGMENTS = 16
"""A namespace with more of them has them merged; a look-up opens each."""
SMALL_BYTES = 4 * 1024**2
"""A segment of this size or more is never rewritten: some 2,000 embeddings of 512 numbers."""
MAX_WRITING_S = 3600.0
"""What is still being written after this time was left by a process that was killed."""

_MAGIC = b"clip_rt1"
_START = struct.Struct("<8sII")
_HASH_BYTES = 32
_NAMESPACE_DIGITS = 32
_WRITING = ".writing-"
_SUFFIX = ".embeddings"
_NAME = re.compile(rf"([0-9a-f]{{{_NAMESPACE_DIGITS}}})-([0-9a-f]{{64}}){re.escape(_SUFFIX)}")

# One name for what users configure, whichever of the two tiers speaks.
_log = logging.getLogger("clip_rt.cache")


class _DamagedError(Exception):
    """A file that bears the name of a segment is none."""


@dataclass(frozen=True)
class _Segment:
    path: Path
    head_sha256: str
    status: os.stat_result


@dataclass(frozen=True)
class Contents:
    """How much is in a folder."""

    num_embeddings: int
    num_segments: int
    num_bytes: int


class DiskCache:
    """Embeddings in a folder, the least recently used segments removed beyond `max_bytes`.

    Thread-safe, and safe among processes. Never raises for what it finds or cannot do there: an
    embedding that cannot be read is one that is not there. The first trouble is logged as a
    warning, and only the first. The hashes tell accidents, not malice: whoever can write to the
    folder can change what comes from it.

    Args:
        folder: Made, for its owner only, when something is written; `~` is the user's home.
        max_bytes: Size of all segments together.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._num_troubles = itertools.count()

    @property
    def num_bytes(self) -> int:
        """Size of the segments there now, whoever wrote them."""
        try:
            return sum(segment.status.st_size for segment in self._list())
        except OSError as error:
            self._warn(error)
            return 0

    def count(self) -> Contents:
        """Return how much is there now, whoever wrote it; what is damaged counts no embedding."""
        num_embeddings, segments = 0, []
        try:
            for segment in self._list():
                segments.append(segment)
                with contextlib.suppress(FileNotFoundError):
                    num_embeddings += _count_rows(segment)
        except OSError as error:
            self._warn(error)
        num_bytes = sum(segment.status.st_size for segment in segments)
        return Contents(num_embeddings, len(segments), num_bytes)

    def read(
        self, namespace: str, labels: Sequence[str], dim: int
    ) -> dict[str, NDArray[np.float32]]:
        """Return the embeddings, float32 (D,), of those labels that are there.

        Args:
            namespace: Hash of everything but the label that an embedding depends on, in hex.
            labels: Any strings.
            dim: D.
        """
        label_by_hash = {_hash_label(namespace, label): label for label in labels}
        vector_by_label: dict[str, NDArray[np.float32]] = {}
        try:
            # Again when a segment went away meanwhile: a merge may have moved its rows to another.
            for _ in range(2):
                has_missed = False
                for segment in self._list(namespace):
                    if not label_by_hash:
                        break
                    try:
                        row_by_hash = self._read_segment(segment, dim, label_by_hash)
                    except FileNotFoundError:
                        has_missed = True
                        continue
                    for label_hash, row in row_by_hash.items():
                        vector_by_label[label_by_hash.pop(label_hash)] = row
                    if row_by_hash:
                        with contextlib.suppress(OSError):  # gone by now, or read only
                            os.utime(segment.path)
                if not (has_missed and label_by_hash):
                    break
        except OSError as error:
            self._warn(error)
        return vector_by_label

    def write(self, namespace: str, labels: Sequence[str], rows: NDArray[np.float32]) -> None:
        """Keep embeddings, float32 (N, D); those that are not of length 1 are left out."""
        if not labels:
            return
        row_by_hash = {
            _hash_label(namespace, label): row
            for label, row, is_embedding in zip(labels, rows, _are_embeddings(rows), strict=True)
            if is_embedding
        }
        try:
            if self._publish(namespace, row_by_hash) is not None:
                self._remove_leftovers()
                self._merge(namespace, rows.shape[1])
                self._evict()
        except OSError as error:
            self._warn(error)

    def clear(self) -> None:
        """Remove all segments, whoever wrote them."""
        try:
            for segment in self._list():
                _remove(segment.path)
        except OSError as error:
            self._warn(error)

    def _locate(self) -> Path:
        try:
            return self.folder.expanduser()
        except RuntimeError as error:
            raise OSError(f"the user has no home folder ({error})") from error

    def _list(self, namespace: str = "") -> list[_Segment]:
        """Return the segments of a namespace, or all; whether they are sound is not known yet."""
        segments = []
        try:
            entries = os.scandir(self._locate())
        except FileNotFoundError:
            return []
        with entries:
            for entry in entries:
                name = _NAME.fullmatch(entry.name)
                if name is None or (namespace and name[1] != namespace[:_NAMESPACE_DIGITS]):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    segments.append(_Segment(Path(entry.path), name[2], status))
        return segments

    def _read_segment(
        self, segment: _Segment, dim: int, label_by_hash: Mapping[bytes, str] | None
    ) -> dict[bytes, NDArray[np.float32]]:
        """Return the rows of those hashes, or all; none, after a warning, if it cannot be read.

        What is damaged is removed.

        Raises:
            FileNotFoundError: another process removed it.
        """
        try:
            return _read_rows(segment, dim, label_by_hash)
        except FileNotFoundError:
            raise
        except _DamagedError as error:
            self._warn(error)
            with contextlib.suppress(OSError):
                _remove(segment.path)
        except OSError as error:
            self._warn(error)
        return {}

    def _publish(
        self, namespace: str, row_by_hash: Mapping[bytes, NDArray[np.float32]]
    ) -> Path | None:
        """Write a segment and return its path, or None when it would hold nothing or too much."""
        hashes = sorted(row_by_hash)
        rows = [row_by_hash[label_hash].astype("<f4").tobytes() for label_hash in hashes]
        if not rows:
            return None
        start = _START.pack(_MAGIC, len(rows), len(rows[0]) // 4)
        head = b"".join([start, *hashes, *(hashlib.sha256(row).digest() for row in rows)])
        if len(head) + len(rows) * len(rows[0]) > self.max_bytes:
            return None
        folder = self._locate()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        head_sha256 = hashlib.sha256(head).hexdigest()
        path = folder / f"{namespace[:_NAMESPACE_DIGITS]}-{head_sha256}{_SUFFIX}"
        descriptor, written = tempfile.mkstemp(prefix=_WRITING, dir=folder)
        try:
            # Not synced to the disk: what a power cut tears is refused when it is read.
            with open(descriptor, "wb") as file:
                file.writelines([head, *rows])
            os.replace(written, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(written)
            raise
        return path

    def _merge(self, namespace: str, dim: int) -> None:
        """Put the small segments of a namespace into one when they are many."""
        small = [
            segment for segment in self._list(namespace) if segment.status.st_size < SMALL_BYTES
        ]
        if len(small) <= MAX_SMALL_SEGMENTS:
            return
        row_by_hash: dict[bytes, NDArray[np.float32]] = {}
        sources = []
        for segment in small:
            with contextlib.suppress(FileNotFoundError):
                if rows := self._read_segment(segment, dim, None):
                    row_by_hash |= rows
                    sources.append(segment.path)
        merged = self._publish(namespace, row_by_hash)
        for path in sources:
            if merged not in (None, path):
                _remove(path)

    def _evict(self) -> None:
        segments = sorted(self._list(), key=lambda segment: segment.status.st_mtime_ns)
        excess = sum(segment.status.st_size for segment in segments) - self.max_bytes
        for segment in segments:
            if excess <= 0:
                break
            _remove(segment.path)
            excess -= segment.status.st_size

    def _remove_leftovers(self) -> None:
        with os.scandir(self._locate()) as entries:
            for entry in entries:
                if entry.name.startswith(_WRITING):
                    with contextlib.suppress(OSError):  # gone, or another user's
                        age_s = time.time() - entry.stat(follow_symlinks=False).st_mtime
                        if age_s > MAX_WRITING_S:
                            _remove(Path(entry.path))

    def _warn(self, trouble: Exception) -> None:
        # The counter hands 0 to one thread only, and is no lock that a fork could leave shut.
        if next(self._num_troubles) == 0:
            _log.warning(
                "the cache folder %s cannot be used in full: %s. Results stay the same and take "
                "longer. It must be a folder with room that this user can write to; damaged files "
                "in it are removed. Further trouble with it is not reported.",
                self.folder,
                trouble,
            )


def _hash_label(namespace: str, label: str) -> bytes:
    # A namespace has one length, so that no two pairs are the same bytes.
    return hashlib.sha256(namespace.encode() + label.encode("utf-8", "surrogatepass")).digest()


def _read_rows(
    segment: _Segment, dim: int, label_by_hash: Mapping[bytes, str] | None
) -> dict[bytes, NDArray[np.float32]]:
    """Return the rows of those hashes, or all, float32 (D,) each.

    Raises:
        _DamagedError: a row or what leads to it is not what was written.
        OSError: it cannot be read.
    """
    damaged = _DamagedError(f"{segment.path.name} is damaged")
    if not stat.S_ISREG(segment.status.st_mode):
        raise damaged
    row_by_hash = {}
    with segment.path.open("rb") as file:
        head = _read_head(file, segment, dim)
        if head is None:
            raise damaged
        num_rows = (len(head) - _START.size) // (2 * _HASH_BYTES)
        hashes = np.frombuffer(head, f"S{_HASH_BYTES}", num_rows, _START.size)
        if label_by_hash is None:
            positions = np.arange(num_rows)
        else:
            wanted = np.array(sorted(label_by_hash), hashes.dtype)
            positions = np.minimum(np.searchsorted(hashes, wanted), num_rows - 1)
            positions = positions[hashes[positions] == wanted]
        for position in positions.tolist():
            file.seek(len(head) + 4 * dim * position)
            row = file.read(4 * dim)
            hash_at = _START.size + _HASH_BYTES * position
            row_hash_at = hash_at + _HASH_BYTES * num_rows
            if hashlib.sha256(row).digest() != head[row_hash_at : row_hash_at + _HASH_BYTES]:
                raise damaged
            row_by_hash[head[hash_at : hash_at + _HASH_BYTES]] = row
    if not row_by_hash:
        return {}
    rows = np.frombuffer(b"".join(row_by_hash.values()), "<f4").reshape(-1, dim)
    if not _are_embeddings(rows).all():
        raise damaged
    return dict(zip(row_by_hash, rows.astype(np.float32, copy=False), strict=True))


def _read_head(file: BinaryIO, segment: _Segment, dim: int) -> bytes | None:
    """Return all before the rows, or None unless it is that of a whole segment of this name."""
    start = file.read(_START.size)
    if len(start) < _START.size:
        return None
    magic, num_rows, found_dim = _START.unpack(start)
    head_bytes = _START.size + 2 * _HASH_BYTES * num_rows
    if (magic, found_dim) != (_MAGIC, dim) or num_rows == 0:
        return None
    if segment.status.st_size != head_bytes + 4 * dim * num_rows:
        return None
    head: bytes = start + file.read(head_bytes - _START.size)
    return head if hashlib.sha256(head).hexdigest() == segment.head_sha256 else None


def _count_rows(segment: _Segment) -> int:
    """Return how many embeddings a segment says it has; 0 unless it has the size of so many."""
    if not stat.S_ISREG(segment.status.st_mode):
        return 0
    with segment.path.open("rb") as file:
        start = file.read(_START.size)
    if len(start) < _START.size:
        return 0
    magic, num_rows, dim = _START.unpack(start)
    size_bytes = _START.size + (2 * _HASH_BYTES + 4 * dim) * num_rows
    return num_rows if (magic, size_bytes) == (_MAGIC, segment.status.st_size) else 0


def _are_embeddings(rows: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which rows are finite and of length 1, bool (N,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(rows, axis=1)
        near: NDArray[np.bool_] = np.abs(norms - 1) <= NORM_TOLERANCE
    return near


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder that stands where a segment should."""
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):  # which of them a folder gives, systems differ in
        if not path.is_dir() or path.is_symlink():
            raise
        shutil.rmtree(path)
