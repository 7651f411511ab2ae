"""Rows in, requests of the right size out, and their answers back in the caller's order.

Plans only: nothing here sends anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clip_rt.inputs.tokenizer import pad

MAX_ROWS = 32
"""Rows of one request at most: larger ones wait longer without being served better."""


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """What to send for a batch of texts, and where the answers belong."""

    batches: tuple[NDArray[np.int32], ...]
    """int32 (n, L) each, of distinct texts, the short ones first."""
    row_by_text: NDArray[np.intp]
    """For each text of the caller, its row in the answers stacked in the order of `batches`."""


def plan_texts(
    token_ids: Sequence[Sequence[int]],
    *,
    max_rows: int,
    buckets: Sequence[int] = (),
    pad_id: int = 0,
) -> TextPlan:
    """Lay out texts so that little is computed for padding, and nothing twice.

    Equal texts are sent once. The others are sorted by length and cut to the longest of their
    request, or to the smallest bucket that holds them where the server has fixed lengths.

    Args:
        token_ids: Unpadded ids of each text.
        max_rows: Largest number of texts in one request.
        buckets: Lengths the server accepts; empty if it accepts any.
        pad_id: What a text is filled up with.
    """
    row_by_ids: dict[tuple[int, ...], int] = {}
    first_rows = [row_by_ids.setdefault(tuple(ids), len(row_by_ids)) for ids in token_ids]
    distinct = list(row_by_ids)
    order = sorted(range(len(distinct)), key=lambda row: len(distinct[row]))
    place = np.empty(len(distinct), dtype=np.intp)
    place[order] = np.arange(len(distinct))
    batches = []
    by_bucket = itertools.groupby(order, key=lambda row: _fit(len(distinct[row]), buckets))
    for length, group in by_bucket:
        source = iter(group)
        while rows := list(itertools.islice(source, max_rows)):
            ids = [distinct[row] for row in rows]
            batches.append(pad(ids, length_tokens=length or len(ids[-1]), pad_id=pad_id))
    return TextPlan(
        batches=tuple(batches), row_by_text=place[np.asarray(first_rows, dtype=np.intp)]
    )


def join(parts: Iterable[NDArray[np.float32]], *, dim: int) -> NDArray[np.float32]:
    """Stack answers into float32 (N, dim); none gives an empty array."""
    return np.concatenate([np.empty((0, dim), np.float32), *parts])


def _fit(length: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that holds `length`; 0 where any length will do."""
    return min((bucket for bucket in buckets if bucket >= length), default=0)
