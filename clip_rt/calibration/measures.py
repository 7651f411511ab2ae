"""How far probabilities are from what is true of images; pure NumPy.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2: 15 bins of equal
width; of a softmax the most probable label counts. Kull et al. 2019, "Beyond temperature scaling",
section 3: of independent labels the mean over labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_rt.moderation.policy import Kind

NUM_BINS = 15


@dataclass(frozen=True, eq=False)
class Reliability:
    """Predictions by their probability, in K bins that hold any."""

    mean_probability: NDArray[np.float64]
    """float64 (K,), ascending."""
    share_right: NDArray[np.float64]
    """float64 (K,): of the predictions of each bin."""
    num_predictions: NDArray[np.int64]
    """int64 (K,)."""

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of the two, over predictions."""
        distance = np.abs(self.mean_probability - self.share_right)
        return float(np.average(distance, weights=self.num_predictions))


def reliability(
    probabilities: NDArray[np.floating[Any]], is_right: NDArray[np.bool_]
) -> Reliability:
    """Sort predictions into bins.

    Args:
        probabilities: (N,), N >= 1, from 0 to 1.
        is_right: bool (N,).
    """
    bins = np.minimum((probabilities * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    is_used = count > 0
    mean, share = (
        np.bincount(bins, weights=values, minlength=NUM_BINS)[is_used] / count[is_used]
        for values in (probabilities, is_right)
    )
    return Reliability(mean, share, count[is_used])


def predictions(
    kind: Kind, probabilities: NDArray[np.float64], is_true: NDArray[np.bool_], none_of_these: bool
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return what is predicted of images, and whether it is right, (M,) each.

    Args:
        kind: Of the policy: each label predicts for itself, or the most probable one does.
        probabilities: float64 (N, C).
        is_true: bool (N, C).
        none_of_these: Whether what a row leaves to 1 is the probability that no label fits.
    """
    if kind == "independent":
        return probabilities.T.ravel(), is_true.T.ravel()
    if none_of_these:
        probabilities = with_none(probabilities)
        is_true = np.hstack([is_true, ~is_true.any(axis=1, keepdims=True)])
    best = probabilities.argmax(axis=1)[:, None]
    chosen = np.take_along_axis(probabilities, best, axis=1)[:, 0]
    return chosen, np.take_along_axis(is_true, best, axis=1)[:, 0]


def with_none(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add what each row leaves to 1, float64 (N, C + 1)."""
    rest = np.clip(1 - probabilities.sum(axis=1, keepdims=True), 0, 1)
    return np.hstack([probabilities, rest])


def calibration_error(
    kind: Kind, probabilities: NDArray[np.float64], is_true: NDArray[np.bool_], none_of_these: bool
) -> float:
    """Return the expected calibration error; see `predictions` for the arguments."""
    if kind == "softmax":
        return reliability(*predictions(kind, probabilities, is_true, none_of_these)).error
    columns = zip(probabilities.T, is_true.T, strict=True)
    return float(np.mean([reliability(*each).error for each in columns]))


def confusion(
    kind: Kind,
    probabilities: NDArray[np.float64],
    is_true: NDArray[np.bool_],
    is_flagged: NDArray[np.bool_],
    none_of_these: bool,
) -> NDArray[np.float64]:
    """Return what became of the images that each label fits, and of those that none does.

    Args:
        kind: Of the policy.
        probabilities: float64 (N, C).
        is_true: bool (N, C).
        is_flagged: bool (N, C), of independent labels: at or above the threshold.
        none_of_these: As for `predictions`.

    Returns:
        float64 (C + 1, C + 1), the last row and column of none of the labels. Of a softmax the
        share of each answer; of independent labels how often each is flagged, and none of them.
        A row without an image is NaN.
    """
    rows = np.hstack([is_true, ~is_true.any(axis=1, keepdims=True)])
    if kind == "softmax":
        scores = with_none(probabilities) if none_of_these else probabilities
        answers = np.eye(is_true.shape[1] + 1)[scores.argmax(axis=1)]
    else:
        answers = np.hstack([is_flagged, ~is_flagged.any(axis=1, keepdims=True)]).astype(float)
    count = rows.sum(axis=0)[:, None]
    with np.errstate(invalid="ignore"):
        share: NDArray[np.float64] = (rows.T.astype(float) @ answers) / count
    return share
