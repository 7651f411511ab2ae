"""Images and texts in, embeddings and zero-shot scores out; what this package is for.

Puts the other modules together and does no work of its own.
"""

from __future__ import annotations

import contextlib
import numbers
import os
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from clip_rt import telemetry
from clip_rt.cache.memory import Key, PromptCache
from clip_rt.classification import zero_shot
from clip_rt.classification.probe import Probe
from clip_rt.classification.zero_shot import Scores
from clip_rt.deadline import START_TIMEOUT_S, Deadline
from clip_rt.embedded.bundled import find_model_repository
from clip_rt.errors import (
    ClientClosedError,
    ContractError,
    ImageError,
    InferenceError,
    InputError,
    ModelReplacedError,
    NonFiniteEmbeddingError,
    ServerError,
    ServerTimeoutError,
    TextError,
    TextTooLongError,
)
from clip_rt.inputs import prompts, tokenizer
from clip_rt.inputs.decoding import MAX_BYTES, MAX_PIXELS, Decode, check_decode, check_limits
from clip_rt.inputs.images import Images, count_threads, prepare_each
from clip_rt.inputs.items import OnError, check_on_error
from clip_rt.requests import batches as batching
from clip_rt.requests import dispatch
from clip_rt.requests.connection import Connection, Model
from clip_rt.requests.lane import Lane
from clip_rt.requests.results import Encoded, Gathering, number_parts
from clip_rt.specs import slug
from clip_rt.wire.channel import TLS, parse_url
from clip_rt.wire.manifest import Manifest

URL_VARIABLE = "CLIP_RT_URL"
REPOSITORY_VARIABLE = "CLIP_RT_REPOSITORY"
CACHE_VARIABLE = "CLIP_RT_CACHE_DIR"

Item = TypeVar("Item")
Result = TypeVar("Result")

TIMEOUT_S = 30.0
CACHE_BYTES = 64 * 1024**2
"""Room for some 25,000 class embeddings of 512 numbers."""
MIN_PROMPTS, MAX_PROMPTS = 64, 4096
CHUNK_S = 0.5
"""Class embeddings are made and kept in chunks of about that time and of that many prompts: a call
that ends early loses little, and a long chunk has more prompts of equal length."""


