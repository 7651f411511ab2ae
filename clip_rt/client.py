"""Images and texts in, embeddings and zero-shot scores out; what this package is for.

Puts the other modules together and does no work of its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_rt import batching, prompts, tokenizer, zero_shot
from clip_rt.cache import EmbeddingCache, Key
from clip_rt.connection import START_TIMEOUT_S, Connection, Model
from clip_rt.deadline import Deadline
from clip_rt.errors import (
    ClientClosedError,
    ContractError,
    InputError,
    ServerError,
    ServerTimeoutError,
    TextError,
    TextTooLongError,
)
from clip_rt.images import Images, prepare_each
from clip_rt.manifest import Manifest
from clip_rt.probe import Probe
from clip_rt.specs import slug
from clip_rt.transport import ServedModel, parse_url
from clip_rt.zero_shot import Scores

URL_VARIABLE = "CLIP_RT_URL"
REPOSITORY_VARIABLE = "CLIP_RT_REPOSITORY"
CHECKOUT_REPOSITORY = Path(__file__).parents[1] / "model_repository"

TIMEOUT_S = 30.0
CACHE_BYTES = 64 * 1024**2
"""Room for some 25,000 class embeddings of 512 numbers."""
PROMPTS_AT_ONCE = 4096
"""Prompts held in memory at a time while class embeddings are made."""


class Client:
    """A CLIP model on a Triton server, or on one of its own that it starts on this machine.

    Constructing does no I/O; the first call connects. Thread-safe. A forked child opens its own
    connection, and a pickled client carries its configuration only. `close` it, or use it in a
    `with` statement.

    Args:
        url: host:port of Triton's gRPC endpoint, or grpcs://host:port for TLS. Without it: the
            embedded server over `repository` if that is given, else the address in $CLIP_RT_URL,
            else the embedded server over $CLIP_RT_REPOSITORY or the checkout's model_repository.
        model: Name the model was exported under. Without it: the only one there is.
        repository: Folder of models for the embedded server.
        timeout_s: Longest time a call may take, unless it says otherwise; infinity is allowed.
            Starting the embedded server comes on top, at the first call.
        start_timeout_s: Longest wait for the embedded server to load its models.
        fingerprint: Insist on these weights, as `manifest.fingerprint` names them.
        exif: Turn photographs upright as their EXIF orientation says.
        cache_bytes: Memory for class embeddings; 0 turns the cache off.

    Raises:
        InputError: an argument cannot be used.
    """

    _connection: Connection | None

    def __init__(
        self,
        url: str | None = None,
        *,
        model: str | None = None,
        repository: str | os.PathLike[str] | None = None,
        timeout_s: float = TIMEOUT_S,
        start_timeout_s: float = START_TIMEOUT_S,
        fingerprint: str | None = None,
        exif: bool = True,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if url is not None and repository is not None:
            raise InputError("url and repository exclude each other; name a server or a folder.")
        if url is not None:
            parse_url(url)
        if model is not None:
            slug(model)
        _check_timeout(timeout_s)
        _check_timeout(start_timeout_s, "start_timeout_s")
        self._url = url
        self._model = model
        self._repository = None if repository is None else Path(repository)
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._fingerprint = fingerprint
        self._exif = exif
        self._cache_bytes = cache_bytes
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
        place = self._url or self._repository or "default"
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
        model, _ = self._begin(None)
        return model.manifest

    def encode_images(
        self, images: Images, *, timeout_s: float | None = None
    ) -> NDArray[np.float32]:
        """Embed images.

        Any number of them: they are read, prepared and sent a batch at a time, so that a generator
        of thousands needs the memory of a few.

        Args:
            images: Paths, encoded bytes, Pillow images or uint8 arrays (H, W, 3), in any mixture;
                one image alone is a batch of one.
            timeout_s: For this call; the client's own if None.

        Returns:
            float32 (N, D), rows of length 1, in the order of the images. N = 0 gives (0, D).

        Raises:
            ImageError: an image cannot be used; carries its index.
            ServerError: the server cannot be started, reached or used; see `errors`.
            UnknownModelError: the server does not have the model.
            ContractError: it has another one than was asked for.
            ClientClosedError: the client was closed.
        """
        model, deadline = self._begin(timeout_s)
        return self._embed_images(model, images, deadline)

    def encode_texts(
        self, texts: tokenizer.Texts, *, truncate: bool = False, timeout_s: float | None = None
    ) -> NDArray[np.float32]:
        """Embed texts as they are, without a template.

        Args:
            texts: Strings; one string alone is a batch of one.
            truncate: Cut texts that are too long for the model instead of refusing them.
            timeout_s: For this call; the client's own if None.

        Returns:
            float32 (N, D), rows of length 1, in the order of the texts. N = 0 gives (0, D).

        Raises:
            TextTooLongError: a text has too many tokens; carries its index.
            TextError: a text cannot be used; carries its index.
            ServerError, UnknownModelError, ContractError, ClientClosedError: see `encode_images`.
        """
        model, deadline = self._begin(timeout_s)
        return self._embed_texts(model, texts, deadline, truncate=truncate)

    def class_embeddings(
        self,
        labels: Iterable[str],
        *,
        templates: str | Iterable[str] | None = None,
        timeout_s: float | None = None,
    ) -> NDArray[np.float32]:
        """Embed labels as classes; those seen before come from memory.

        Args:
            labels: Names of the classes.
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
        checked, found = _check_labels(labels), prompts.find_templates(templates)
        model, deadline = self._begin(timeout_s)
        return self._embed_classes(model, checked, found, deadline)

    def zero_shot(
        self,
        images: Images,
        labels: Iterable[str],
        *,
        templates: str | Iterable[str] | None = None,
        timeout_s: float | None = None,
    ) -> Scores:
        """Say which label fits each image best.

        Args:
            images: As for `encode_images`.
            labels: As for `class_embeddings`; at least one.
            templates: As for `class_embeddings`.
            timeout_s: For this call; the client's own if None.

        Returns:
            Probabilities and logits, (N, C) each, with the ranking of the labels.

        Raises:
            ImageError, TextError, TemplateError, InputError: an argument cannot be used.
            ServerError, UnknownModelError, ContractError, ClientClosedError: see `encode_images`.
        """
        checked, found = _check_labels(labels), prompts.find_templates(templates)
        if not checked:
            raise InputError("labels is empty; name at least one.")
        model, deadline = self._begin(timeout_s)
        manifest = model.manifest
        return zero_shot.classify(
            class_embeddings=self._embed_classes(model, checked, found, deadline),
            image_embeddings=self._embed_images(model, images, deadline),
            labels=checked,
            logit_scale=manifest.logit_scale,
            logit_bias=manifest.logit_bias,
        )

    def classify(self, images: Images, probe: Probe, *, timeout_s: float | None = None) -> Scores:
        """Score images with a linear classifier fitted on the embeddings of this model.

        Args:
            images: As for `encode_images`.
            probe: What `Probe.load` read, from `training.probe` or `training.few_shot`.
            timeout_s: For this call; the client's own if None.

        Returns:
            Probabilities and logits, (N, C) each, with the ranking of the probe's labels.

        Raises:
            ImageError: an image cannot be used; carries its index.
            ContractError: the probe was fitted on other weights than the server has.
            ServerError, UnknownModelError, ClientClosedError: see `encode_images`.
        """
        model, deadline = self._begin(timeout_s)
        served = model.manifest.fingerprint
        if probe.fingerprint != served:
            raise ContractError(
                f"the probe was fitted on embeddings of the weights {probe.fingerprint[:12]!r}, "
                f"and {model.manifest.model!r} has {served[:12]!r}. Fit it again on these, or name "
                "the model it belongs to with model=.",
                expected=probe.fingerprint,
                found=served,
            )
        return probe.classify(self._embed_images(model, images, deadline))

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
        self._cache = EmbeddingCache(self._cache_bytes)
        _clients.add(self)

    def _begin(self, timeout_s: float | None) -> tuple[Model, Deadline]:
        """Make sure of a connection to the right model, and start the clock."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        _check_timeout(timeout_s)
        with self._locked(timeout_s):
            if self._is_closed:
                raise ClientClosedError("the client is closed. Make a new one.")
            if self._connection is None or self._connection.is_lost():
                lost, self._connection = self._connection, self._dial()
                # Only now, or a server that came back would be given back and end.
                if lost is not None:
                    lost.close()
            deadline = Deadline.after(timeout_s)
            return self._connection.find_model(self._model, self._fingerprint, deadline), deadline

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
        if self._url is not None:
            return Connection.to_url(self._url)
        repository = self._repository
        if repository is None:
            if url := os.environ.get(URL_VARIABLE):
                return Connection.to_url(url)
            repository = Path(os.environ.get(REPOSITORY_VARIABLE) or CHECKOUT_REPOSITORY)
        return Connection.to_repository(repository, start_timeout_s=self._start_timeout_s)

    def _embed_images(
        self, model: Model, images: Images, deadline: Deadline
    ) -> NDArray[np.float32]:
        squares = prepare_each(images, side_px=model.manifest.side_px, exif=self._exif)
        batches = batching.stack(squares, max_rows=_count_rows(model.image))
        return self._embed(model, model.image, batches, deadline)

    def _embed_texts(
        self, model: Model, texts: tokenizer.Texts, deadline: Deadline, *, truncate: bool = False
    ) -> NDArray[np.float32]:
        manifest = model.manifest
        plan = batching.plan_texts(
            tokenizer.encode(texts, context_length=manifest.context_length, truncate=truncate),
            max_rows=_count_rows(model.text),
            buckets=manifest.text_buckets,
        )
        return self._embed(model, model.text, plan.batches, deadline)[plan.row_by_text]

    def _embed_classes(
        self,
        model: Model,
        labels: tuple[str, ...],
        templates: tuple[str, ...],
        deadline: Deadline,
    ) -> NDArray[np.float32]:
        manifest = model.manifest
        if not labels:
            return np.empty((0, manifest.embedding_dim), np.float32)
        # Two exports of the same weights need not give the same vectors.
        weights = f"{manifest.fingerprint}/{manifest.precision}/{manifest.activation}"
        words = tokenizer.fingerprint()
        key_by_label = {
            label: Key(weights, words, manifest.context_length, templates, label)
            for label in labels
        }
        vector_by_label = {}
        for label, key in key_by_label.items():
            if (vector := self._cache.get(key)) is not None:
                vector_by_label[label] = vector
        missing = [label for label in key_by_label if label not in vector_by_label]
        step = max(1, PROMPTS_AT_ONCE // len(templates))
        for start in range(0, len(missing), step):
            some = missing[start : start + step]
            texts = [prompts.fill(template, label) for label in some for template in templates]
            try:
                rows = self._embed_texts(model, texts, deadline)
            except TextError as error:
                raise _blame_label(error, some, len(templates), labels) from error
            pooled = zero_shot.pool(rows.reshape(len(some), len(templates), -1))
            for label, vector in zip(some, pooled, strict=True):
                vector_by_label[label] = vector
                self._cache.put(key_by_label[label], vector)
        return np.stack([vector_by_label[label] for label in labels])

    def _embed(
        self,
        model: Model,
        tower: ServedModel,
        batches: Iterable[NDArray[Any]],
        deadline: Deadline,
    ) -> NDArray[np.float32]:
        connection = self._connection
        stream = model.transport.stream(tower, batches, deadline, recheck=model.recheck)
        try:
            with contextlib.closing(stream):
                embeddings = batching.join(stream, dim=tower.embedding_dim)
        except (ServerError, ContractError):
            if connection is not None:
                connection.distrust()
            raise
        if connection is not None:
            connection.trust()
        return embeddings


_CONFIGURATION = (
    *("_url", "_model", "_repository", "_timeout_s", "_start_timeout_s", "_fingerprint", "_exif"),
    "_cache_bytes",
)
"""What a pickled client carries."""

_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _check_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the labels as a tuple, each a string that says something."""
    if isinstance(labels, (str, bytes)) or not isinstance(labels, Iterable):
        raise TextError(f"labels is a {type(labels).__name__}; pass a list of strings.")
    checked = tuple(labels)
    for index, label in enumerate(checked):
        prompts.fill(prompts.SLOT, label, index=index)
    return checked


def _blame_label(
    error: TextError, some: list[str], num_templates: int, labels: tuple[str, ...]
) -> TextError:
    """Turn the index of a prompt into the index of its label."""
    if error.index is None:
        return error
    index = labels.index(some[error.index // num_templates])
    message = f"label {index} makes a prompt that cannot be used: {error}"
    if isinstance(error, TextTooLongError):
        return TextTooLongError(
            message,
            index=index,
            num_tokens=error.num_tokens,
            context_length=error.context_length,
        )
    return TextError(message, index=index)


def _check_timeout(timeout_s: float, name: str = "timeout_s") -> None:
    if not timeout_s > 0:
        raise InputError(f"{name} is {timeout_s!r}; it must be above 0.")


def _count_rows(model: ServedModel) -> int:
    return min(model.max_batch_size, batching.MAX_ROWS)


def _after_fork_in_child() -> None:
    for client in _clients:
        # Another thread may have held it at the fork, and that thread does not exist here.
        client._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
