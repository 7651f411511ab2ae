"""Rows of float32 in a file that only grows, read through a memory map."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import SearchIndexError

DTYPE = np.dtype("<f4")


class VectorFile:
    """Vectors of D numbers by their row, of a file that the catalogue says how long it is.

    What is beyond that was written by a process that was killed, and is written over. A row that
    the catalogue has is never changed, so that who reads needs no lock.

    Args:
        path: Of the file.
        dim: D.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self.path = path
        self.dim = dim

    def write(self, first_row: int, rows: NDArray[np.float32]) -> None:
        """Write rows, float32 (N, D), and wait until the disk has them.

        The catalogue may name them once this has returned.
        """
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        with open(os.open(self.path, flags, 0o600), "r+b") as file:
            file.seek(first_row * self.dim * DTYPE.itemsize)
            file.write(np.ascontiguousarray(rows, DTYPE).data)
            file.flush()
            os.fsync(file.fileno())

    def read(self, num_rows: int) -> NDArray[np.float32]:
        """Return the first rows, float32 (num_rows, D), read only and mapped.

        Raises:
            SearchIndexError: there are fewer.
            FileNotFoundError: the file went away, as after a migration.
        """
        if num_rows == 0:
            return np.empty((0, self.dim), np.float32)
        needed_bytes = num_rows * self.dim * DTYPE.itemsize
        found_bytes = self.path.stat().st_size
        if found_bytes < needed_bytes:
            raise SearchIndexError(
                f"{self.path} has {found_bytes:,} bytes; the index says {needed_bytes:,}. "
                "Something else cut it. Restore it from a backup, or remove the folder of the "
                "index and make it anew with clip-rt index."
            )
        return np.memmap(self.path, DTYPE, "r", shape=(num_rows, self.dim)).view(np.ndarray)

    def remove(self) -> None:
        """Remove the file; who has it mapped goes on with it, and Windows waits for them."""
        try:
            self.path.unlink(missing_ok=True)
        except PermissionError:
            if os.name != "nt":
                raise
