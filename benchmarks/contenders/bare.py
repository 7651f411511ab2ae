"""Both towers as functions, driven as a user without a server would: what the runtimes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import clip_rt
from benchmarks.contenders.implementation import (
    Implementation,
    count_cores,
    prompts_of,
    zero_shot_prompts,
)
from benchmarks.contenders.kit import MAX_BATCH_SIZE, Kit
from benchmarks.findings import CallKind
from clip_rt.classification import zero_shot
from clip_rt.specs import END_OF_TEXT

Encode: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float32]]
"""uint8 (N, S, S, 3) or int32 (N, L) in, float32 (N, D) of length 1 out."""


class Bare(Implementation):
    """The towers in an engine that is called directly.

    Args:
        kit: Whose model it is.
        encode_pixels: The image tower.
        encode_tokens: The text tower.
        versions: Of what runs them.
    """

    def __init__(
        self, kit: Kit, encode_pixels: Encode, encode_tokens: Encode, versions: dict[str, str]
    ) -> None:
        self._kit = kit
        self._encode_pixels = encode_pixels
        self._encode_tokens = encode_tokens
        self.versions = versions

    def prepare(self, call: CallKind, items: Any) -> Any:
        """Embed the labels of "zero_shot"; for all others there is nothing to prepare."""
        if call == "zero_shot":
            jpegs, labels = items
            return jpegs, labels, self._encode_texts(zero_shot_prompts(labels))
        return np.ascontiguousarray(items) if call == "pixels" else items

    def run(self, call: CallKind, prepared: Any) -> NDArray[np.float32]:
        """Embed; batches of at most what the server would make of them."""
        if call == "pixels":
            return self._in_batches(self._encode_pixels, prepared)
        if call == "jpegs":
            return self._encode_jpegs(prepared)
        if call == "texts":
            return self._encode_texts(prepared)
        if call == "classifier":
            rows = self._encode_texts(prompts_of(prepared))
            return zero_shot.pool(rows.reshape(len(prepared), -1, rows.shape[1]))
        jpegs, labels, class_CE = prepared
        return zero_shot.classify(
            image_embeddings=self._encode_jpegs(jpegs),
            class_embeddings=class_CE,
            labels=labels,
            logit_scale=self._kit.logit_scale,
            logit_bias=self._kit.logit_bias,
        ).probabilities

    def _encode_jpegs(self, jpegs: list[bytes]) -> NDArray[np.float32]:
        side_px = self._kit.spec.side_px
        pixels = clip_rt.preprocess(jpegs, side_px=side_px, num_threads=count_cores())
        return self._in_batches(self._encode_pixels, pixels)

    def _encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        tokens = clip_rt.tokenize(texts, context_length=self._kit.spec.text.context_length)

        def encode(batch: NDArray[Any]) -> NDArray[np.float32]:
            # Nothing after the last end of a text reaches its embedding.
            ends = (batch == END_OF_TEXT).argmax(axis=1)
            return self._encode_tokens(np.ascontiguousarray(batch[:, : ends.max() + 1]))

        return self._in_batches(encode, tokens)

    @staticmethod
    def _in_batches(encode: Encode, rows: NDArray[Any]) -> NDArray[np.float32]:
        starts = range(0, len(rows), MAX_BATCH_SIZE)
        # A copy: some engines write the next answer into the same memory.
        parts = [encode(rows[start : start + MAX_BATCH_SIZE]).copy() for start in starts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
