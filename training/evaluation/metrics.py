"""Scores and the right answers in, accuracies and recalls out; pure numpy.

A rank counts what stands before the right answer: larger scores, scores that are not numbers, and
equal scores further to the left. So a model that answers nothing but one value, or NaN, is not
right by accident.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import InputError

ROWS_AT_ONCE = 1024
"""Rows of the similarity matrix held in memory at a time."""


@dataclass(frozen=True)
class Accuracy:
    """How often the right class was found, fractions of 1."""

    top1: float
    top5: float
    mean_per_class: float
    """Mean over classes of the recall of each; classes without an image are left out."""
    num_images: int
    num_classes: int

    @property
    def chance(self) -> float:
        """Top-1 of a guess."""
        return 1 / self.num_classes


@dataclass(frozen=True)
class Retrieval:
    """How often a right item is among the first k, by k, fractions of 1."""

    text_at: dict[int, float]
    """Of images, one of whose own texts is among the k texts nearest to it."""
    image_at: dict[int, float]
    """Of texts, whose image is among the k images nearest to it."""
    num_images: int
    """Those with a text."""
    num_texts: int


def rank(
    scores_NC: NDArray[np.floating[Any]], right_N: NDArray[np.integer[Any]]
) -> NDArray[np.int64]:
    """Count the answers that stand before the right one in each row; int64 (N,), 0 is best."""
    own_N1 = np.take_along_axis(scores_NC, right_N[:, None], axis=1)
    before_NC = np.arange(scores_NC.shape[1]) < right_N[:, None]
    ahead_NC = ~(scores_NC <= own_N1) | ((scores_NC == own_N1) & before_NC)
    # A right answer that is no number is not ahead of itself.
    rank_N: NDArray[np.int64] = (ahead_NC.sum(axis=1) - np.isnan(own_N1[:, 0])).astype(np.int64)
    return rank_N


def accuracy(scores_NC: NDArray[np.floating[Any]], right_N: NDArray[np.integer[Any]]) -> Accuracy:
    """Compare scores with the index of the right class of each image.

    Raises:
        InputError: there is no image, or the shapes do not fit.
    """
    if scores_NC.ndim != 2 or right_N.shape != scores_NC.shape[:1] or len(right_N) == 0:
        raise InputError(
            f"scores {scores_NC.shape} and right classes {right_N.shape} do not fit; (N, C) and "
            "(N,) with at least one image are needed."
        )
    rank_N = rank(scores_NC, right_N)
    is_right_N = rank_N < 1
    recalls = [is_right_N[right_N == each].mean() for each in np.unique(right_N)]
    return Accuracy(
        top1=float(is_right_N.mean()),
        top5=float((rank_N < 5).mean()),
        mean_per_class=float(np.mean(recalls)),
        num_images=len(right_N),
        num_classes=scores_NC.shape[1],
    )


def retrieval(
    image_NE: NDArray[np.floating[Any]],
    text_ME: NDArray[np.floating[Any]],
    image_of_text_M: NDArray[np.integer[Any]],
    *,
    ks: tuple[int, ...] = (1, 5, 10),
) -> Retrieval:
    """Find texts by image and images by text among all of them.

    Args:
        image_NE: Embeddings of the images.
        text_ME: Embeddings of the texts, any number for each image.
        image_of_text_M: Row of the image that each text describes.
        ks: How many results count.

    Raises:
        InputError: there is no text, or the shapes do not fit.
    """
    if len(text_ME) == 0 or image_of_text_M.shape != (len(text_ME),):
        raise InputError(
            f"{len(text_ME)} texts of {image_of_text_M.shape} images; each text needs its image, "
            "and there must be at least one."
        )
    images = np.unique(image_of_text_M)
    text_ranks, image_ranks = [], []
    for start in range(0, len(images), ROWS_AT_ONCE):
        some = images[start : start + ROWS_AT_ONCE]
        scores = image_NE[some] @ text_ME.T
        is_own = image_of_text_M[None, :] == some[:, None]
        text_ranks.append(rank(scores, np.where(is_own, scores, -np.inf).argmax(axis=1)))
    for start in range(0, len(text_ME), ROWS_AT_ONCE):
        stop = start + ROWS_AT_ONCE
        image_ranks.append(rank(text_ME[start:stop] @ image_NE.T, image_of_text_M[start:stop]))
    return Retrieval(
        text_at=_recall_at(np.concatenate(text_ranks), ks),
        image_at=_recall_at(np.concatenate(image_ranks), ks),
        num_images=len(images),
        num_texts=len(text_ME),
    )


def _recall_at(rank_N: NDArray[np.int64], ks: tuple[int, ...]) -> dict[int, float]:
    return {k: float((rank_N < k).mean()) for k in ks}
