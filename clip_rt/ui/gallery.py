"""The index of images behind the page: opened when it is there, asked, shown as thumbnails.

Files are named by the hash of their content, which the index knows; no path of a request is ever
opened. What a file holds is compared with that hash before any of it is shown.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import ImageError, InputError, SearchIndexError
from clip_rt.inputs.decoding import MAX_BYTES, read_path
from clip_rt.inputs.thumbnails import make_thumbnail
from clip_rt.search.files import FilesByPath, read_file
from clip_rt.search.index import DATABASE, Index, default_folder
from clip_rt.search.results import Hit
from clip_rt.wire.manifest import Manifest

MAX_COMPARED = 20_000
"""Images among which near-duplicates are looked for while a page waits: 3 s of processor time."""
THUMBNAIL_PX = (360, 270)
JPEG_QUALITY = 80
NUM_KEPT = 512
"""Thumbnails in memory, some 15 kB each."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Gallery:
    """The index of a folder; it may be made, or made anew, while the page is open. Thread-safe.

    Args:
        folder: Where it lies; `default_folder()` if None.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = default_folder() if folder is None else folder
        """Where the index lies, or would."""
        self._lock = threading.Lock()
        self._index: Index | None = None
        self._opened: tuple[int, int] | None = None
        self._files = FilesByPath()
        self._thumbnails: OrderedDict[str, bytes] = OrderedDict()

    def close(self) -> None:
        """Let go of the index."""
        with self._lock:
            if self._index is not None:
                self._index.close()
                self._index = None

    def open(self) -> Index:
        """Return the index as it is now.

        Raises:
            SearchIndexError: there is none, or it cannot be read.
        """
        with self._lock:
            found: tuple[int, int] | None = None
            with contextlib.suppress(OSError):
                status = os.stat(self.folder / DATABASE)
                found = (status.st_dev, status.st_ino)
            if self._index is None or found != self._opened:
                if self._index is not None:
                    self._index.close()
                    self._index = None
                self._index, self._opened = Index.open(self.folder), found
            return self._index

    def find(self, vector: NDArray[np.float32], manifest: Manifest, top: int) -> list[Hit]:
        """Return the images nearest to an embedding; see `Index.find`."""
        return self.open().find(vector, manifest, top=top)

    def find_duplicates(self, threshold: float) -> list[list[Hit]]:
        """Return groups of images that are nearly the same; see `Index.duplicates`.

        Raises:
            InputError: there are more images than are compared here.
        """
        # One of its own, so that searches go on meanwhile.
        with Index.open(self.folder) as index:
            if (number := index.count()["images"]) > MAX_COMPARED:
                raise InputError(
                    f"the index has {number:,} images; the page compares {MAX_COMPARED:,} at most. "
                    "Use clip-rt search --duplicates."
                )
            return index.duplicates(threshold=threshold)

    def read(self, sha256: str) -> bytes | None:
        """Return the content with a hash, from one of its files; None where there is none.

        Raises:
            SearchIndexError: there is no index.
        """
        if not _SHA256.fullmatch(sha256):
            return None
        for path in self.open().files(sha256):
            with contextlib.suppress(OSError, ImageError):
                content = self._read(path)
                if hashlib.sha256(content).hexdigest() == sha256:
                    return content
        return None

    def _read(self, path: str) -> bytes:
        with self._lock:
            try:
                found = read_file(path, self._files)
            except OSError:
                # Its shard may be another than when its members were listed.
                self._files = FilesByPath()
                found = read_file(path, self._files)
        return found if isinstance(found, bytes) else read_path(found, max_bytes=MAX_BYTES)

    def make_thumbnail(self, sha256: str) -> bytes | None:
        """Return a JPEG of an image of the index; None where it is gone or has changed.

        Raises:
            SearchIndexError: there is no index.
        """
        with self._lock:
            known = self._thumbnails.get(sha256)
        # Not by what is kept alone: it may have been taken out of the index since.
        if known is not None and self.open().files(sha256):
            return known
        content = self.read(sha256)
        if content is None:
            return None
        image = content
        thumbnail = make_thumbnail(lambda: image, THUMBNAIL_PX)
        if thumbnail is None:
            return None
        written = io.BytesIO()
        thumbnail.save(written, "JPEG", quality=JPEG_QUALITY)
        with self._lock:
            self._thumbnails[sha256] = written.getvalue()
            while len(self._thumbnails) > NUM_KEPT:
                self._thumbnails.popitem(last=False)
        return written.getvalue()

    def find_problem(self) -> str:
        """Return why it cannot be searched; empty where it can."""
        try:
            self.open().count()
        except SearchIndexError as error:
            return str(error)
        return ""
