"""Embeddings of the same images and texts by A and B in; what changes, in figures and words, out.

Everything here is arrays and manifests; nothing is served or read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import InputError
from clip_rt.wire.manifest import Manifest
from export.samples import NO_TEXT

FloatArray: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int64]
Word = Literal["interchangeable", "mixable", "not mixable"]

NUM_NEIGHBOURS = 10
MIN_IMAGES = NUM_NEIGHBOURS + 2
"""With fewer, the ten nearest of an image are all the others, in any space."""
MIN_KEPT_INTERCHANGEABLE = 0.95
"""Approximate indices are run at a recall of about 0.95 at 10: a smaller loss is within theirs."""
MIN_KEPT_MIXABLE = 0.8
"""Below, more than two of ten answers are others than a whole index would give, and a page of
results is visibly not what it was."""
TIE = 1e-6
"""Similarities this close are equal but for rounding: those of two copies of an image, say."""
FEW_IMAGES = 100
"""Below, one image is more than a point, and ten of the others are neighbours by chance anyway."""

_ROWS = 1024
"""Queries whose similarities are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Cosines:
    """Of the vectors that A and B give the same inputs."""

    min: float
    p01: float
    """First percentile."""
    mean: float


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Images for which another text is the best than before."""

    share: float
    right_to_wrong: int
    """Counted where the right text is known, as is the next."""
    wrong_to_right: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What B changes on one sample of N images and M texts.

    None stands where vectors of A and B have different lengths, where there are no two texts to
    choose between, and of top-1 where no right text is known.
    """

    name: str
    num_images: int
    num_texts: int
    num_labelled: int
    image_cosine: Cosines | None
    text_cosine: Cosines | None
    chance_overlap: float
    """Overlap of A's space with one that has nothing in common with it."""
    own_overlap: float
    """Share of the ten nearest others of an image in A's space that are so in B's."""
    query_overlap: float | None
    """The same for B's vector of the image among A's vectors: the index as it is."""
    shared_overlap: float | None
    """The same among A's vectors of one half of the images and B's of the other."""
    top1_a: float | None
    top1_b: float | None
    top1_mixed: float | None
    """Of A's image vectors with B's text vectors: the index as it is, searched by text."""
    flips: Flips | None
    """From A to B."""
    mixed_flips: Flips | None
    """From B to A's images with B's texts: what is lost by not embedding the images again."""

    def kept(self) -> dict[str, float]:
        """Return what is kept in one index, 1 is all and 0 no more than chance, by measure.

        Overlaps are corrected for chance as Cohen's kappa is: (found - chance) / (1 - chance).
        """
        found: dict[str, float] = {}
        for title, overlap in (
            ("neighbours of B's images in A's index", self.query_overlap),
            ("neighbours of B's images in an index of both", self.shared_overlap),
        ):
            if overlap is not None:
                room = 1 - self.chance_overlap
                # Without room every vector of A is the same, and nothing can be found by it.
                found[title] = (overlap - self.chance_overlap) / room if room > 0 else 0.0
        if self.mixed_flips is not None:
            found["choices of B's texts for A's images"] = 1 - self.mixed_flips.share
        return found


