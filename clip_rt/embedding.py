"""Images, texts and labels in, embeddings out: what the calls of a client do with one model."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
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
from clip_rt.inputs.items import OnError, check_whole_number
from clip_rt.requests import batches as batching
from clip_rt.requests import dispatch
from clip_rt.requests.connection import Model
from clip_rt.requests.dynamic_batching import DynamicBatcher
from clip_rt.requests.hidden import find_hidden
from clip_rt.requests.results import Encoded, Gathering, HiddenStates, number_parts
from clip_rt.served_tokenizer import load_tokenizer
from clip_rt.specs import MIN_NORM, HiddenLayer
from clip_rt.wire.manifest import Manifest

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

    def __post_init__(self) -> None:
        """Refuse what nobody can do.

        Raises:
            InputError: names the option.
        """
        check_decode(self.decode)
        check_limits(max_pixels=self.max_pixels, max_bytes=self.max_bytes)
        if not isinstance(self.exif, bool):
            raise InputError(f"exif is {self.exif!r:.40}; it must be True or False.")


def find_dimensions(manifest: Manifest, asked: int | None) -> int:
    """Return how many numbers of each embedding are kept; None asks for all.

    Raises:
        InputError: the model was not trained to be cut so.
    """
    allowed = (*manifest.matryoshka_dimensions, manifest.embedding_dim)
    if asked is None:
        return manifest.embedding_dim
    if (kept := check_whole_number(asked, "dimensions")) in allowed:
        return kept
    way_out = (
        "pass one of these."
        if manifest.matryoshka_dimensions
        else "its manifest names no others that it was trained for; if it was, export it with "
        "python -m export.onnx --matryoshka-dimensions."
    )
    raise InputError(
        f"dimensions is {kept}; embeddings of {manifest.model!r} have "
        f"{' or '.join(map(str, allowed))}: {way_out}"
    )


def embed_images(
    model: Model,
    deadline: Deadline,
    *,
    images: Images,
    on_error: OnError,
    options: ImageOptions,
    dimensions: int | None = None,
) -> Encoded:
    """Embed images, a batch at a time; see `Client.encode_images`."""
    kept = find_dimensions(model.manifest, dimensions)
    batcher, gathering = model.image, Gathering()
    with contextlib.closing(_prepare(model, images, on_error, options)) as items:
        batches = gathering.batches(_until(deadline, items), lambda: batcher.max_rows)
        with contextlib.closing(
            dispatch.stream(model, batcher, batches, lambda: deadline)
        ) as answers:
            for answer in answers:
                gathering.add_answer(answer, on_error)
    return _finish(gathering, batcher, "images", kept)


def stream_images(
    model: Model,
    images: Images,
    on_error: OnError,
    options: ImageOptions,
    timeout_s: float,
    dimensions: int | None,
) -> Iterator[Encoded]:
    """Embed images in parts, each with a deadline of its own; see `Client.stream_images`."""
    num_done = 0
    try:
        for encoded in _stream_parts(model, images, on_error, options, timeout_s, dimensions):
            yield encoded
            num_done += len(encoded.indices) + len(encoded.failures)
    except ModelReplacedError as error:
        raise ModelReplacedError(
            f"{error} The {num_done} images before were embedded with the old weights, those from "
            f"image {num_done} on were not; do not mix them: begin the stream anew.",
            expected=error.expected,
            found=error.found,
        ) from error


def _stream_parts(
    model: Model,
    images: Images,
    on_error: OnError,
    options: ImageOptions,
    timeout_s: float,
    dimensions: int | None,
) -> Iterator[Encoded]:
    kept = find_dimensions(model.manifest, dimensions)
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
            yield _finish(part, batcher, "images", kept)


def embed_texts(
    model: Model,
    deadline: Deadline,
    *,
    texts: tokenizer.Texts,
    on_error: OnError,
    truncate: bool,
    dimensions: int | None = None,
) -> Encoded:
    """Embed texts as they are; see `Client.encode_texts`."""
    kept = find_dimensions(model.manifest, dimensions)
    gathering, batches = _lay_out(model, texts, deadline, on_error, truncate=truncate)
    with contextlib.closing(
        dispatch.stream(model, model.text, batches, lambda: deadline)
    ) as answers:
        for answer in answers:
            gathering.add_answer(answer, on_error)
    return _finish(gathering, model.text, "texts", kept)


def embed_hidden(
    model: Model,
    deadline: Deadline,
    *,
    texts: tokenizer.Texts,
    layer: HiddenLayer,
    pad_id: int | None,
    on_error: OnError,
    truncate: bool,
) -> HiddenStates:
    """Return the hidden states of texts; see `Client.encode_text_hidden`."""
    manifest, tokenization = model.manifest, model.manifest.tokenization
    filling = tokenization.pad_id if pad_id is None else pad_id
    if type(filling) is not int or not 0 <= filling < tokenization.vocab_size:
        raise InputError(
            f"pad_id is {filling!r:.40}; {manifest.model!r} knows the ids 0 to "
            f"{tokenization.vocab_size - 1}."
        )
    # First: texts need not be read where there are none.
    batcher = find_hidden(model, layer, deadline)
    gathering, token_ids = _tokenize(
        model, texts, deadline, on_error, truncate=truncate, may_be_empty=True
    )
    lengths = [len(token_ids[row]) if row >= 0 else 0 for row in gathering.row_by_item]
    # The positions that fill a text up are read too, and all texts are as long as the context.
    buckets = (manifest.context_length,)
    batches = _plan(gathering, token_ids, batcher.max_rows, buckets, filling)
    with contextlib.closing(dispatch.stream(model, batcher, batches, lambda: deadline)) as answers:
        for answer in answers:
            gathering.add_answer(answer, on_error)
    encoded = gathering.finish(batcher.tower.row_size)
    telemetry.count("texts", len(encoded.indices))
    telemetry.count("failures", len(encoded.failures))
    ((_, shape), _) = batcher.tower.hidden
    states, text_embeds = (
        np.ascontiguousarray(part)
        for part in np.split(encoded.embeddings, [math.prod(shape)], axis=1)
    )
    text_lengths = np.asarray(lengths, np.intp)[encoded.indices]
    return HiddenStates(
        hidden_states=states.reshape(len(states), *shape),
        attention_mask=np.arange(manifest.context_length) < text_lengths[:, None],
        text_embeds=text_embeds,
        indices=encoded.indices,
        failures=encoded.failures,
    )


def embed_classes(
    model: Model,
    deadline: Deadline,
    *,
    labels: tuple[str, ...],
    templates: tuple[str, ...],
    cache: PromptCache,
    dimensions: int | None = None,
) -> NDArray[np.float32]:
    """Embed labels as classes, what is cached from there; see `Client.class_embeddings`."""
    manifest = model.manifest
    kept = find_dimensions(manifest, dimensions)
    # Two exports of the same weights need not give the same vectors.
    weights = f"{manifest.fingerprint}/{manifest.precision}/{manifest.activation}"
    if kept < manifest.embedding_dim:
        weights += f"/{kept}"
    words = load_tokenizer(model, deadline).fingerprint()
    keys = [Key(weights, words, manifest.context_length, templates, each) for each in labels]

    def make(positions: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        return _make_classes(model, labels, positions, templates, deadline, kept)

    return cache.get_or_make(keys, make, dim=kept, deadline=deadline)


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


def _finish(gathering: Gathering, batcher: DynamicBatcher, what: str, kept: int) -> Encoded:
    """Return what came of all items, cut to that many numbers, and count them."""
    encoded = gathering.finish(batcher.tower.embedding_dim)
    if kept < batcher.tower.embedding_dim:
        encoded = replace(encoded, embeddings=_cut(encoded, kept))
    telemetry.count(what, len(encoded.indices))
    telemetry.count("failures", len(encoded.failures))
    return encoded


def _cut(encoded: Encoded, kept: int) -> NDArray[np.float32]:
    """Return the first numbers of each embedding as one of length 1.

    Raises:
        NonFiniteEmbeddingError: they are all 0; carries the index.
    """
    rows = encoded.embeddings[:, :kept]
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if (norms <= MIN_NORM).any():
        index = int(encoded.indices[int(norms.argmin())])
        raise NonFiniteEmbeddingError(
            f"the first {kept} numbers of embedding {index} are 0, and have no direction. Leave "
            "dimensions= out.",
            index=index,
        )
    cut: NDArray[np.float32] = rows / norms
    return cut


def _lay_out(
    model: Model,
    texts: tokenizer.Texts,
    deadline: Deadline,
    on_error: OnError = "raise",
    *,
    truncate: bool = False,
) -> tuple[Gathering, tuple[NDArray[np.int32], ...]]:
    """Return the batches to send for texts, and what will gather their answers."""
    manifest = model.manifest
    gathering, token_ids = _tokenize(model, texts, deadline, on_error, truncate=truncate)
    pad_id = manifest.tokenization.pad_id
    return gathering, _plan(
        gathering, token_ids, model.text.max_rows, manifest.text_buckets, pad_id
    )


def _tokenize(
    model: Model,
    texts: tokenizer.Texts,
    deadline: Deadline,
    on_error: OnError,
    *,
    truncate: bool,
    may_be_empty: bool = False,
) -> tuple[Gathering, list[list[int]]]:
    """Return the ids of the texts that can be used, and what will gather their answers."""
    gathering = Gathering()
    token_ids: list[list[int]] = []
    encode_text = load_tokenizer(model, deadline).encode_text
    source = tokenizer.iterate(texts)
    with telemetry.stage("tokenize", len(source) if isinstance(source, Sized) else 1):
        for index, text in enumerate(_until(deadline, source)):
            try:
                ids = encode_text(text, index=index, truncate=truncate, may_be_empty=may_be_empty)
            except TextError as error:
                if on_error == "raise":
                    raise
                gathering.add_failure(error)
            else:
                gathering.row_by_item.append(len(token_ids))
                token_ids.append(ids)
    telemetry.count("tokens", sum(map(len, token_ids)))
    return gathering, token_ids


def _plan(
    gathering: Gathering,
    token_ids: Sequence[Sequence[int]],
    max_rows: int,
    buckets: Sequence[int],
    pad_id: int,
) -> tuple[NDArray[np.int32], ...]:
    """Return the batches to send for ids, and have their answers gathered in that order."""
    with telemetry.stage("prepare", len(token_ids)):
        plan = batching.plan_texts(token_ids, max_rows=max_rows, buckets=buckets, pad_id=pad_id)
        gathering.row_by_item = [
            int(plan.row_by_text[row]) if row >= 0 else -1 for row in gathering.row_by_item
        ]
    return plan.batches


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
    kept: int,
) -> Iterator[NDArray[np.float32]]:
    """Yield the class embedding, (kept,), of each label at `positions`, in order, as they come.

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
            try:
                rows = _finish(chunk.gathering, model.text, "texts", kept).embeddings
            except NonFiniteEmbeddingError as error:
                position = chunk.positions[error.index // len(templates)]
                raise NonFiniteEmbeddingError(str(error), index=position) from error
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
