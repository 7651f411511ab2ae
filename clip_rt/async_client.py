"""The client for asyncio: the same calls, awaited; each runs in a thread of a pool of its own.

Threads, since decoding and tokenising take the processor, and would hold up an event loop. All
logic is `client.Client`'s.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from clip_rt.cache.memory import PromptCache
from clip_rt.classification.probe import Probe
from clip_rt.classification.zero_shot import Scores
from clip_rt.client import Client
from clip_rt.deadline import Cancellation, cancellable
from clip_rt.errors import ClientClosedError
from clip_rt.inputs import tokenizer
from clip_rt.inputs.images import Images
from clip_rt.inputs.items import OnError
from clip_rt.requests.results import Encoded
from clip_rt.wire.manifest import Manifest

MAX_CALLS = 64
"""Calls at work at a time; more wait their turn, and their time runs meanwhile."""

Result = TypeVar("Result")


class AsyncClient:
    """A CLIP model on a Triton server, for asyncio.

    Takes what `Client` takes. Constructing does no I/O; use it in `async with`, or `close` it. A
    call that is cancelled is called off on its way to the server too. Iterables of images and texts
    are read in another thread than the event loop's.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._client = Client(*args, **options)
        self._is_closed = False
        self._pool = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="clip_rt")

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"Async{self._client!r}"

    @property
    def cache(self) -> PromptCache:
        """As `Client.cache`."""
        return self._client.cache

    async def manifest(self) -> Manifest:
        """Return what `Client.manifest` is; connects if needed."""
        return await self._run(lambda: self._client.manifest)

    @overload
    async def encode_images(
        self,
        images: Images,
        *,
        on_error: Literal["raise"] = "raise",
        timeout_s: float | None = None,
    ) -> NDArray[np.float32]: ...

    @overload
    async def encode_images(
        self, images: Images, *, on_error: Literal["skip"], timeout_s: float | None = None
    ) -> Encoded: ...

    async def encode_images(
        self, images: Images, *, on_error: OnError = "raise", timeout_s: float | None = None
    ) -> NDArray[np.float32] | Encoded:
        """As `Client.encode_images`."""
        call = functools.partial(self._client.encode_images, images, timeout_s=timeout_s)
        return await self._run(functools.partial(call, on_error=on_error))

    async def stream_images(
        self, images: Images, *, on_error: OnError = "raise", timeout_s: float | None = None
    ) -> AsyncIterator[Encoded]:
        """As `Client.stream_images`, an asynchronous iterator."""
        parts = self._client.stream_images(images, on_error=on_error, timeout_s=timeout_s)
        # A task that was cancelled leaves a thread in the iterator for a moment.
        turn = threading.Lock()

        def step() -> Encoded | None:
            with turn:
                return next(parts, None)

        def end() -> None:
            with turn:
                parts.close()

        try:
            while (part := await self._run(step)) is not None:
                yield part
        finally:
            # Not awaited: the source may be slow to let go, and whoever left need not wait.
            asyncio.get_running_loop().run_in_executor(None, end)

    @overload
    async def encode_texts(
        self,
        texts: tokenizer.Texts,
        *,
        truncate: bool = False,
        on_error: Literal["raise"] = "raise",
        timeout_s: float | None = None,
    ) -> NDArray[np.float32]: ...

    @overload
    async def encode_texts(
        self,
        texts: tokenizer.Texts,
        *,
        truncate: bool = False,
        on_error: Literal["skip"],
        timeout_s: float | None = None,
    ) -> Encoded: ...

    async def encode_texts(
        self,
        texts: tokenizer.Texts,
        *,
        truncate: bool = False,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> NDArray[np.float32] | Encoded:
        """As `Client.encode_texts`."""
        call = functools.partial(self._client.encode_texts, texts, truncate=truncate)
        return await self._run(functools.partial(call, on_error=on_error, timeout_s=timeout_s))

    async def class_embeddings(
        self,
        labels: Iterable[str],
        *,
        templates: str | Iterable[str] | None = None,
        timeout_s: float | None = None,
    ) -> NDArray[np.float32]:
        """As `Client.class_embeddings`."""
        call = functools.partial(self._client.class_embeddings, labels, templates=templates)
        return await self._run(functools.partial(call, timeout_s=timeout_s))

    async def zero_shot(
        self,
        images: Images,
        labels: Iterable[str],
        *,
        templates: str | Iterable[str] | None = None,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Scores:
        """As `Client.zero_shot`."""
        call = functools.partial(self._client.zero_shot, images, labels, templates=templates)
        return await self._run(functools.partial(call, on_error=on_error, timeout_s=timeout_s))

    async def classify(
        self,
        images: Images,
        probe: Probe,
        *,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Scores:
        """As `Client.classify`."""
        call = functools.partial(self._client.classify, images, probe, on_error=on_error)
        return await self._run(functools.partial(call, timeout_s=timeout_s))

    async def reload(self, *, timeout_s: float | None = None) -> bool:
        """As `Client.reload`."""
        return await self._run(lambda: self._client.reload(timeout_s=timeout_s))

    async def close(self) -> None:
        """As `Client.close`; calls under way end with `ClientClosedError`."""
        self._is_closed = True
        await asyncio.get_running_loop().run_in_executor(None, self._client.close)
        self._pool.shutdown(wait=False)

    async def _run(self, call: Callable[[], Result]) -> Result:
        """Make a call in a thread of the pool, and call it off when this task is cancelled."""
        if self._is_closed:
            raise ClientClosedError("the client is closed. Make a new one.")
        cancellation, began_at_s = Cancellation(), time.monotonic()

        def work() -> Result:
            with cancellable(cancellation, began_at_s):
                return call()

        loop = asyncio.get_running_loop()
        # The context, so that measurements and spans of the task reach the thread.
        future = loop.run_in_executor(self._pool, contextvars.copy_context().run, work)
        try:
            return await future
        except asyncio.CancelledError:
            cancellation.cancel()
            raise
