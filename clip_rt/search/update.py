"""Brings an index up to date: what is new or changed is read, and embedded where it is new."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import ClipRTError, ImageError, ModelReplacedError
from clip_rt.inputs.decoding import MAX_BYTES, MAX_PIXELS, open_image
from clip_rt.search.catalogue import Catalogue
from clip_rt.search.files import FilesByPath, to_image
from clip_rt.search.scan import Found, Scan
from clip_rt.search.vectors import VectorFile

if TYPE_CHECKING:
    from clip_rt.client import Client
    from clip_rt.requests.results import Encoded
    from clip_rt.wire.manifest import Manifest

COMMIT_S, COMMIT_ITEMS = 2.0, 4096
"""What has come back is kept after that time, or when it is so many: a process that is killed loses
that much at most."""
_PAGE = 512
_NUM_READERS, _READ_AHEAD = 4, 8


@dataclass(kw_only=True)
class Report:
    """What an update has done so far; read it, and do not keep it."""

    num_found: int = 0
    """Files and members of shards that are there."""
    num_to_read: int = 0
    """Of these new, changed, or not read before."""
    num_read: int = 0
    num_embedded: int = 0
    """Contents that were new."""
    num_known: int = 0
    """Files whose content had a vector already: moved, copied, or only touched."""
    num_removed: int = 0
    """Files that are gone."""
    num_bad: int = 0
    """Files read this time that have no vector."""


OnProgress = Callable[[Report], object]
OnBad = Callable[[str, str], object]
"""Called with the path of a file that has no vector, and the reason."""


@dataclass(frozen=True)
class _Content:
    """What was read of a file."""

    data: bytes
    sha256: bytes
    width_px: int = 0
    height_px: int = 0


@dataclass
class _Pending:
    """A content that is being embedded."""

    content: _Content
    files: list[Found]
    """That have it; none in a migration, which changes no files."""
    vector: NDArray[np.float32] | None = None
    error: ClipRTError | None = None


def _read(file: Found) -> _Content | OSError | ImageError:
    """Read a file, hash it, and look how large the picture is."""
    if file.problem:
        return OSError(file.problem)
    if file.size_bytes > MAX_BYTES:
        return ImageError(f"has {file.size_bytes:,} bytes; at most {MAX_BYTES:,} are read.")
    try:
        data = to_image(file).read()
    except OSError as error:
        return error
    digest = hashlib.sha256(data).digest()
    try:
        size = open_image(data, max_pixels=MAX_PIXELS, max_bytes=MAX_BYTES).size
    # Damaged bytes raise nearly anything here; the client says what is wrong with them.
    except Exception:
        size = (0, 0)
    return _Content(data, digest, *size)


def _read_ahead(
    files: Iterable[Found],
) -> Iterator[tuple[Found, _Content | OSError | ImageError]]:
    window: deque[tuple[Found, Future[_Content | OSError | ImageError]]] = deque()
    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="clip_rt-index") as pool:
        try:
            for file in files:
                window.append((file, pool.submit(_read, file)))
                if len(window) >= _READ_AHEAD:
                    first, reading = window.popleft()
                    yield first, reading.result()
            while window:
                first, reading = window.popleft()
                yield first, reading.result()
        finally:
            for _, reading in window:
                reading.cancel()


@dataclass
class Embedding:
    """Embeds contents and keeps their vectors, a part at a time; used once.

    What is kept is whole at every moment: vectors are on the disk before the catalogue names their
    rows, and a file and its content come in the same transaction.
    """

    catalogue: Catalogue
    vectors: VectorFile
    generation: int
    model: int
    num_rows: int
    """Of the vector file that are in use; new ones come after them."""
    manifest: Manifest
    """Of the model; no vector of another is kept."""
    report: Report
    on_progress: OnProgress
    on_bad: OnBad
    _under_way: deque[_Pending] = field(default_factory=deque)
    _by_hash: dict[bytes, _Pending] = field(default_factory=dict)
    """Under way or back, and not in the catalogue yet."""
    _back: list[_Pending] = field(default_factory=list)
    _known: list[tuple[Found, int]] = field(default_factory=list)
    _unread: list[tuple[Found, str]] = field(default_factory=list)
    _wanted: dict[str, bytes] = field(default_factory=dict)
    """Hashes of the files that a migration is reading."""
    _kept_s: float = field(default_factory=time.monotonic)

    def run(self, client: Client, contents: Iterator[bytes]) -> None:
        """Embed what `contents` yields, which are this object's own methods.

        Raises:
            ServerError, ContractError: see `Client.stream_images`. What was done before is kept.
        """
        try:
            for part in client.stream_images(contents, on_error="skip"):
                if client.manifest != self.manifest:
                    raise ModelReplacedError(
                        "the model was replaced while images were embedded; those that it had "
                        "embedded before are kept. Run it again.",
                        expected=self.manifest,
                        found=client.manifest,
                    )
                self._take(part)
                self._keep_now_and_then()
        except BaseException:
            self._keep()
            raise
        self._keep()

    def changed_files(self, scan: Scan) -> Iterator[bytes]:
        """Yield the content of each file that the scan found to be new or changed, if it is new."""
        for file, read in _read_ahead(_found(scan)):
            self.report.num_read += 1
            self._keep_now_and_then()
            if not isinstance(read, _Content):
                reason = str(read) if isinstance(read, ImageError) else _describe(read)
                self._unread.append((file, reason))
                self._say_bad(file.path, reason)
            elif (pending := self._by_hash.get(read.sha256)) is not None:
                pending.files.append(file)
                self.report.num_known += 1
            elif (known := self.catalogue.find_content(read.sha256, self.generation)) is not None:
                number, error = known
                self._known.append((file, number))
                if error is None:
                    self.report.num_known += 1
                else:
                    self._say_bad(file.path, error)
            else:
                yield self._begin(_Pending(read, [file]))

    def contents_again(self) -> Iterator[bytes]:
        """Yield each content that has no vector in this generation, where a file still has it."""
        for file, read in _read_ahead(self._missing()):
            self.report.num_read += 1
            self._keep_now_and_then()
            wanted = self._wanted.pop(file.path)
            if isinstance(read, _Content) and read.sha256 == wanted:
                yield self._begin(_Pending(read, []))

    def _missing(self) -> Iterator[Found]:
        after = 0
        open_files = FilesByPath()
        while page := self.catalogue.find_missing(self.generation, after, _PAGE):
            for _, sha256, path in page:
                if (file := open_files.find(path)) is not None:
                    self._wanted[path] = sha256
                    yield file
            after = page[-1][0]

    def _begin(self, pending: _Pending) -> bytes:
        self._by_hash[pending.content.sha256] = pending
        self._under_way.append(pending)
        data = pending.content.data
        # The client holds it as long as it needs it.
        pending.content = _Content(
            b"", pending.content.sha256, pending.content.width_px, pending.content.height_px
        )
        return data

    def _take(self, part: Encoded) -> None:
        """Note what came of the next contents under way."""
        num = len(part.indices) + len(part.failures)
        first = min(
            [*part.indices[:1].tolist(), *(int(each.index or 0) for each in part.failures[:1])],  # type: ignore[attr-defined]
            default=0,
        )
        pending = [self._under_way.popleft() for _ in range(num)]
        for index, row in zip(part.indices.tolist(), part.embeddings, strict=True):
            pending[index - first].vector = row
        for error in part.failures:
            pending[int(error.index or 0) - first].error = error  # type: ignore[attr-defined]
        self._back += pending
        self.report.num_embedded += len(part.indices)
        for each in pending:
            if each.error is not None:
                for file in each.files:
                    self._say_bad(file.path, _reason(each.error))

    def _say_bad(self, path: str, reason: str) -> None:
        self.report.num_bad += 1
        self.on_bad(path, reason)

    def _keep_now_and_then(self) -> None:
        num = len(self._back) + len(self._known) + len(self._unread)
        if num >= COMMIT_ITEMS or (num and time.monotonic() - self._kept_s >= COMMIT_S):
            self._keep()
        self.on_progress(self.report)

    def _keep(self) -> None:
        """Write what has come back, vectors first."""
        back, self._back = self._back, []
        known, self._known = self._known, []
        unread, self._unread = self._unread, []
        self._kept_s = time.monotonic()
        good = [each for each in back if each.vector is not None]
        if good:
            rows = np.stack([each.vector for each in good if each.vector is not None])
            self.vectors.write(self.num_rows, rows)
        catalogue = self.catalogue
        with catalogue.transaction():
            catalogue.use_model(self.generation, self.model)
            numbers = [_put(catalogue, each) for each in good]
            catalogue.put_embeddings(self.generation, numbers, self.num_rows)
            for each, number in zip(good, numbers, strict=True):
                _put_files(catalogue, each.files, number, None)
            for each in back:
                # What an image is to blame for stays until it changes; what a server is, does not.
                if isinstance(each.error, ImageError):
                    _put_files(catalogue, each.files, _put(catalogue, each), None)
                elif each.error is not None:
                    _put_files(catalogue, each.files, None, _reason(each.error))
            for file, content in known:
                _put_files(catalogue, [file], content, None)
            for file, reason in unread:
                _put_files(catalogue, [file], None, reason)
        self.num_rows += len(good)
        for each in back:
            self._by_hash.pop(each.content.sha256, None)


def _found(scan: Scan) -> Iterator[Found]:
    after = 0
    while page := scan.to_read(after, _PAGE):
        yield from (file for _, file in page)
        after = page[-1][0]


def _put(catalogue: Catalogue, pending: _Pending) -> int:
    content = pending.content
    error = None if pending.error is None else _reason(pending.error)
    return catalogue.put_content(content.sha256, content.width_px, content.height_px, error)


def _put_files(
    catalogue: Catalogue, files: Iterable[Found], content: int | None, error: str | None
) -> None:
    for file in files:
        catalogue.put_file(file.path, file.size_bytes, file.mtime_ns, content, error)


def _reason(error: ClipRTError) -> str:
    """Return what is wrong, without the number that the image had among those of a call."""
    prefix = f"image {getattr(error, 'index', None)} "
    # It was passed as bytes, which says nothing about the file.
    return str(error).removeprefix(prefix).removeprefix("(bytes) ")


def _describe(error: OSError) -> str:
    # Of an error of our own there is no number.
    return f"cannot be read: {error.strerror or error}" if error.errno else str(error)
