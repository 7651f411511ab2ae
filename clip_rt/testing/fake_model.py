"""Embeddings without a model: equal content in, equal directions out, or what a test chooses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clip_rt import specs
from clip_rt.inputs import tokenizer
from clip_rt.wire.manifest import Manifest

EmbedImage = Callable[[NDArray[np.uint8]], ArrayLike]
"""uint8 (S, S, 3) in, D numbers out; they are normalised afterwards."""
EmbedText = Callable[[str], ArrayLike]
"""A text in, as the tokens spell it: lower case, words and marks apart by one space; D numbers out,
which are normalised afterwards."""

_SPACE = "\u0120"
"""What stands for a space among the visible characters that stand for bytes (see `tokenizer`)."""


class FakeModel:
    """Both towers; the arguments are those of `FakeServer`."""

    def __init__(self, embed_image: EmbedImage | None, embed_text: EmbedText | None) -> None:
        self._embed_image = embed_image
        self._embed_text = embed_text
        self._ids_by_square: dict[bytes, tuple[int, ...]] = {}

    def teach(self, square: NDArray[np.uint8], ids: list[int]) -> None:
        """Give an image, uint8 (S, S, 3), the embedding of a text."""
        self._ids_by_square[hash_bytes(square.tobytes())] = tuple(ids)

    def embed(
        self, tower: specs.Tower, array: NDArray[Any], manifest: Manifest
    ) -> NDArray[np.float32]:
        """Return float32 (N, D), rows of length 1, for a batch as a server reads it."""
        embed = self._embed_square if tower == "image" else self._embed_tokens
        rows = [np.asarray(embed(row, manifest), dtype=np.float64) for row in array]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)

    def _embed_square(self, square: NDArray[np.uint8], manifest: Manifest) -> ArrayLike:
        digest = hash_bytes(square.tobytes())
        if (ids := self._ids_by_square.get(digest)) is not None:
            return self._embed_ids(ids, manifest)
        if self._embed_image is not None:
            return self._embed_image(square)
        return _draw(b"image", digest, manifest)

    def _embed_tokens(self, tokens: NDArray[np.int32], manifest: Manifest) -> ArrayLike:
        # Padding must not be felt: the text ends at the first end-of-text token.
        (ends,) = np.nonzero(tokens == specs.END_OF_TEXT)
        ids = tuple(tokens[: ends[0] + 1 if len(ends) else None].tolist())
        return self._embed_ids(ids, manifest)

    def _embed_ids(self, ids: tuple[int, ...], manifest: Manifest) -> ArrayLike:
        if self._embed_text is not None:
            return self._embed_text(_spell(ids))
        return _draw(b"text", repr(ids).encode(), manifest)


def hash_bytes(content: bytes) -> bytes:
    """Return the SHA-256."""
    return hashlib.sha256(content).digest()


def _draw(tower: bytes, content: bytes, manifest: Manifest) -> NDArray[np.float64]:
    """Draw D numbers that depend on content and weights only."""
    seed = hash_bytes(b"/".join((manifest.fingerprint.encode(), tower, content)))
    generator = np.random.default_rng(int.from_bytes(seed, "big"))
    return generator.normal(size=manifest.embedding_dim)


def _spell(ids: tuple[int, ...]) -> str:
    """Turn ids back into words, without the start and the end of the text."""
    from tokenizers.decoders import ByteLevel

    vocabulary = tokenizer._load()
    symbols = [
        (vocabulary.id_to_token(each) or "").replace("</w>", _SPACE)
        for each in ids
        if each not in (specs.START_OF_TEXT, specs.END_OF_TEXT)
    ]
    return str(ByteLevel().decode(symbols)).strip()
