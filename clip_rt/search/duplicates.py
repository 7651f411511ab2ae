"""Which vectors are nearly the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_LEADERS, _OTHERS = 1024, 8192
"""Rows whose cosines are in memory at a time: 32 MB."""


def group(
    vectors: NDArray[np.float32],
    threshold: float,
    on_progress: Callable[[int, int], object] | None = None,
) -> NDArray[np.int64]:
    """Return for each row the first of its group, int64 (N,); its own number where it is that.

    From the first row on, each that is in no group yet begins one, with all later rows that are in
    none and as near to it as the threshold. So every member is that near to the first of its group,
    and no chain of small steps joins what is unlike. All pairs are compared: N² / 2 x D products,
    fewer the more duplicates there are.

    Args:
        vectors: float32 (N, D), rows of length 1.
        threshold: Smallest cosine.
        on_progress: Called with how many rows are done, and with N.
    """
    num = len(vectors)
    first = np.full(num, -1, np.int64)
    for start in range(0, num, _LEADERS):
        end = min(start + _LEADERS, num)
        free = start + np.flatnonzero(first[start:end] < 0)
        block = np.ascontiguousarray(vectors[free])
        cosines = block @ block.T
        for position, row in enumerate(free):
            if first[row] < 0:
                first[row] = row
                near = free[position + 1 :][cosines[position, position + 1 :] >= threshold]
                first[near[first[near] < 0]] = row
        is_leader = first[free] == free
        leaders, block = free[is_leader], block[is_leader]
        for others_start in range(end, num, _OTHERS) if len(leaders) else ():
            others_end = min(others_start + _OTHERS, num)
            others = others_start + np.flatnonzero(first[others_start:others_end] < 0)
            is_near = block @ vectors[others].T >= threshold
            found = is_near.any(axis=0)
            first[others[found]] = leaders[is_near.argmax(axis=0)[found]]
        if on_progress is not None:
            on_progress(end, num)
    return first
