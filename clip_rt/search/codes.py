"""Vectors as 4-bit codes, for more of them than are scanned exactly; candidates out.

Product quantisation (Jégou et al. 2011) with 16 centroids for every `SUBVECTOR` numbers, scanned
in registers as faiss's fast scan does (André et al. 2015; Douze et al. 2024). All codes are
scanned, so that nothing is built but the codes: no graph to keep up to date, and rows without any
structure, the hard case of graphs and cells, are found as well. The candidates are then compared
exactly, see `nearest`. `benchmarks.studies.vector_stores` has figures of this and of others.

Codes are made of the vector file and may be lost: a row without one is scanned exactly.
"""

from __future__ import annotations

import contextlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHARD_ROWS = 131_072
"""Rows of a file of codes: what is written again when a row is added, and what a thread scans."""
SUBVECTOR = 2
"""Numbers of an embedding that have one code; 2 bits for each of them."""
TRAINING_ROWS = 16_384
CANDIDATES = 2048
"""Of all rows together, compared exactly. Of a million vectors without structure all of the ten
nearest are among so many, and 99 % of them among the first 512."""
MIN_SHARD_CANDIDATES = 256

_log = logging.getLogger("clip_rt.search")


def is_available() -> bool:
    """Whether faiss is installed."""
    return find_spec("faiss") is not None


class Codes:
    """The codes of a generation's rows from the first on, in memory.

    Args:
        folder: Of the index.
        generation: Whose vector file it is.
    """

    def __init__(self, folder: Path, generation: int) -> None:
        self._folder = folder
        self._generation = generation
        self._shards: list[Any] = []
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="clip_rt-search")

    @property
    def num_rows(self) -> int:
        """How many rows have a code."""
        return sum(int(shard.ntotal) for shard in self._shards)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def load(self, max_rows: int) -> None:
        """Read what is there, up to the first file that is missing, damaged or of too many rows."""
        import faiss

        self._shards = []
        while True:
            path = self._path(len(self._shards))
            if not path.is_file():
                return
            try:
                shard = faiss.read_index(str(path))
            except RuntimeError as error:
                _log.warning("%s is damaged and not used: %s", path, str(error)[:200])
                return
            if self.num_rows + shard.ntotal > max_rows:
                return  # Of a later state than the one that is read.
            self._shards.append(shard)
            if shard.ntotal < SHARD_ROWS:
                return

    def extend(self, vectors: NDArray[np.float32]) -> None:
        """Make the codes that are missing and write them; files are replaced as a whole.

        Args:
            vectors: All of the generation, float32 (N, D).
        """
        import faiss

        self.load(len(vectors))
        while (done := self.num_rows) < len(vectors):
            position = done // SHARD_ROWS
            if position == len(self._shards):
                self._shards.append(self._empty(vectors))
            shard = self._shards[position]
            end = min((position + 1) * SHARD_ROWS, len(vectors))
            shard.add(np.ascontiguousarray(vectors[done:end], np.float32))
            path = self._path(position)
            written = path.with_name(f"{path.name}.writing")
            faiss.write_index(shard, str(written))
            os.replace(written, path)

    def _empty(self, vectors: NDArray[np.float32]) -> Any:
        """Return an index without rows; its centroids are those of the first file."""
        import faiss

        if self._shards:
            empty = faiss.clone_index(self._shards[0])
            empty.reset()
            return empty
        dim = vectors.shape[1]
        num_codes = next(each for each in range(-(-dim // SUBVECTOR), dim + 1) if dim % each == 0)
        empty = faiss.IndexPQFastScan(dim, num_codes, 4, faiss.METRIC_INNER_PRODUCT)
        rows = np.random.default_rng(0).choice(
            len(vectors), min(TRAINING_ROWS, len(vectors)), replace=False
        )
        chosen = np.ascontiguousarray(vectors[np.sort(rows)], np.float32)
        # Hundreds of tiny problems: threads that wait for each other, beside other work, take ten
        # times as long. The number is this thread's own.
        num_threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            empty.train(chosen)
        finally:
            faiss.omp_set_num_threads(num_threads)
        return empty

    def find_candidates(
        self, query: NDArray[np.float32], num_candidates: int = CANDIDATES
    ) -> NDArray[np.int64]:
        """Return the rows whose codes are nearest to a query (D,), about so many, ascending."""
        each = max(MIN_SHARD_CANDIDATES, num_candidates // max(len(self._shards), 1))
        asked = np.ascontiguousarray(query[None], np.float32)

        def scan(position: int) -> NDArray[np.int64]:
            shard = self._shards[position]
            _, rows = shard.search(asked, min(each, int(shard.ntotal)))
            kept: NDArray[np.int64] = rows[0][rows[0] >= 0] + position * SHARD_ROWS
            return kept

        found = list(self._pool.map(scan, range(len(self._shards))))
        return np.sort(np.concatenate([*found, np.empty(0, np.int64)]))

    def _path(self, position: int) -> Path:
        return self._folder / f"codes-{self._generation}-{position}.faiss"


def remove_codes(folder: Path, generation: int) -> None:
    """Remove the files of a generation's codes."""
    for path in folder.glob(f"codes-{generation}-*.faiss*"):
        with contextlib.suppress(OSError):  # Open, on Windows.
            path.unlink()
