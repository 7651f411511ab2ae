"""How often each label is given in each group of images, and where that differs.

The question is section 7.1 of Radford et al. 2021 ("Bias"): how often are people of some groups
given some labels? Each pair of groups is compared, label by label, with Fisher's exact test; the
tests of all labels and pairs share one error of 5 % (Holm 1979, "A Simple Sequentially Rejective
Multiple Test Procedure").
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import fisher_exact

from clip_rt.errors import InputError
from clip_rt.moderation.curve import wilson

ERROR = 0.05


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """Rates of C labels in G groups."""

    labels: tuple[str, ...]
    groups: tuple[str, ...]
    num_images: NDArray[np.int64]
    """int64 (G,)."""
    num_given: NDArray[np.int64]
    """int64 (G, C): images of the group that were given the label."""
    p_values: NDArray[np.float64]
    """float64 (G, G, C): of equal rates in two groups, corrected for the number of comparisons."""

    @property
    def rates(self) -> NDArray[np.float64]:
        """float64 (G, C)."""
        return self.num_given / self.num_images[:, None]

    @property
    def intervals(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Low and high ends of the 95 % intervals of `rates`, float64 (G, C) each."""
        return wilson(self.num_given, np.broadcast_to(self.num_images[:, None], self.rates.shape))

    @property
    def differs(self) -> NDArray[np.bool_]:
        """Bool (G, G, C): whether two groups differ in the rate of a label."""
        return self.p_values <= ERROR


def compare_groups(
    is_given: NDArray[np.bool_], labels: Sequence[str], group_of_image: Sequence[str]
) -> Comparison:
    """Count labels in groups, and test all pairs of groups.

    Args:
        is_given: bool (N, C): labels that each image was given.
        labels: C names.
        group_of_image: N names.

    Raises:
        InputError: there are fewer than two groups.
    """
    groups = tuple(sorted(set(group_of_image)))
    if len(groups) < 2:
        raise InputError(
            f"there is one group, {groups[0]!r:.80}; two or more are compared."
            if groups
            else "there is no image in any group."
        )
    of_group = np.array(groups)[:, None] == np.array(list(group_of_image))[None, :]
    num_images = of_group.sum(axis=1)
    num_given = of_group.astype(np.int64) @ is_given.astype(np.int64)
    pairs = list(itertools.combinations(range(len(groups)), 2))
    places = [(*pair, label) for label in range(len(labels)) for pair in pairs]
    raw = np.array([_test(num_given, num_images, *place) for place in places])
    p_values = np.ones((len(groups), len(groups), len(labels)))
    for (first, second, label), value in zip(places, holm(raw), strict=True):
        p_values[first, second, label] = p_values[second, first, label] = value
    return Comparison(
        labels=tuple(labels),
        groups=groups,
        num_images=num_images.astype(np.int64),
        num_given=num_given,
        p_values=p_values,
    )


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correct the p-values of several tests; each may be held against the error of all of them."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    found = np.empty_like(corrected)
    found[order] = corrected
    return found


def _test(
    num_given: NDArray[np.int64], num_images: NDArray[np.int64], first: int, second: int, label: int
) -> float:
    given = num_given[[first, second], label]
    return float(fisher_exact([given, num_images[[first, second]] - given]).pvalue)
