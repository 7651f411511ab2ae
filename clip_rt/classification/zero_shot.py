"""Embeddings in, class probabilities out; pure numpy, shared by serving and evaluation.

Source: Radford et al. 2021, section 3.1.4 (prompt ensembling) and figure 3 (logits); Zhai et al.
2023, "Sigmoid Loss for Language Image Pre-Training", section 3.2 (each pair alone, with a bias).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import ClipRTError, InputError, NonFiniteEmbeddingError
from clip_rt.inputs.items import check_list
from clip_rt.specs import MIN_NORM, Score

MAX_SMALL_PRODUCT = 2**22
"""Multiplications, up to which one thread takes 0.7 ms at most. BLAS would wake one on every core,
and they wait for more work without sleep, 50 ms seen with NumPy's OpenBLAS: on one image and 100
labels this took as much from the embedded server as the image itself."""


@dataclass(frozen=True, eq=False)
class Scores:
    """How well each of N images fits each of C labels."""

    labels: tuple[str, ...]
    """As they were passed, in order; the same label may occur twice."""
    probabilities: NDArray[np.float32]
    """float32 (N, C). With softmax each row sums to 1; with sigmoid each is of its own label,
    whatever the others are, and all of a row may be near 0."""
    logits: NDArray[np.float32]
    """float32 (N, C): scaled cosine similarities, before the softmax or sigmoid."""
    indices: NDArray[np.intp] | None = None
    """intp (N,): position in the caller's batch of each row's image; None is all, in order."""
    failures: tuple[ClipRTError, ...] = ()
    """An error for each image that was left out; each carries its `index`."""
    score: Score = "softmax"
    """What made the probabilities, as the model was trained; `Manifest.score` says it."""
    similarities: NDArray[np.float32] | None = None
    """float32 (N, C): cosines of image and label, from -1 to 1. A label that
    `zero_shot(none_of_these=True)` added has no column. None where a probe made the scores."""

    def of_items(self, indices: NDArray[np.intp], failures: tuple[ClipRTError, ...]) -> Scores:
        """Return them with whose they are."""
        return replace(self, indices=indices, failures=failures)

    @property
    def best(self) -> list[str]:
        """The most probable label of each image; of equals, the first."""
        return [self.labels[index] for index in self.probabilities.argmax(axis=1)]

    def top(self, k: int) -> list[list[tuple[str, float]]]:
        """Rank the labels of each image.

        Args:
            k: How many to return; all of them when there are fewer.

        Returns:
            For each image, (label, probability) pairs, the most probable first.

        Raises:
            InputError: `k` is below 1.
        """
        if k < 1:
            raise InputError(f"k is {k}; at least 1 label is ranked.")
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]
        return [
            [(self.labels[index], float(row[index])) for index in best]
            for row, best in zip(self.probabilities, order, strict=True)
        ]

    def above(
        self, threshold: float = 0.0, *, min_similarity: float = -1.0
    ) -> list[list[tuple[str, float]]]:
        """Return the labels that fit each image well enough; none of them may.

        With sigmoid every probability is of its own label, so that any number of labels may fit an
        image, and `threshold` is all that is needed. With softmax the labels share out 1 among
        themselves: there `threshold` says how sure the choice among them is, and `min_similarity`
        whether there is anything to choose. Which cosine is much differs from model to model; look
        at `similarities` of images that your labels fit.

        Args:
            threshold: Probability that a label needs, from 0 to 1.
            min_similarity: Cosine that a label needs, from -1 to 1; "none of these" needs none.

        Returns:
            For each image, (label, probability) pairs, the most probable first; may be empty.

        Raises:
            InputError: a number is out of range, or a probe made the scores, which has no cosines.
        """
        is_above = self.are_above(threshold, min_similarity)
        order = np.argsort(-self.probabilities, axis=1, kind="stable")
        return [
            [(self.labels[index], float(row[index])) for index in ranked if kept[index]]
            for row, ranked, kept in zip(self.probabilities, order, is_above, strict=True)
        ]

    def are_above(self, threshold: float, min_similarity: float) -> NDArray[np.bool_]:
        """Return which labels `above` returns, bool (N, C).

        Raises:
            InputError: see `above`.
        """
        for name, limit, least in (
            ("threshold", threshold, 0),
            ("min_similarity", min_similarity, -1),
        ):
            if not least <= limit <= 1:
                raise InputError(f"{name} is {limit!r:.40}; it must be from {least} to 1.")
        is_above = self.probabilities >= threshold
        if min_similarity > -1:
            if self.similarities is None:
                raise InputError("the scores are of a probe and have no similarities.")
            is_above[:, : self.similarities.shape[1]] &= self.similarities >= min_similarity
        return is_above


def pool(prompt_embeddings: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Average the prompts of each class into the embedding of the class.

    Args:
        prompt_embeddings: (C, T, D), T prompts for each of C classes; normalised here.

    Returns:
        float32 (C, D): the normalised mean of the normalised prompt embeddings.

    Raises:
        InputError: not three axes, or no prompt.
        NonFiniteEmbeddingError: a class has no direction; carries its index.
    """
    if prompt_embeddings.ndim != 3 or prompt_embeddings.shape[1] == 0:
        raise InputError(
            f"prompt embeddings have shape {prompt_embeddings.shape}; (C, T, D) with at least one "
            "prompt T is needed."
        )
    unit = _normalise(prompt_embeddings.astype(np.float64))
    return _normalise(unit.mean(axis=1)).astype(np.float32)


