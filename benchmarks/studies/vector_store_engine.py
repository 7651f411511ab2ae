"""What an engine that keeps vectors and finds the nearest must do to be compared.

Each is used as its own documentation has it, with the rows of one file put in at once, and asked
one query at a time, as a command or a person asks. Sizes are of rows 0 to N - 1; row `i` has the
tag `i % NUM_TAGS`, which filters ask for.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NUM_TAGS = 10
NUM_HITS = 10
BATCH = 16_384

Rows = NDArray[np.float32]
Ids = NDArray[np.int64]


def in_batches(rows: Rows, first_id: int = 0) -> Iterator[tuple[Ids, Rows]]:
    """Yield some rows at a time with their ids."""
    for start in range(0, len(rows), BATCH):
        part = np.ascontiguousarray(rows[start : start + BATCH])
        yield first_id + np.arange(start, start + len(part)), part


class Engine(ABC):
    """One engine with one kind of index, in a folder of its own."""

    package = ""
    """Distribution that it comes from."""
    is_exact = False
    has_filters = True
    is_graph = False
    """Whether its build takes longer than in proportion to the rows."""

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder, self.dim = folder, dim

    @abstractmethod
    def build(self, rows: Rows) -> None:
        """Put all rows in, and leave them on disk."""

    @abstractmethod
    def open(self) -> None:
        """Open what is on disk."""

    @abstractmethod
    def search(self, query: Rows) -> Ids:
        """Return the ids of the nearest rows to a query (D,)."""

    def search_tag(self, query: Rows, tag: int) -> Ids:
        """Return the nearest of the rows with a tag."""
        raise NotImplementedError

    @abstractmethod
    def add(self, ids: Ids, rows: Rows) -> None:
        """Put rows in, so that they are there after a crash."""

    @abstractmethod
    def delete(self, ids: Ids) -> None:
        """Take rows out, likewise."""

    @abstractmethod
    def count(self) -> int:
        """Return how many rows there are."""


def clear(folder: Path) -> None:
    """Make a folder empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
