"""The client for asyncio: the same calls, awaited; each runs in a thread of a pool of its own.

Threads, since decoding and tokenising take the processor, and would hold up an event loop. All
logic is `client.Client`'s.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

from clip_rt.cache.memory import PromptCache
from clip_rt.client import Client
from clip_rt.deadline import Cancellation, cancellable
from clip_rt.errors import ClientClosedError
from clip_rt.inputs.images import Images
from clip_rt.inputs.items import OnError
from clip_rt.requests.results import Encoded
from clip_rt.wire.manifest import Manifest

MAX_CALLS = 64
"""Calls at work at a time; more wait their turn, and their time runs meanwhile."""

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def _awaited(
    method: Callable[Concatenate[Client, Arguments], Result],
) -> Callable[Concatenate[AsyncClient, Arguments], Coroutine[Any, Any, Result]]:
    """Return a method of `Client` as one of `AsyncClient`, to be awaited."""

    @functools.wraps(method)
    async def call(
        self: AsyncClient, /, *args: Arguments.args, **options: Arguments.kwargs
    ) -> Result:
        return await self._run(functools.partial(method, self._client, *args, **options))

    return call


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

    async def __aexit__(self, *error: object) -> None:
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

    list_models = _awaited(Client.list_models)
    """As `Client.list_models`."""
    encode_images = _awaited(Client.encode_images)
    """As `Client.encode_images`."""

    async def stream_images(
        self,
        images: Images,
        *,
        on_error: OnError = "raise",
        dimensions: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Encoded]:
        """As `Client.stream_images`, an asynchronous iterator."""
        parts = self._client.stream_images(
            images, on_error=on_error, dimensions=dimensions, timeout_s=timeout_s
        )
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

    encode_texts = _awaited(Client.encode_texts)
    """As `Client.encode_texts`."""
    encode_text_hidden = _awaited(Client.encode_text_hidden)
    """As `Client.encode_text_hidden`."""
    class_embeddings = _awaited(Client.class_embeddings)
    """As `Client.class_embeddings`."""
    zero_shot = _awaited(Client.zero_shot)
    """As `Client.zero_shot`."""
    classify = _awaited(Client.classify)
    """As `Client.classify`."""
    moderate = _awaited(Client.moderate)
    """As `Client.moderate`."""
    reload = _awaited(Client.reload)
    """As `Client.reload`."""

    async def close(self) -> None:
        """As `Client.close`; calls under way end with `ClientClosedError`."""
        self._is_closed = True
        await asyncio.get_running_loop().run_in_executor(None, self._client.close)
        self._pool.shutdown(wait=False)

    async def _run(self, call: Callable[[], Result]) -> Result:
        """Make a call in a thread of the pool, and call it off when this task is cancelled."""
        if self._is_closed:
            raise ClientClosedError("the client is closed. Make a new one.")
        cancellation = Cancellation()

        def work() -> Result:
            with cancellable(cancellation):
                return call()

        loop = asyncio.get_running_loop()
        # The context, so that measurements and spans of the task reach the thread.
        future = loop.run_in_executor(self._pool, contextvars.copy_context().run, work)
        try:
            return await future
        except asyncio.CancelledError:
            cancellation.cancel()
            raise
