"""The threshold at which a target is reached, with 95 % confidence and not by luck.

The lowest threshold that has a precision of 0.95 on the images it is chosen on has less on others:
of many that are near it, the luckiest is taken. So a threshold is only taken where a precision
below the target is refuted by an exact binomial test, and tests of many thresholds share one error
of 5 %. They go from the surest images on to more of them until one fails, which costs nothing
(fixed sequence testing), from four starts, each with a quarter of the error (Angelopoulos et al.
2021, "Learn then Test", section 3). Starts and steps are numbers of images, which depend on the
scores, and on what is true only by how many images there are to be found.

Recall needs no such thing: the share of images above one of their own scores has a distribution
that is known whatever the scores are (Wilks 1941, "Determination of Sample Sizes for Setting
Tolerance Limits").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from clip_rt.moderation.curve import PrecisionRecall, precision_recall
from clip_rt.moderation.policy import Target

ERROR = 0.05
"""Chance at most that a threshold that was found misses its target."""
NUM_STARTS = 4
STEP = 1.1
"""More images at each step."""
MAX_NEEDED = 100_000


@dataclass(frozen=True)
class Choice:
    """A threshold, or why there is none."""

    threshold: float | None
    shortfall: str = ""
    """Empty where there is one."""


def choose_threshold(
    probabilities: NDArray[np.floating[Any]], is_true: NDArray[np.bool_], target: Target
) -> Choice:
    """Find the threshold that flags as much as the target allows (precision), or needs (recall).

    Args:
        probabilities: (N,), N >= 1, of images that they were not fitted on.
        is_true: bool (N,): whether the label fits.
        target: To be met with confidence 1 - `ERROR`.
    """
    find = _find_precise if target.measure == "precision" else _find_complete
    return find(probabilities.astype(np.float64), is_true, target.value)


def count_needed(target: float, error: float = ERROR) -> int:
    """Return how many images show that a share is at least `target`, if each of them is right."""
    return math.ceil(math.log(error) / math.log(target))


def _find_precise(
    probabilities: NDArray[np.float64], is_true: NDArray[np.bool_], target: float
) -> Choice:
    error = ERROR / NUM_STARTS
    fewest = count_needed(target, error)
    curve = precision_recall(probabilities, is_true)
    # More images than that cannot be right often enough.
    most = min(int(curve.num_true / target), curve.num_images)
    if most < fewest:
        return Choice(
            None,
            f"it fits {curve.num_true:,} of the {curve.num_images:,} images; a precision of "
            f"{target:g} takes at least {math.ceil(fewest * target):,} that it fits",
        )
    # From many flagged images to few: a threshold ascends.
    flagged, right = curve.num_flagged[::-1], curve.num_right[::-1]
    best = -1
    for start in np.geomspace(fewest, most, NUM_STARTS):
        wanted = start
        while (index := int(np.searchsorted(flagged, round(wanted)))) < len(flagged):
            if binom.sf(right[index] - 1, flagged[index], target) > error:
                break
            best = max(best, index)
            wanted = flagged[index] * STEP
    if best >= 0:
        return Choice(float(curve.thresholds[::-1][best]))
    return Choice(None, _explain(curve, fewest, target, error))


def _explain(curve: PrecisionRecall, fewest: int, target: float, error: float) -> str:
    """Say what the surest images are like, and how many would be enough."""
    flagged, right = curve.num_flagged[::-1], curve.num_right[::-1]
    index = min(int(np.searchsorted(flagged, fewest)), len(flagged) - 1)
    share = right[index] / flagged[index]
    said = (
        f"of the {flagged[index]:,} surest images {right[index]:,} are right, {share:.3f}, which "
        f"does not show a precision of {target:g}"
    )
    if share <= target:
        return f"{said}; it takes other prompts, a better model or a lower target"
    needed = fewest
    while binom.sf(math.floor(share * needed) - 1, needed, target) > error:
        needed = math.ceil(needed * 1.05)
        if needed > MAX_NEEDED:
            return f"{said}; more than {MAX_NEEDED:,} images of the label would"
    return f"{said}; some {math.ceil(needed * share):,} images that the label fits would"


def _find_complete(
    probabilities: NDArray[np.float64], is_true: NDArray[np.bool_], target: float
) -> Choice:
    own = np.sort(probabilities[is_true])
    # Missing the first j - 1 of n: refuted if so few are improbable with a recall of the target.
    ranks = np.arange(len(own))
    allowed = np.flatnonzero(binom.cdf(ranks, len(own), 1 - target) <= ERROR)
    if not len(allowed):
        return Choice(
            None,
            f"it fits {len(own):,} images; a recall of {target:g} takes at least "
            f"{count_needed(target):,} that it fits",
        )
    return Choice(float(own[allowed[-1]]))
