"""What is asked for, as people write it; one vector out."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import InputError, ModelReplacedError
from clip_rt.specs import MIN_NORM

if TYPE_CHECKING:
    from clip_rt.client import Client
    from clip_rt.wire.manifest import Manifest

MINUS_WEIGHT = 0.5
"""Of what is not wanted, against 1 of what is. At 1 the two cancel what all texts have in common,
and with it most of what tells that an image is about the wanted at all."""

_TERM = re.compile(r'(?:^|(?<=\s))(-)?(?:"([^"]*)"|(\\?-?[^\s"]\S*))')
ImagePath = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Query:
    """Texts and images that are wanted, and such that are not.

    Raises:
        InputError: nothing is wanted.
    """

    texts: tuple[str, ...] = ()
    images: tuple[ImagePath, ...] = ()
    """Paths."""
    minus_texts: tuple[str, ...] = ()
    minus_images: tuple[ImagePath, ...] = ()

    def __post_init__(self) -> None:
        if not self.texts and not self.images:
            raise InputError(
                "a search needs a text or an image that is wanted; what is not wanted comes on top."
            )

    @classmethod
    def parse(cls, words: str) -> Query:
        r"""Read what people write: `red car -night`, `beach -"old people"`.

        A word that begins with a minus is not wanted, nor is what is quoted after one. All other
        words are one text. A minus within a word is part of it, and so is one after a backslash at
        its begin: `\-20 degrees`.

        Raises:
            InputError: nothing is wanted.
        """
        wanted, unwanted = split_words(words)
        if not wanted:
            raise InputError(
                f"{words[:80]!r} names nothing that is wanted; add a word without a minus, or "
                r"write a minus that is meant as such as \-."
            )
        return cls(texts=(wanted,), minus_texts=unwanted)

    def embed(self, client: Client) -> tuple[NDArray[np.float32], Manifest]:
        """Return the vector to search with, see `combine`, and the model it is of.

        Raises:
            InputError: they cancel each other out, or a text or image cannot be used.
            ServerError, ContractError: see `Client.encode_images`.
        """
        manifest = client.manifest
        texts, images = [*self.texts, *self.minus_texts], [*self.images, *self.minus_images]
        parts = []
        if texts:
            rows = client.encode_texts(texts)
            parts += [rows[: len(self.texts)], rows[len(self.texts) :]]
        if images:
            rows = client.encode_images(images)
            parts += [rows[: len(self.images)], rows[len(self.images) :]]
        if client.manifest != manifest:
            raise ModelReplacedError(
                "the model was replaced while the query was embedded. Ask again.",
                expected=manifest,
                found=client.manifest,
            )
        return combine(np.concatenate(parts[::2]), np.concatenate(parts[1::2])), manifest


def combine(wanted: NDArray[np.float32], unwanted: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the vector to search with, float32 (D,) of length 1.

    The mean of what is wanted, less `MINUS_WEIGHT` times the mean of what is not.

    Args:
        wanted: float32 (N, D), N from 1.
        unwanted: float32 (M, D), M from 0.

    Raises:
        InputError: they cancel each other out.
    """
    vector = wanted.mean(axis=0)
    if len(unwanted):
        vector = vector - MINUS_WEIGHT * unwanted.mean(axis=0)
    norm = float(np.linalg.norm(vector))
    if norm <= MIN_NORM:
        raise InputError("what is wanted and what is not cancel each other out.")
    return np.asarray(vector / norm, np.float32)


def split_words(words: str) -> tuple[str, tuple[str, ...]]:
    """Return the text that is wanted, and those that are not; see `Query.parse`."""
    wanted, unwanted = [], []
    for minus, quoted, word in _TERM.findall(words):
        term = quoted if quoted or not word else word
        if minus:
            unwanted.append(term)
        elif not quoted and word.startswith("-") and len(word) > 1:
            unwanted.append(word[1:])
        else:
            wanted.append(word[1:] if word.startswith("\\-") else term)
    return " ".join(filter(None, wanted)), tuple(filter(None, unwanted))


def join(queries: Sequence[Query]) -> Query:
    """Return one query of all that several want, and do not want."""
    return Query(
        texts=tuple(each for query in queries for each in query.texts),
        images=tuple(each for query in queries for each in query.images),
        minus_texts=tuple(each for query in queries for each in query.minus_texts),
        minus_images=tuple(each for query in queries for each in query.minus_images),
    )