def classify(
    image_embeddings: NDArray[np.floating[Any]],
    class_embeddings: NDArray[np.floating[Any]],
    labels: Sequence[str],
    *,
    logit_scale: float,
    logit_bias: float = 0.0,
    score: Score = "softmax",
) -> Scores:
    """Compare images with classes.

    Args:
        image_embeddings: (N, D), rows of length 1; N = 0 gives scores of no image.
        class_embeddings: (C, D), rows of length 1.
        labels: C names.
        logit_scale: Factor of the cosine, 100 for OpenAI's models.
        logit_bias: Added after scaling; the softmax does not feel it.
        score: "softmax" over the labels, or "sigmoid" of each.

    Raises:
        InputError: the shapes do not fit each other, or the labels are none or no list.
    """
    names = tuple(check_list(labels, "labels", "strings", InputError))
    num_labels, dim = len(names), image_embeddings.shape[-1]
    fits = image_embeddings.ndim == 2 and class_embeddings.shape == (num_labels, dim)
    if not fits or num_labels == 0:
        raise InputError(
            f"{image_embeddings.shape} images, {class_embeddings.shape} classes and {num_labels} "
            "labels do not fit; (N, D), (C, D) and C >= 1 labels are needed."
        )
    cosine = _multiply(image_embeddings.astype(np.float32), class_embeddings.astype(np.float32))
    logits = np.float32(logit_scale) * cosine + np.float32(logit_bias)
    if score == "sigmoid":
        # Of minus the magnitude: exp cannot overflow.
        small = np.exp(-np.abs(logits))
        probabilities = np.where(logits < 0, small, np.float32(1)) / (1 + small)
        return Scores(labels=names, probabilities=probabilities, logits=logits, score=score)
    # Shifted so that the largest exponent is 0: exp cannot overflow, and the sum is at least 1.
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    return Scores(labels=names, probabilities=probabilities, logits=logits)


def _multiply(
    image_embeddings: NDArray[np.float32], class_embeddings: NDArray[np.float32]
) -> NDArray[np.float32]:
    if image_embeddings.size * len(class_embeddings) > MAX_SMALL_PRODUCT:
        return image_embeddings @ class_embeddings.T
    cosine: NDArray[np.float32] = np.einsum("nd,cd->nc", image_embeddings, class_embeddings)
    return cosine


def _normalise(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    is_bad = ~(np.isfinite(norms) & (norms > MIN_NORM))
    if is_bad.any():
        index = int(np.nonzero(is_bad)[0][0])
        raise NonFiniteEmbeddingError(
            f"the prompts of class {index} have no common direction: a NaN, infinite or zero "
            "embedding is among them, or they cancel out.",
            index=index,
        )
    unit: NDArray[np.float64] = vectors / norms
    return unit
