"""The nearest rows of a query: exact up to `EXACT_ROWS`, from codes and then exact beyond."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clip_rt.search import codes

EXACT_ROWS = 100_000
"""Up to here every vector is compared: 200 MB of 512 numbers each, some 10 ms."""
FIRST_HITS, WIDER = 64, 8
"""How many rows are looked at first, and how many times more when files of them do not satisfy."""
_SCAN_ROWS = 16_384

_log = logging.getLogger("clip_rt.search")


class Nearest:
    """Finds rows of one generation.

    Args:
        folder: Of the index.
        generation: Whose rows they are.
        vectors: float32 (N, D), rows of length 1.
    """

    def __init__(self, folder: Path, generation: int, vectors: NDArray[np.float32]) -> None:
        self.generation = generation
        self.vectors = vectors
        self._codes: codes.Codes | None = None
        if len(vectors) > EXACT_ROWS:
            if codes.is_available():
                self._codes = codes.Codes(folder, generation)
                self._codes.load(len(vectors))
            else:
                _log.warning(
                    "faiss is not installed, so all %d vectors are compared: pip install "
                    "'clip-rt[search]' for answers in milliseconds.",
                    len(vectors),
                )

    @property
    def is_exact(self) -> bool:
        """Whether all vectors are compared."""
        return self._codes is None or self._codes.num_rows == 0

    def close(self) -> None:
        """End the threads."""
        if self._codes is not None:
            self._codes.close()

    def rank(self, query: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return candidates in ascending order of row, and their cosines with a query (D,).

        All rows where `is_exact`, else those that are near.
        """
        if self._codes is None or self.is_exact:
            return np.arange(len(self.vectors)), scan(self.vectors, query)
        num_coded = self._codes.num_rows
        rows = self._codes.find_candidates(query)
        near = self.vectors[rows] @ query
        rest = scan(self.vectors[num_coded:], query)
        return (
            np.concatenate([rows, np.arange(num_coded, len(self.vectors))]),
            np.concatenate([near, rest]),
        )

    def rank_rows(self, query: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the cosines of some rows, ascending, with a query."""
        if len(rows) == len(self.vectors):
            return scan(self.vectors, query)
        parts = np.split(rows, range(_SCAN_ROWS, len(rows), _SCAN_ROWS))
        return np.concatenate([self.vectors[part] @ query for part in parts])


def scan(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine of each row with a query, float32 (N,)."""
    scores: NDArray[np.float32] = vectors @ query
    return scores


def best(scores: NDArray[np.float32], num: int) -> NDArray[np.int64]:
    """Return the positions of the highest scores, best first; equal ones in order."""
    if num < len(scores):
        limit = np.partition(scores, len(scores) - num)[len(scores) - num]
        chosen = np.flatnonzero(scores >= limit)
    else:
        chosen = np.arange(len(scores))
    order: NDArray[np.int64] = chosen[np.argsort(-scores[chosen], kind="stable")][:num]
    return order
