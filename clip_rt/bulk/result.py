"""What bulk jobs wrote, read back: a partition at a time, or as one matrix."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clip_rt.bulk.folder import JobFolder, read_job
from clip_rt.bulk.partitions import EMBEDDINGS, ERRORS, ITEMS, SUFFIX_BY_FORMAT, Kind
from clip_rt.errors import InputError


@dataclass(frozen=True)
class Partition:
    """Some embeddings, and what they are of."""

    embeddings: NDArray[Any]
    """(n, D), rows of length 1, in the type they are stored in."""
    items: pa.Table
    """Of n rows: index, path, sha256, width, height and caption of images; index and text of
    texts."""

    @property
    def names(self) -> list[str]:
        """Path, `shard.tar/member` or URL of each image, or the texts."""
        column = "text" if "text" in self.items.column_names else "path"
        names: list[str] = self.items.column(column).to_pylist()
        return names


class Result:
    """The folder of a bulk job, all its shards together; what is written later is not in it.

    Args:
        folder: The `out` of `embed`.

    Raises:
        InputError: it holds no job, or its shards are of different ones.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        paths = sorted(self.folder.glob("job*.json"))
        if not paths:
            raise InputError(
                f"{self.folder} holds no bulk job. Name the folder that embed() or clip-rt embed "
                "wrote to."
            )
        jobs = [read_job(path) for path in paths]
        for path, job in zip(paths, jobs, strict=True):
            if any(job[key] != value for key, value in jobs[0].items() if key != "shard"):
                raise InputError(f"{path} and {paths[0]} are of different jobs. Separate them.")
        job = jobs[0]
        self.kind: Kind = job["kind"]
        """Of the embeddings, "image" or "text"."""
        self.model: Mapping[str, Any] = job["model"]
        """Name, fingerprint, precision and dimensions, among others, of the model."""
        self.embedding_dim: int = job["model"]["dimensions"]
        self._format = job["format"]
        self._shards = [None if each["shard"] is None else tuple(each["shard"]) for each in jobs]
        folder_of = self.folder / EMBEDDINGS
        suffix = SUFFIX_BY_FORMAT[self._format]
        self._paths = sorted(folder_of.glob(f"part*{suffix}")) if folder_of.is_dir() else []

    def __len__(self) -> int:
        """Return the number of embeddings."""
        return sum(self._count(path) for path in self._paths)

    def __iter__(self) -> Iterator[Partition]:
        """Yield the partitions, in the order of shards and items."""
        for path in self._paths:
            yield self._read(path)

    @property
    def is_complete(self) -> bool:
        """Whether all items of all shards are done."""
        num_shards = 1 if self._shards[0] is None else self._shards[0][1]
        folders = [JobFolder(self.folder, shard) for shard in self._shards]
        return len(folders) == num_shards and all(
            folder.listing.exists()
            and not any(folder.find_missing(pq.read_metadata(folder.listing).num_rows))
            for folder in folders
        )

    def load(self) -> tuple[list[str], NDArray[np.float32]]:
        """Return the names of all items, and their embeddings, float32 (N, D), in one order.

        They are all in memory then: 2 GB for a million of 512 numbers.
        """
        matrix = np.empty((len(self), self.embedding_dim), np.float32)
        names: list[str] = []
        for partition in self:
            matrix[len(names) : len(names) + len(partition.embeddings)] = partition.embeddings
            names += partition.names
        return names, matrix

    def errors(self) -> Iterator[dict[str, Any]]:
        """Yield the items that could not be embedded: what is known of each, error and message."""
        folder = self.folder / ERRORS
        done = {path.stem for path in self._paths}
        for path in sorted(folder.glob("part*")) if folder.is_dir() else ():
            if path.stem in done:
                yield from pq.read_table(path).to_pylist()

    def _count(self, path: Path) -> int:
        return int(pq.read_metadata(self._items_of(path)).num_rows)

    def _read(self, path: Path) -> Partition:
        table = pq.read_table(self._items_of(path))
        if self._format == "npy":
            return Partition(np.load(path, allow_pickle=False), table)
        column = table.column("embedding").combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False)
        return Partition(values.reshape(-1, self.embedding_dim), table.drop_columns(["embedding"]))

    def _items_of(self, path: Path) -> Path:
        if self._format == "parquet":
            return path
        return self.folder / ITEMS / path.with_suffix(".parquet").name
