"""What each threshold would have done to labelled images: precision and recall, with intervals.

The interval of a share is Wilson's (Wilson 1927, "Probable Inference, the Law of Succession, and
Statistical Inference"; Brown, Cai and DasGupta 2001, "Interval Estimation for a Binomial
Proportion"): it holds near 0 and 1, and for few images.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clip_rt.errors import InputError
from clip_rt.moderation.policy import Interval

CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False, kw_only=True)
class PrecisionRecall:
    """What the K thresholds that tell N images apart would have done."""

    thresholds: NDArray[np.float64]
    """float64 (K,), ascending: every score there is, once. An image is flagged at or above one."""
    num_flagged: NDArray[np.int64]
    """int64 (K,), at least 1."""
    num_right: NDArray[np.int64]
    """int64 (K,): flagged images that the label fits."""
    num_true: int
    """Images that the label fits, flagged or not."""
    num_images: int

    @property
    def precision(self) -> NDArray[np.float64]:
        """float64 (K,): of the flagged images, the share that the label fits."""
        return self.num_right / self.num_flagged

    @property
    def recall(self) -> NDArray[np.float64]:
        """float64 (K,): of the images that the label fits, the share flagged; NaN without one."""
        return self.num_right / (self.num_true or np.nan)

    def precision_interval(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Low and high ends of the 95 % intervals of `precision`, float64 (K,) each."""
        return wilson(self.num_right, self.num_flagged)

    def recall_interval(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Low and high ends of the 95 % intervals of `recall`, float64 (K,) each."""
        return wilson(self.num_right, np.full_like(self.num_right, self.num_true))


def precision_recall(scores: ArrayLike, is_true: ArrayLike) -> PrecisionRecall:
    """Count what each threshold flags.

    Args:
        scores: (N,), N >= 1: cosine similarities or probabilities of one label, finite.
        is_true: bool (N,): whether the label fits the image.

    Returns:
        One row for each distinct score, ascending.

    Raises:
        InputError: the shapes do not fit, there is no image, or a score is not finite.
    """
    score_N, is_true_N = np.asarray(scores, np.float64), np.asarray(is_true, bool)  # noqa: N806
    if score_N.ndim != 1 or score_N.shape != is_true_N.shape or score_N.size == 0:
        raise InputError(
            f"{score_N.shape} scores and {is_true_N.shape} truths do not fit; (N,) and (N,) with "
            "N >= 1 are needed."
        )
    if not np.isfinite(score_N).all():
        raise InputError(f"score {int(np.argmin(np.isfinite(score_N)))} is not finite.")
    order = np.argsort(-score_N, kind="stable")
    # Of equal scores the last: a threshold flags all of them.
    is_last = np.append(np.diff(score_N[order]) != 0, True)
    num_right = np.cumsum(is_true_N[order])[is_last]
    return PrecisionRecall(
        thresholds=score_N[order][is_last][::-1],
        num_flagged=(np.flatnonzero(is_last) + 1)[::-1].astype(np.int64),
        num_right=num_right[::-1].astype(np.int64),
        num_true=int(is_true_N.sum()),
        num_images=score_N.size,
    )


def wilson(
    successes: ArrayLike, trials: ArrayLike, confidence: float = CONFIDENCE
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the low and high ends of Wilson's interval of shares; of no trial, 0 and 1.

    Args:
        successes: Whole numbers, of any shape.
        trials: Of the same shape, not below them.
        confidence: That the interval holds the true share, two-sided.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    n = np.asarray(trials, np.float64)
    k = np.asarray(successes, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = k / n
        centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # In floats the end at a share of 0 or 1 may miss it by a rounding.
    low = np.where(k == 0, 0.0, np.maximum(centre - half, 0))
    high = np.where(k == n, 1.0, np.minimum(centre + half, 1))
    return np.where(n > 0, low, 0.0), np.where(n > 0, high, 1.0)


def measure_share(successes: int, trials: int) -> Interval | None:
    """Return a share with its 95 % interval; None of no trial."""
    if trials == 0:
        return None
    low, high = wilson(successes, trials)
    return Interval(value=successes / trials, low=float(low), high=float(high))
