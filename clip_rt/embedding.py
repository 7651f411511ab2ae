"""Images, texts and labels in, embeddings out: what the calls of a client do with one model."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from clip_rt import telemetry
from clip_rt.cache.memory import Key, PromptCache
from clip_rt.classification import zero_shot
from clip_rt.deadline import Deadline
from clip_rt.errors import (
    ImageError,
    InferenceError,
    InputError,
    NonFiniteEmbeddingError,
    ServerError,
    ServerTimeoutError,
    TextError,
    TextTooLongError,
)
from clip_rt.inputs import prompts, tokenizer
from clip_rt.inputs.decoding import MAX_BYTES, MAX_PIXELS, Decode
from clip_rt.inputs.images import Images, count_threads, prepare_each
from clip_rt.inputs.items import OnError
from clip_rt.requests import batches as batching
from clip_rt.requests import dispatch
from clip_rt.requests.connection import Model
from clip_rt.requests.dynamic_batching import DynamicBatcher
from clip_rt.requests.results import Encoded, Gathering, number_parts
from clip_rt.served_tokenizer import load_tokenizer

Item = TypeVar("Item")

MIN_PROMPTS, MAX_PROMPTS = 64, 4096
CHUNK_S, MAX_LOST_SHARE = 0.5, 0.1
"""Class embeddings are made and kept in chunks of about that time, or of that share of what is left
of the call, and of that many prompts: a call that ends early loses little, and a long chunk has
more prompts of equal length."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are read: arguments of `inputs.images.prepare`."""

    exif: bool = True
    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES
    decode: Decode = "exact"


def embed_images(
    model: Model, deadline: Deadline, *, images: Images, on_error: OnError, options: ImageOptions
) -> Encoded:
    """Embed images, a batch at a time; see `Client.encode_images`."""
    batcher, gathering = model.image, Gathering()
    with contextlib.closing(_prepare(model, images, on_error, options)) as items:
        batches = gathering.batches(_until(deadline, items), lambda: batcher.max_rows)
        with contextlib.closing(
            dispatch.stream(model, batcher, batches, lambda: deadline)
        ) as answers:
            for answer in answers:
                gathering.add_answer(answer, on_error)
    return _finish(gathering, batcher, "images")


def stream_images(
    model: Model, images: Images, on_error: OnError, options: ImageOptions, timeout_s: float
) -> Iterator[Encoded]:
    """Embed images in parts, each with a deadline of its own; see `Client.stream_images`."""
    batcher = model.image
    parts: list[Gathering] = []

    def batches(
        items: Iterator[NDArray[np.uint8] | InputError],
    ) -> Iterator[NDArray[Any] | None]:
        for part, batch in number_parts(items, lambda: batcher.max_rows):
            parts.append(part)
            yield batch

    with (
        contextlib.closing(_prepare(model, images, on_error, options)) as items,
        contextlib.closing(
            dispatch.stream(model, batcher, batches(items), lambda: Deadline.after(timeout_s))
        ) as answers,
    ):
        for answer in answers:
            part = parts.pop(0)
            part.add_answer(answer, on_error)
            yield _finish(part, batcher, "images")


def embed_texts(
    model: Model,
    deadline: Deadline,
    *,
    texts: tokenizer.Texts,
    on_error: OnError,
    truncate: bool,
) -> Encoded:
    """Embed texts as they are; see `Client.encode_texts`."""
    gathering, batches = _lay_out(model, texts, deadline, on_error, truncate=truncate)
    with contextlib.closing(
        dispatch.stream(model, model.text, batches, lambda: deadline)
    ) as answers:
        for answer in answers:
            gathering.add_answer(answer, on_error)
    return _finish(gathering, model.text, "texts")


def embed_classes(
    model: Model,
    deadline: Deadline,
    *,
    labels: tuple[str, ...],
    templates: tuple[str, ...],
    cache: PromptCache,
) -> NDArray[np.float32]:
    """Embed labels as classes, what is cached from there; see `Client.class_embeddings`."""
    manifest = model.manifest
    # Two exports of the same weights need not give the same vectors.
    weights = f"{manifest.fingerprint}/{manifest.precision}/{manifest.activation}"
    words = load_tokenizer(model, deadline).fingerprint()
    keys = [Key(weights, words, manifest.context_length, templates, each) for each in labels]

    def make(positions: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        return _make_classes(model, labels, positions, templates, deadline)

    return cache.get_or_make(keys, make, dim=manifest.embedding_dim, deadline=deadline)


def _prepare(
    model: Model, images: Images, on_error: OnError, options: ImageOptions
) -> Generator[NDArray[np.uint8] | ImageError, None, None]:
    return prepare_each(
        images,
        side_px=model.manifest.side_px,
        resizing=model.manifest.resizing,
        num_threads=count_threads(),
        on_error=on_error,
        **vars(options),
    )


def _finish(gathering: Gathering, batcher: DynamicBatcher, what: str) -> Encoded:
    """Return what came of all items, and count them."""
    encoded = gathering.finish(batcher.tower.embedding_dim)
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
    encode_text = load_tokenizer(model, deadline).encode_text
    source = tokenizer.iterate(texts)
    with telemetry.stage("tokenize", len(source) if isinstance(source, Sized) else 1):
        for index, text in enumerate(_until(deadline, source)):
            try:
                ids = encode_text(text, index=index, truncate=truncate)
            except TextError as error:
                if on_error == "raise":
                    raise
                gathering.add_failure(error)
            else:
                gathering.row_by_item.append(len(token_ids))
                token_ids.append(ids)
    with telemetry.stage("prepare", len(token_ids)):
        plan = batching.plan_texts(
            token_ids,
            max_rows=model.text.max_rows,
            buckets=manifest.text_buckets,
            pad_id=manifest.tokenization.pad_id,
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
            chunk_s = min(CHUNK_S, MAX_LOST_SHARE * deadline.remaining_s())
            is_quick = time.monotonic() - begun_s < chunk_s
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
