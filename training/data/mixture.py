"""Sizes and weights of several data sets in, the endless order in which they are drawn from out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import InputError
from training.data.batches import Purpose, Shuffled, rng

PERIOD = 10_000
"""Draws over which the weights are kept exactly; the finest share there is."""


class Mixture:
    """An endless sequence of (source, index), of which any part can be read."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, *, seed: int) -> None:
        """Mix sources of some sizes: by weight, or all their pairs as one set."""
        self._sizes = np.array(sizes)
        self._schedule: NDArray[np.int64] | None = None
        if weights is None:
            self._orders = [Shuffled(int(self._sizes.sum()), seed=seed)]
            return
        if len(weights) != len(sizes) or min(weights) <= 0 or not np.isfinite(sum(weights)):
            raise InputError(
                f"weights are {list(weights)} for {len(sizes)} sources; each needs one above 0."
            )
        self._orders = [Shuffled(size, seed=seed, key=key) for key, size in enumerate(sizes, 1)]
        bounds = np.cumsum(weights) / sum(weights) * PERIOD
        schedule = np.searchsorted(bounds, np.arange(PERIOD) + 0.5)
        self._schedule = rng(Purpose.MIXTURE, seed).permutation(schedule)
        places = np.arange(len(sizes))[:, None]
        self._drawn_before = np.cumsum(self._schedule == places, axis=1) - 1
        self._per_period = self._drawn_before[:, -1] + 1
        if (self._per_period == 0).any():
            raise InputError(f"weights are {list(weights)}; the least share is 1 in 10,000.")

    def take(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return sources and indices of places `start` to `start` + `count`, int64 (count,)."""
        if self._schedule is None:
            ends = np.cumsum(self._sizes)
            item = self._orders[0].take(start, count)
            source = np.searchsorted(ends, item, side="right")
            return source, item - (ends - self._sizes)[source]
        period, offset = np.divmod(np.arange(start, start + count), PERIOD)
        source = self._schedule[offset]
        drawn = period * self._per_period[source] + self._drawn_before[source, offset]
        index = np.empty(count, np.int64)
        for number, order in enumerate(self._orders):
            # The draws from one source follow each other without a gap.
            mine = source == number
            if mine.any():
                index[mine] = order.take(int(drawn[mine][0]), int(mine.sum()))
        return source, index