def measure(
    name: str,
    *,
    image_a_NE: FloatArray,
    text_a_ME: FloatArray,
    image_b_NF: FloatArray,
    text_b_MF: FloatArray,
    right_N: IntArray,
) -> Comparison:
    """Compare the embeddings of the same images and texts by A and B.

    Args:
        name: Of the sample.
        image_a_NE: A's image vectors, float32, rows of length 1.
        text_a_ME: A's text vectors; M may be 0.
        image_b_NF: B's image vectors; F need not be E.
        text_b_MF: B's text vectors.
        right_N: Which text belongs to an image; `NO_TEXT` where none does.

    Raises:
        InputError: there are fewer than `MIN_IMAGES` images.
    """
    num_images, num_texts = len(image_a_NE), len(text_a_ME)
    if num_images < MIN_IMAGES:
        raise InputError(
            f"{name} has {num_images} images; comparing the {NUM_NEIGHBOURS} nearest of each needs "
            f"at least {MIN_IMAGES}, and {FEW_IMAGES} to say much."
        )
    limit_a_N, chance_overlap = find_limits(image_a_NE)

    def kept(query_NE: FloatArray, index_NE: FloatArray) -> float:
        """Return the share of neighbours found elsewhere that are neighbours in A's space."""
        near_NK = find_neighbours(query_NE, index_NE)
        return overlap(image_a_NE, limit_a_N, near_NK)

    query_overlap, shared_overlap = None, None
    image_cosine, text_cosine = None, None
    if same_space := image_a_NE.shape[1] == image_b_NF.shape[1]:
        both_NE = image_a_NE.copy()
        both_NE[1::2] = image_b_NF[1::2]
        query_overlap = kept(image_b_NF, image_a_NE)
        shared_overlap = kept(image_b_NF, both_NE)
        image_cosine = _cosines(image_a_NE, image_b_NF)
        text_cosine = _cosines(text_a_ME, text_b_MF) if num_texts else None
    top1: dict[str, float] = {}
    flips, mixed_flips = None, None
    known_N = right_N != NO_TEXT
    if num_texts > 1:
        choice = {"a": _choose_texts(image_a_NE, text_a_ME)}
        choice["b"] = _choose_texts(image_b_NF, text_b_MF)
        flips = count_flips(choice["a"], choice["b"], right_N)
        if same_space:
            choice["mixed"] = _choose_texts(image_a_NE, text_b_MF)
            mixed_flips = count_flips(choice["b"], choice["mixed"], right_N)
        if known_N.any():
            top1 = {key: float((c == right_N)[known_N].mean()) for key, c in choice.items()}
    return Comparison(
        name=name,
        num_images=num_images,
        num_texts=num_texts,
        num_labelled=int(known_N.sum()),
        image_cosine=image_cosine,
        text_cosine=text_cosine,
        chance_overlap=chance_overlap,
        own_overlap=kept(image_b_NF, image_b_NF),
        query_overlap=query_overlap,
        shared_overlap=shared_overlap,
        top1_a=top1.get("a"),
        top1_b=top1.get("b"),
        top1_mixed=top1.get("mixed"),
        flips=flips,
        mixed_flips=mixed_flips,
    )


def find_neighbours(query_NE: FloatArray, index_NE: FloatArray) -> IntArray:
    """Return the ten most similar rows of an index for each query, int64 (N, 10), best first.

    Query i is of the same image as row i, which is left out.
    """
    blocks = _similarities(query_NE, index_NE)
    # Stable, so that copies of an image are in the same order in every space.
    orders = (np.argsort(-block_QN, axis=1, kind="stable") for block_QN in blocks)
    return np.concatenate([order_QN[:, :NUM_NEIGHBOURS] for order_QN in orders])


def find_limits(space_NE: FloatArray) -> tuple[FloatArray, float]:
    """Return how similar the tenth nearest of each row is, float32 (N,), and the chance overlap.

    That is the share of the other rows which are as near as that: 10 of N - 1, and more where
    there are copies.
    """
    limits, shares = [], []
    for block_QN in _similarities(space_NE, space_NE):
        limit_Q = -np.partition(-block_QN, NUM_NEIGHBOURS - 1, axis=1)[:, NUM_NEIGHBOURS - 1]
        limits.append(limit_Q)
        num_near_Q = (block_QN >= limit_Q[:, None] - TIE).sum(axis=1)
        shares.append(num_near_Q / (len(space_NE) - 1))
    return np.concatenate(limits), float(np.concatenate(shares).mean())