class Client:
    """A CLIP model on a Triton server, or on one of its own that it starts on this machine.

    Constructing does no I/O; the first call connects. Thread-safe. A forked child opens its own
    connection, and a pickled client carries its configuration only. `close` it, or use it in a
    `with` statement.

    Args:
        url: host:port of Triton's gRPC endpoint, or grpcs://host:port for TLS; or several, of
            replicas that serve the same model; dns:///name:port asks in turn all the servers that
            a name stands for. Which of those answers is not known, so all must have the same
            weights; servers that are listed are held to that. Without it: the embedded server over
            `repository` if that is given, else the addresses in $CLIP_RT_URL, separated by commas,
            else the embedded server over $CLIP_RT_REPOSITORY or the bundled model.
        model: Name the model was exported under. Without it: the only one there is.
        repository: Folder of models for the embedded server.
        timeout_s: Longest time a call may take, unless it says otherwise; infinity is allowed.
            Starting the embedded server comes on top, at the first call.
        start_timeout_s: Longest wait for the embedded server to load its models.
        fingerprint: Insist on these weights, as `manifest.fingerprint` names them.
        exif: Turn photographs upright as their EXIF orientation says; see `images.prepare` for
            which images have one.
        max_pixels: Largest width x height of an image, read from its header. A picture takes 4
            bytes a pixel while it is decoded, on each core.
        max_bytes: Largest encoded size of an image.
        decode: "exact", or "fast" for large JPEGs decoded at a smaller scale, nearly the same; see
            `images.prepare`.
        headers: Sent with every request, to say who asks; never logged or shown.
        tls: How to trust a grpcs:// server, and a certificate of one's own.
        cache_bytes: Memory for class embeddings; 0 turns it off.
        cache_dir: Folder where class embeddings outlive this process, shared by any number of
            them. Without it: $CLIP_RT_CACHE_DIR, else none.

    Raises:
        InputError: an argument cannot be used.
    """

    _connection: Connection | None

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        model: str | None = None,
        repository: str | os.PathLike[str] | None = None,
        timeout_s: float = TIMEOUT_S,
        start_timeout_s: float = START_TIMEOUT_S,
        fingerprint: str | None = None,
        exif: bool = True,
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
        decode: Decode = "exact",
        headers: Mapping[str, str] | None = None,
        tls: TLS | None = None,
        cache_bytes: int = CACHE_BYTES,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if url is not None and repository is not None:
            raise InputError("url and repository exclude each other; name a server or a folder.")
        urls = None if url is None else _split_urls(url)
        check_decode(decode)
        check_limits(max_pixels=max_pixels, max_bytes=max_bytes)
        _check_headers(headers)
        if model is not None:
            slug(model)
        if repository is not None and not isinstance(repository, (str, os.PathLike)):
            raise InputError(f"repository is a {type(repository).__name__}; name a folder.")
        if not (fingerprint is None or isinstance(fingerprint, str)):
            raise InputError(f"fingerprint is a {type(fingerprint).__name__}; pass hex digits.")
        if not isinstance(tls, TLS | None):
            raise InputError(f"tls is a {type(tls).__name__}; pass a clip_rt.TLS.")
        if not isinstance(cache_dir, (str, os.PathLike, NoneType)):
            raise InputError(f"cache_dir is a {type(cache_dir).__name__}; name a folder.")
        if not isinstance(exif, bool):
            raise InputError(f"exif is {exif!r:.40}; it must be True or False.")
        if type(cache_bytes) is not int or cache_bytes < 0:
            raise InputError(f"cache_bytes is {cache_bytes!r:.80}; it must be 0 or more.")
        _check_timeout(timeout_s)
        _check_timeout(start_timeout_s, "start_timeout_s")
        self._urls = urls
        self._model = model
        self._repository = None if repository is None else Path(repository)
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._fingerprint = fingerprint
        self._exif = exif
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._decode: Decode = decode
        self._headers = dict(headers or {})
        self._tls = tls
        self._cache_bytes = cache_bytes
        folder = cache_dir or os.environ.get(CACHE_VARIABLE) or None
        self._cache_dir = None if folder is None else Path(folder)
        self._open_up()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        place = ", ".join(self._urls or ()) or self._repository or "default"
        return f"Client({str(place)!r}, model={self._model!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _CONFIGURATION}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_up()

    @property
    def manifest(self) -> Manifest:
        """What the server says about the model; connects if needed.

        Raises:
            ServerError, UnknownModelError, ContractError: see `encode_images`.
        """
        with self._begun(None) as (model, _):
            return model.manifest

    @property
    def cache(self) -> PromptCache:
        """Class embeddings that are kept: how many, how often they were of use; `clear()`."""
        return self._cache

    @overload
    def encode_images(
        self,
        images: Images,
        *,
        on_error: Literal["raise"] = "raise",
        timeout_s: float | None = None,
    ) -> NDArray[np.float32]: ...

    @overload
    def encode_images(
        self, images: Images, *, on_error: Literal["skip"], timeout_s: float | None = None
    ) -> Encoded: ...

    def encode_images(
        self, images: Images, *, on_error: OnError = "raise", timeout_s: float | None = None
    ) -> NDArray[np.float32] | Encoded:
        """Embed images.

        Any number of them: they are read, prepared and sent a batch at a time, on all cores, so
        that a generator of thousands needs the memory of a few. Equal images are sent once.

        Args:
            images: Paths, encoded bytes, open files, Pillow images, uint8 arrays or tensors
                (H, W, 3), in any mixture; one image alone is a batch of one, (N, H, W, 3) of N.
            on_error: "raise" the first error, or "skip" images that cannot be used.
            timeout_s: For this call; the client's own if None.

        Returns:
            float32 (N, D), rows of length 1, in the order of the images. N = 0 gives (0, D).
            With `on_error="skip"` the rows of those that could be used, and the failures.

        Raises:
            ImageError: an image cannot be used; carries its index.
            InferenceError, NonFiniteEmbeddingError: the server cannot embed it; the same.
            ServerError: the server cannot be started, reached or used; see `errors`.
            UnknownModelError: the server does not have the model.
            ContractError: it has another one than was asked for.
            ClientClosedError: the client was closed.
        """
        check_on_error(on_error)

        def work(model: Model, deadline: Deadline) -> NDArray[np.float32] | Encoded:
            encoded = self._embed_images(model, images, deadline, on_error)
            return encoded if on_error == "skip" else encoded.embeddings

        return self._call("encode_images", timeout_s, work, images)

    def stream_images(
        self, images: Images, *, on_error: OnError = "raise", timeout_s: float | None = None
    ) -> Generator[Encoded, None, None]:
        """Embed any number of images, in parts, as they come back; memory stays flat.

        Args:
            images: As for `encode_images`; a generator is read as parts are asked for.
            on_error: As for `encode_images`.
            timeout_s: Longest time for one part, not for all; the client's own if None.

        Yields:
            The embeddings of the next images, with their positions among all.

        Raises:
            ImageError, ServerError, UnknownModelError, ContractError, ClientClosedError: see
                `encode_images`.
        """
        check_on_error(on_error)
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return telemetry.stream("stream_images", self._stream_images(images, on_error, timeout_s))

    @overload
    def encode_texts(
        self,
        texts: tokenizer.Texts,
        *,
        truncate: bool = False,
        on_error: Literal["raise"] = "raise",
        timeout_s: float | None = None,
    ) -> NDArray[np.float32]: ...

    @overload
    def encode_texts(
        self,
        texts: tokenizer.Texts,
        *,
        truncate: bool = False,
        on_error: Literal["skip"],
        timeout_s: float | None = None,
    ) -> Encoded: ...

    def encode_texts(
        self,
        texts: tokenizer.Texts,
        *,
        truncate: bool = False,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> NDArray[np.float32] | Encoded:
        """Embed texts as they are, without a template. Equal texts are sent once.

        Args:
            texts: A list of strings, as `items` has it; one string alone is a batch of one.
            truncate: Cut texts that are too long for the model instead of refusing them.
            on_error: "raise" the first error, or "skip" texts that cannot be used.
            timeout_s: For this call; the client's own if None.

        Returns:
            float32 (N, D), rows of length 1, in the order of the texts. N = 0 gives (0, D).
            With `on_error="skip"` the rows of those that could be used, and the failures.

        Raises:
            TextTooLongError: a text has too many tokens; carries its index.
            TextError: a text cannot be used; carries its index.
            ServerError, UnknownModelError, ContractError, ClientClosedError: see `encode_images`.
        """
        check_on_error(on_error)

        def work(model: Model, deadline: Deadline) -> NDArray[np.float32] | Encoded:
            encoded = self._embed_texts(model, texts, deadline, on_error, truncate=truncate)
            return encoded if on_error == "skip" else encoded.embeddings

        return self._call("encode_texts", timeout_s, work, texts)

    def class_embeddings(
        self,
        labels: Iterable[str],
        *,
        templates: str | Iterable[str] | None = None,
        timeout_s: float | None = None,
    ) -> NDArray[np.float32]:
        """Embed labels as classes; those seen before come from memory, or from `cache_dir`.

        Those that are finished when the time is over, or an error ends the call, are kept: calling
        again goes on from there.

        Args:
            labels: Names of the classes, a list as `items` has it.
            templates: Name of a template set, or templates with exactly one `{}`; None is
                "a photo of a {}.".
            timeout_s: For this call; the client's own if None.

        Returns:
            float32 (C, D): for each label the normalised mean of its normalised prompt embeddings.

        Raises:
            TemplateError: a template cannot be used.
            TextError: a label cannot be used; carries its index.
            ServerError, UnknownModelError, ContractError, ClientClosedError: see `encode_images`.
        """
        checked, found = prompts.check_labels(labels), prompts.find_templates(templates)

        def work(model: Model, deadline: Deadline) -> NDArray[np.float32]:
            return self._embed_classes(model, checked, found, deadline)

        return self._call("class_embeddings", timeout_s, work)

    def zero_shot(
        self,
        images: Images,
        labels: Iterable[str],
        *,
        templates: str | Iterable[str] | None = None,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Scores:
        """Say which label fits each image best.

        Args:
            images: As for `encode_images`.
            labels: As for `class_embeddings`; at least one.
            templates: As for `class_embeddings`.
            on_error: "raise" the first error, or "skip" images that cannot be used: the scores are
                of the others, and name both.
            timeout_s: For this call; the client's own if None.

        Returns:
            Probabilities and logits, (N, C) each, with the ranking of the labels.

        Raises:
            ImageError, TextError, TemplateError, InputError: an argument cannot be used.
            ServerError, UnknownModelError, ContractError, ClientClosedError: see `encode_images`.
        """
        check_on_error(on_error)
        checked, found = prompts.check_labels(labels), prompts.find_templates(templates)
        if not checked:
            raise InputError("labels is empty; name at least one.")

        def work(model: Model, deadline: Deadline) -> Scores:
            manifest = model.manifest
            class_embeddings = self._embed_classes(model, checked, found, deadline)
            encoded = self._embed_images(model, images, deadline, on_error)
            with telemetry.stage("classify", len(encoded.indices)):
                return zero_shot.classify(
                    class_embeddings=class_embeddings,
                    image_embeddings=encoded.embeddings,
                    labels=checked,
                    logit_scale=manifest.logit_scale,
                    logit_bias=manifest.logit_bias,
                ).of_items(encoded.indices, encoded.failures)

        return self._call("zero_shot", timeout_s, work, images)

    def classify(
        self,
        images: Images,
        probe: Probe,
        *,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Scores:
        """Score images with a linear classifier fitted on the embeddings of this model.

        Args:
            images: As for `encode_images`.
            probe: What `Probe.load` read, from `training.probe` or `training.few_shot`.
            on_error: As for `zero_shot`.
            timeout_s: For this call; the client's own if None.

        Returns:
            Probabilities and logits, (N, C) each, with the ranking of the probe's labels.

        Raises:
            ImageError: an image cannot be used; carries its index.
            ContractError: the probe was fitted on other weights than the server has.
            ServerError, UnknownModelError, ClientClosedError: see `encode_images`.
        """
        check_on_error(on_error)

        def work(model: Model, deadline: Deadline) -> Scores:
            served = model.manifest.fingerprint
            if probe.fingerprint != served:
                raise ContractError(
                    f"the probe was fitted on embeddings of the weights "
                    f"{probe.fingerprint[:12]!r}, and {model.manifest.model!r} has {served[:12]!r}."
                    " Fit it again on these, or name the model it belongs to with model=.",
                    expected=probe.fingerprint,
                    found=served,
                )
            encoded = self._embed_images(model, images, deadline, on_error)
            with telemetry.stage("classify", len(encoded.indices)):
                return probe.classify(encoded.embeddings).of_items(
                    encoded.indices, encoded.failures
                )

        return self._call("classify", timeout_s, work, images)

    def server_seconds(self) -> dict[str, float]:
        """Return what the server has spent on all its clients since it started.

        Returns:
            Seconds by stage, `server_queue` and `server_compute`, both towers and all servers that
            are there together; see `clip_rt.measure(server=...)`.

        Raises:
            InferenceError: the server does not tell.
            ServerError, UnknownModelError, ContractError, ClientClosedError: see `encode_images`.
        """
        with self._begun(None) as (model, deadline):
            names = [lane.tower.name for lane in (model.image, model.text)]
            counted = [
                each
                for endpoint in model.image.connection.endpoints
                if endpoint.is_admitted
                for each in endpoint.transport.read_statistics(names, deadline).values()
            ]
            return {
                "server_queue": sum(each.queue_s for each in counted),
                "server_compute": sum(each.compute_s for each in counted),
            }

    def reload(self, *, timeout_s: float | None = None) -> bool:
        """Take what the repository of the embedded server holds now, without a pause.

        A second server is started, or joined where another process has started it, and calls go
        on with the first until the second is ready. Each call is of one model from begin to end,
        and the first server ends when nobody uses it any more: for a while both are in memory.

        Args:
            timeout_s: Longest time for the new server to answer, once `start_timeout_s` or less
                has been spent on its start; the client's own if None.

        Returns:
            Whether there was anything new.

        Raises:
            InputError: the server is not this client's own.
            ServerStartError, ServerError, ContractError: what is new cannot be used; calls go on
                with the server there was.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        _check_timeout(timeout_s)
        with self._reloading_alone(timeout_s + self._start_timeout_s):
            with self._begun(timeout_s) as (model, _):
                before = model.image.connection
            if any(endpoint.server is None for endpoint in before.endpoints):
                raise InputError(
                    f"the server at {before.urls} is not this client's own, so it cannot have it "
                    "reload its models. Of a `python -m clip_rt serve`: python -m clip_rt reload "
                    "--port PORT."
                )
            found = self._dial()
            try:
                is_new = not found.serves_as(before)
                if is_new:
                    deadline = Deadline.after(timeout_s)
                    found.find_model(self._model, self._fingerprint, deadline)
                    with self._locked(timeout_s):
                        if self._is_closed:
                            raise ClientClosedError("the client is closed. Make a new one.")
                        self._use(found)
            except BaseException:
                found.close()
                raise
            (before if is_new else found).retire()
            return is_new

    def close(self) -> None:
        """Close the connection, and end the embedded server when no other client uses it.

        Calls under way in other threads end with `ClientClosedError`. Closing twice is harmless.
        """
        with self._lock:
            self._is_closed = True
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _open_up(self) -> None:
        self._lock = threading.Lock()
        self._is_closed = False
        self._connection = None
        self._finalizer: weakref.finalize[..., Client] | None = None
        self._reloading = threading.Lock()
        self._cache = PromptCache(self._cache_bytes, self._cache_dir)
        _clients.add(self)

    def _call(
        self,
        name: str,
        timeout_s: float | None,
        work: Callable[[Model, Deadline], Result],
        source: object = (),
    ) -> Result:
        """Make a public call and report how it goes: anew when the model is replaced meanwhile.

        Args:
            name: Of the call.
            timeout_s: For all of it.
            work: Uses one model from begin to end, so that no result is of two.
            source: What it reads; an iterator cannot be read again.

        Raises:
            ModelReplacedError: the client insists on a fingerprint, or the source is an iterator.
        """
        with telemetry.call(name) as call, self._begun(timeout_s) as (model, deadline):
            while True:
                call.attributes["model"] = model.manifest.model
                try:
                    return work(model, deadline)
                except ModelReplacedError as error:
                    if self._fingerprint is not None:
                        raise
                    if isinstance(source, Iterator) and not hasattr(source, "read"):
                        raise ModelReplacedError(
                            f"{error} It cannot be done again by itself, because its items came "
                            "from an iterator, which is used up: pass a list.",
                            expected=error.expected,
                            found=error.found,
                        ) from error
                connection = model.image.connection
                model = connection.find_model(self._model, None, deadline)

    @contextlib.contextmanager
    def _begun(self, timeout_s: float | None) -> Iterator[tuple[Model, Deadline]]:
        """Make sure of a connection to the right model, start the clock, and keep both."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        _check_timeout(timeout_s)
        with contextlib.ExitStack() as until_end:
            with self._locked(timeout_s):
                if self._is_closed:
                    raise ClientClosedError("the client is closed. Make a new one.")
                if self._connection is None:
                    self._use(self._dial())
                connection = self._connection
                assert connection is not None
                until_end.enter_context(connection.used())
            deadline = Deadline.after(timeout_s)
            yield connection.find_model(self._model, self._fingerprint, deadline), deadline

    def _use(self, connection: Connection) -> None:
        """Make calls with a connection from now on; the lock is held."""
        if self._finalizer is not None:
            self._finalizer.detach()
        self._connection = connection
        # One that is dropped without being closed hangs up.
        self._finalizer = weakref.finalize(self, connection.close)

    @contextlib.contextmanager
    def _reloading_alone(self, timeout_s: float) -> Iterator[None]:
        if not self._reloading.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX)):
            raise ServerTimeoutError(
                f"another thread is still reloading after {timeout_s:g} s. Call again later.",
                timeout_s=timeout_s,
            )
        try:
            yield
        finally:
            self._reloading.release()

    @contextlib.contextmanager
    def _locked(self, timeout_s: float) -> Iterator[None]:
        """Hold the lock; another thread may have it while it connects, for longer than we have."""
        wait_s = timeout_s + (self._start_timeout_s if self._connection is None else 0.0)
        if not self._lock.acquire(timeout=min(wait_s, threading.TIMEOUT_MAX)):
            raise ServerTimeoutError(
                f"another thread is still connecting after {wait_s:g} s. Is the server up?",
                timeout_s=timeout_s,
            )
        try:
            yield
        finally:
            self._lock.release()

    def _dial(self) -> Connection:
        urls, repository = self._urls, self._repository
        if urls is None and repository is None:
            if given := os.environ.get(URL_VARIABLE):
                urls = _split_urls(given)
            else:
                repository = Path(os.environ.get(REPOSITORY_VARIABLE) or find_model_repository())
        if urls is not None:
            return Connection.to_urls(urls, headers=self._headers, tls=self._tls)
        assert repository is not None
        return Connection.to_repository(repository, start_timeout_s=self._start_timeout_s)

    def _prepare(
        self, model: Model, images: Images, on_error: OnError
    ) -> Generator[NDArray[np.uint8] | ImageError, None, None]:
        return prepare_each(
            images,
            side_px=model.manifest.side_px,
            exif=self._exif,
            max_pixels=self._max_pixels,
            max_bytes=self._max_bytes,
            decode=self._decode,
            num_threads=count_threads(),
            on_error=on_error,
        )

    def _embed_images(
        self, model: Model, images: Images, deadline: Deadline, on_error: OnError
    ) -> Encoded:
        lane, gathering = model.image, Gathering()
        with contextlib.closing(self._prepare(model, images, on_error)) as items:
            batches = gathering.batches(_until(deadline, items), lambda: lane.max_rows)
            with contextlib.closing(
                dispatch.stream(model, lane, batches, lambda: deadline)
            ) as answers:
                for answer in answers:
                    gathering.add_answer(answer, on_error)
        return _finish(gathering, lane, "images")

    def _stream_images(
        self, images: Images, on_error: OnError, timeout_s: float
    ) -> Iterator[Encoded]:
        with self._begun(timeout_s) as (model, _):
            num_done = 0
            try:
                for encoded in self._stream_from(model, images, on_error, timeout_s):
                    yield encoded
                    num_done += len(encoded.indices) + len(encoded.failures)
            except ModelReplacedError as error:
                raise ModelReplacedError(
                    f"{error} The {num_done} images before were embedded with the old weights, "
                    f"those from image {num_done} on were not; do not mix them: begin the stream "
                    "anew.",
                    expected=error.expected,
                    found=error.found,
                ) from error

    def _stream_from(
        self, model: Model, images: Images, on_error: OnError, timeout_s: float
    ) -> Iterator[Encoded]:
        lane = model.image
        parts: list[Gathering] = []

        def batches(
            items: Iterator[NDArray[np.uint8] | InputError],
        ) -> Iterator[NDArray[Any] | None]:
            for part, batch in number_parts(items, lambda: lane.max_rows):
                parts.append(part)
                yield batch

        with (
            contextlib.closing(self._prepare(model, images, on_error)) as items,
            contextlib.closing(
                dispatch.stream(model, lane, batches(items), lambda: Deadline.after(timeout_s))
            ) as answers,
        ):
            for answer in answers:
                part = parts.pop(0)
                part.add_answer(answer, on_error)
                yield _finish(part, lane, "images")

    def _embed_texts(
        self,
        model: Model,
        texts: tokenizer.Texts,
        deadline: Deadline,
        on_error: OnError,
        *,
        truncate: bool,
    ) -> Encoded:
        gathering, batches = _lay_out(model, texts, deadline, on_error, truncate=truncate)
        with contextlib.closing(
            dispatch.stream(model, model.text, batches, lambda: deadline)
        ) as answers:
            for answer in answers:
                gathering.add_answer(answer, on_error)
        return _finish(gathering, model.text, "texts")

    def _embed_classes(
        self,
        model: Model,
        labels: tuple[str, ...],
        templates: tuple[str, ...],
        deadline: Deadline,
    ) -> NDArray[np.float32]:
        manifest = model.manifest
        # Two exports of the same weights need not give the same vectors.
        weights = f"{manifest.fingerprint}/{manifest.precision}/{manifest.activation}"
        words = tokenizer.fingerprint()
        keys = [Key(weights, words, manifest.context_length, templates, each) for each in labels]

        def make(positions: Sequence[int]) -> Iterator[NDArray[np.float32]]:
            return _make_classes(model, labels, positions, templates, deadline)

        return self._cache.get_or_make(keys, make, dim=manifest.embedding_dim, deadline=deadline)


_CONFIGURATION = (
    *("_urls", "_model", "_repository", "_timeout_s", "_start_timeout_s", "_fingerprint"),
    *("_exif", "_max_pixels", "_max_bytes", "_decode"),
    *("_headers", "_tls", "_cache_bytes", "_cache_dir"),
)
"""What a pickled client carries."""

_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _finish(gathering: Gathering, lane: Lane, what: str) -> Encoded:
    """Return what came of all items, and count them."""
    encoded = gathering.finish(lane.tower.embedding_dim)
    telemetry.count(what, len(encoded.indices))
    telemetry.count("failures", len(encoded.failures))
    return encoded


def _lay_out(
    model: Model,
    texts: tokenizer.Texts,
    deadline: Deadline,
    on_error: OnError = "raise",
    *,
    truncate: bool = False,
) -> tuple[Gathering, tuple[NDArray[np.int32], ...]]:
    """Return the batches to send for texts, and what will gather their answers."""
    manifest, gathering = model.manifest, Gathering()
    token_ids: list[list[int]] = []
    source = tokenizer.iterate(texts)
    with telemetry.stage("tokenize", len(source) if isinstance(source, Sized) else 1):
        for index, text in enumerate(_until(deadline, source)):
            try:
                ids = tokenizer.encode_text(
                    text,
                    index=index,
                    context_length=manifest.context_length,
                    truncate=truncate,
                )
            except TextError as error:
                if on_error == "raise":
                    raise
                gathering.add_failure(error)
            else:
                gathering.row_by_item.append(len(token_ids))
                token_ids.append(ids)
    with telemetry.stage("prepare", len(token_ids)):
        plan = batching.plan_texts(
            token_ids, max_rows=model.text.max_rows, buckets=manifest.text_buckets
        )
        gathering.row_by_item = [
            int(plan.row_by_text[row]) if row >= 0 else -1 for row in gathering.row_by_item
        ]
    return gathering, plan.batches


@dataclass
class _Chunk:
    """Some labels whose prompts are under way together."""

    positions: Sequence[int]
    gathering: Gathering
    num_batches: int


def _make_classes(
    model: Model,
    labels: tuple[str, ...],
    positions: Sequence[int],
    templates: tuple[str, ...],
    deadline: Deadline,
) -> Iterator[NDArray[np.float32]]:
    """Yield the class embedding, (D,), of each label at `positions`, in order, as they come.

    The prompts of the next labels are sent before the last answers are back, so that small chunks
    cost no waiting.
    """
    chunks: deque[_Chunk] = deque()

    def batches() -> Iterator[NDArray[np.int32]]:
        start, num_prompts = 0, MIN_PROMPTS
        while start < len(positions):
            begun_s = time.monotonic()
            some = positions[start : start + max(1, num_prompts // len(templates))]
            start += len(some)
            texts = [
                prompts.fill(template, labels[position])
                for position in some
                for template in templates
            ]
            try:
                gathering, laid_out = _lay_out(model, texts, deadline)
            except TextError as error:
                raise _blame_label(error, some, len(templates)) from error
            chunks.append(_Chunk(some, gathering, len(laid_out)))
            yield from laid_out
            # They are taken as fast as earlier ones come back.
            is_quick = time.monotonic() - begun_s < CHUNK_S
            num_prompts = 2 * num_prompts if is_quick else num_prompts // 2
            num_prompts = min(max(num_prompts, MIN_PROMPTS), MAX_PROMPTS)

    with contextlib.closing(
        dispatch.stream(model, model.text, batches(), lambda: deadline)
    ) as answers:
        for answer in answers:
            chunk = chunks[0]
            try:
                chunk.gathering.add_answer(answer, "raise")
            except (InferenceError, NonFiniteEmbeddingError) as error:
                if error.index is None or not isinstance(error.__cause__, ServerError):
                    raise
                position = chunk.positions[error.index // len(templates)]
                raise dispatch.blame_item(error.__cause__, position) from error.__cause__
            chunk.num_batches -= 1
            if chunk.num_batches:
                continue
            rows = _finish(chunk.gathering, model.text, "texts").embeddings
            try:
                pooled = zero_shot.pool(rows.reshape(len(chunk.positions), len(templates), -1))
            except NonFiniteEmbeddingError as error:
                position = chunk.positions[error.index]
                message = str(error).replace(f"class {error.index} ", f"class {position} ")
                raise NonFiniteEmbeddingError(message, index=position) from error
            chunks.popleft()
            yield from pooled


def _blame_label(error: TextError, positions: Sequence[int], num_templates: int) -> TextError:
    """Turn the index of a prompt into the index of its label."""
    if error.index is None:
        return error
    index = positions[error.index // num_templates]
    message = f"label {index} makes a prompt that cannot be used: {error}"
    if isinstance(error, TextTooLongError):
        return TextTooLongError(
            message,
            index=index,
            num_tokens=error.num_tokens,
            context_length=error.context_length,
        )
    return TextError(message, index=index)


def _until(deadline: Deadline, items: Iterable[Item]) -> Iterator[Item]:
    """Yield items until the deadline: reading and preparing them is part of a call, too."""
    for item in items:
        if deadline.remaining_s() <= 0:
            raise ServerTimeoutError(
                f"the {deadline.timeout_s:g} s of the call were over before all of its items were "
                "read and prepared. Allow more with timeout_s=, or use stream_images().",
                timeout_s=deadline.timeout_s,
            )
        yield item


def _split_urls(url: str | Sequence[str]) -> tuple[str, ...]:
    """Return one or several addresses, checked."""
    if not isinstance(url, Iterable) or isinstance(url, bytes):
        raise InputError(f"url is a {type(url).__name__}; pass host:port, or a list of them.")
    urls = tuple(part.strip() for part in url.split(",")) if isinstance(url, str) else tuple(url)
    if not urls:
        raise InputError("url names no server; name at least one.")
    for index, each in enumerate(urls):
        parse_url(each)
        if each in urls[:index]:
            raise InputError(f"url names {each!r} twice; name each server once.")
    return urls


def _check_headers(headers: Mapping[str, str] | None) -> None:
    if not isinstance(headers, Mapping | None):
        raise InputError(f"headers is a {type(headers).__name__}; pass a dict of strings.")
    for name, value in (headers or {}).items():
        is_name = isinstance(name, str) and re.fullmatch(r"(?!grpc-)[a-z0-9_.-]+(?<!-bin)", name)
        is_value = isinstance(value, str) and value.isascii() and value.isprintable()
        if not is_name or not is_value:
            raise InputError(
                f"header {name!r:.40} cannot be sent: names are strings of lower-case letters, "
                "digits and _ . -, not grpc-... nor ...-bin; values are strings of printable ASCII."
            )


def _check_timeout(timeout_s: float, name: str = "timeout_s") -> None:
    if not (isinstance(timeout_s, numbers.Real) and timeout_s > 0):
        raise InputError(f"{name} is {timeout_s!r:.80}; it must be a number above 0.")


def _after_fork_in_child() -> None:
    for client in _clients:
        # Another thread may have held it at the fork, and that thread does not exist here.
        client._lock, client._reloading = threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
