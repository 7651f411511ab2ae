"""Images read before they are needed, on threads: from disks, shards and other hosts."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from clip_rt.bulk.listing import Item
from clip_rt.errors import ImageError
from clip_rt.inputs.decoding import check_length, open_image, read_path
from clip_rt.inputs.fetching import FETCH_TIMEOUT_S, Fetcher, FetchError, is_url

NUM_THREADS = 8
NUM_AHEAD = 16
"""Images that wait, encoded: each has at most `max_bytes`."""


@dataclass(frozen=True)
class Content:
    """What an item holds, or why it cannot be read."""

    item: Item
    encoded: bytes = b""
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    problem: str = ""


class Reader:
    """Reads images; close it, or use it in a `with` statement.

    Args:
        max_pixels: Of an image whose size is told.
        max_bytes: Largest image that is read.
        hosts: Whose URLs are fetched.
    """

    def __init__(self, *, max_pixels: int, max_bytes: int, hosts: Collection[str]) -> None:
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._hosts = hosts
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="clip_rt-read")
        self._lock = threading.Lock()
        self._site: _Site | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what waits; what is being read is read to its end."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._site is not None:
            self._site.close()

    def read_ahead(self, items: Iterable[Item]) -> Iterator[Content]:
        """Yield the contents of items, in order."""
        source = iter(items)
        window: deque[Future[Content]] = deque()
        while True:
            for item in itertools.islice(source, NUM_AHEAD - len(window)):
                window.append(self._threads.submit(self._read, item))
            if not window:
                return
            yield window.popleft().result()

    def _read(self, item: Item) -> Content:
        if item.problem:
            return Content(item, problem=f"{item.problem}.")
        try:
            encoded = self._read_bytes(item)
        except (ImageError, OSError) as error:
            return Content(item, problem=_describe(error))
        width, height = self._measure(encoded)
        return Content(item, encoded, hashlib.sha256(encoded).hexdigest(), width, height)

    def _read_bytes(self, item: Item) -> bytes:
        if is_url(item.path):
            return self._fetch(item.path)
        if item.member:
            check_length(item.size_bytes, max_bytes=self._max_bytes)
            return item.file.read()
        return read_path(item.path, max_bytes=self._max_bytes)

    def _measure(self, encoded: bytes) -> tuple[int | None, int | None]:
        """Return width and height, from the header; what cannot be read the client reports."""
        try:
            return open_image(encoded, max_pixels=self._max_pixels, max_bytes=self._max_bytes).size
        # Damaged bytes raise nearly anything.
        except Exception:
            return None, None

    def _fetch(self, url: str) -> bytes:
        with self._lock:
            if self._site is None:
                self._site = _Site(self._hosts, self._max_bytes)
        try:
            return self._site.fetch(url)
        except FetchError as error:
            way_out = ". Allow its host with --image-host" if error.is_other_host else ""
            raise ImageError(f"{error}{way_out}.") from error


def _describe(error: ImageError | OSError) -> str:
    """Return the rest of a sentence that begins with the image."""
    # What the client says of a path is for callers, who may have meant something else by it.
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if isinstance(cause, OSError):
        return f"cannot be read: {cause.strerror or cause}."
    return str(error)


class _Site:
    """A thread that fetches, many at a time."""

    def __init__(self, hosts: Collection[str], max_bytes: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="clip_rt-fetch", daemon=True
        )
        self._thread.start()
        # Neither proxies nor passwords of the environment: the address that was checked is asked.
        self._client = httpx.AsyncClient(trust_env=False, timeout=FETCH_TIMEOUT_S)
        self._fetcher = Fetcher(self._client, hosts, max_bytes=max_bytes)

    def fetch(self, url: str) -> bytes:
        return asyncio.run_coroutine_threadsafe(self._fetcher.fetch(url), self._loop).result()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