def overlap(space_NE: FloatArray, limit_N: FloatArray, near_NK: IntArray) -> float:
    """Return the mean share of K rows found for each row that are among its ten nearest.

    As near as the tenth is near enough, so that it does not matter which of two copies is found.
    Source: erikbern/ann-benchmarks `ann_benchmarks/plotting/metrics.py`.
    """
    shares = []
    for start in range(0, len(near_NK), _ROWS):
        rows = slice(start, start + _ROWS)
        similarity_QK = np.einsum("qe,qke->qk", space_NE[rows], space_NE[near_NK[rows]])
        shares.append((similarity_QK >= limit_N[rows, None] - TIE).mean(axis=1))
    return float(np.concatenate(shares).mean())


def _similarities(query_NE: FloatArray, index_NE: FloatArray) -> Iterator[FloatArray]:
    """Yield the cosines of some queries at a time, float32 (Q, N); with their own row -inf."""
    for start in range(0, len(query_NE), _ROWS):
        block_QN = query_NE[start : start + _ROWS] @ index_NE.T
        rows = np.arange(len(block_QN))
        block_QN[rows, start + rows] = -np.inf
        yield block_QN


def count_flips(before_N: IntArray, after_N: IntArray, right_N: IntArray) -> Flips:
    """Count the choices of a text that differ, and which of them were or are right."""
    known_N = right_N != NO_TEXT
    was_N, is_N = known_N & (before_N == right_N), known_N & (after_N == right_N)
    return Flips(
        share=float((before_N != after_N).mean()),
        right_to_wrong=int((was_N & ~is_N).sum()),
        wrong_to_right=int((is_N & ~was_N).sum()),
    )


def _choose_texts(image_NE: FloatArray, text_ME: FloatArray) -> IntArray:
    return np.argmax(image_NE @ text_ME.T, axis=1).astype(np.int64)


def _cosines(one_NE: FloatArray, other_NE: FloatArray) -> Cosines:
    cosine_N = (one_NE.astype(np.float64) * other_NE).sum(axis=1)
    return Cosines(
        min=float(cosine_N.min()),
        p01=float(np.percentile(cosine_N, 1)),
        mean=float(cosine_N.mean()),
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the embeddings of A and B may be in one index."""

    word: Word
    kept: float | None
    """Of what an index of one kind would find, by the worst measure; None where none applies."""
    why: str
    weak: tuple[str, ...]
    """What makes the verdict less sure than it sounds."""

    def sentence(self) -> str:
        """Return it in words."""
        advice = {
            "interchangeable": "interchangeable",
            "mixable": f"mixable with a loss of {1 - (self.kept or 0):.1%}",
            "not mixable": "not mixable, embed the index again",
        }
        return f"{advice[self.word]}: {self.why}"


def judge(
    a: Manifest, b: Manifest, comparisons: Sequence[Comparison], *, weak: Sequence[str] = ()
) -> Verdict:
    """Decide by the worst measure of the worst sample.

    Args:
        a: What the index was made with.
        b: What is to come.
        comparisons: At least one.
        weak: Why the samples do not say much, besides how few they are.
    """
    weak = (
        *weak,
        *(
            f"{each.name} has {each.num_images} images, fewer than {FEW_IMAGES}"
            for each in comparisons
            if each.num_images < FEW_IMAGES
        ),
    )
    if a.embedding_dim != b.embedding_dim:
        why = f"A's vectors have {a.embedding_dim} dimensions and B's {b.embedding_dim}"
        return Verdict(word="not mixable", kept=None, why=why, weak=weak)
    kept, what, where = min(
        (kept, what, each.name) for each in comparisons for what, kept in each.kept().items()
    )
    same = a.fingerprint == b.fingerprint
    word: Word = "mixable"
    if kept < MIN_KEPT_MIXABLE:
        word = "not mixable"
    elif same and kept >= MIN_KEPT_INTERCHANGEABLE:
        word = "interchangeable"
    why = (
        f"{'the same' if same else 'other'} weights; the worst is {max(kept, 0):.1%} kept of the "
        f"{what}, on {where} (limits: {MIN_KEPT_MIXABLE:.0%} to mix, "
        f"{MIN_KEPT_INTERCHANGEABLE:.0%} and the same weights to be interchangeable)"
    )
    return Verdict(word=word, kept=kept, why=why, weak=weak)
