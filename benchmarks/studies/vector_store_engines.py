"""Engines that keep vectors and find the nearest, each behind the same few methods.

Each is used as its own documentation has it, with the rows of one file put in at once, and asked
one query at a time, as a command or a person asks. Sizes are of rows 0 to N - 1; row `i` has the
tag `i % NUM_TAGS`, which filters ask for.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

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


class Ours(Engine):
    """`clip_rt.search.Index`: a vector file, SQLite, an exact scan, and beyond it 4-bit codes."""

    package = "faiss-cpu"

    def __init__(self, folder: Path, dim: int) -> None:
        super().__init__(folder, dim)
        from clip_rt.wire.manifest import Manifest

        self.manifest = Manifest(
            model="made up",
            architecture="made up",
            fingerprint="0" * 64,
            embedding_dim=dim,
            side_px=64,
            context_length=77,
            text_buckets=(),
            logit_scale=100.0,
            logit_bias=0.0,
            activation="gelu",
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            precision="fp32",
            libraries={},
        )

    def build(self, rows: Rows) -> None:
        """See `Engine`."""
        self.open()
        for ids, part in in_batches(rows):
            self._put(ids, part)
        self.index._tidy()

    def open(self) -> None:
        """See `Engine`."""
        from clip_rt.search.index import Index

        self.index = Index.open(self.folder, create=True)
        self.generation, self.model = self.index._begin_update(self.manifest)

    def _put(self, ids: Ids, part: Rows) -> None:
        from clip_rt.search.catalogue import Catalogue

        catalogue: Catalogue = self.index._catalogue
        current = self.index._current()
        self.index._vectors(current).write(current.num_rows, part)
        with catalogue.transaction():
            numbers = [
                catalogue.put_content(hashlib.sha256(str(each).encode()).digest(), 64, 64)
                for each in ids.tolist()
            ]
            catalogue.put_embeddings(current.id, numbers, current.num_rows)
            for each, number in zip(ids.tolist(), numbers, strict=True):
                catalogue.put_file(f"/photos/{each}.jpg", each % NUM_TAGS, each, number, None)

    def _find(self, query: Rows, where: Any) -> Ids:
        hits = self.index.find(query, self.manifest, top=NUM_HITS, where=where)
        return np.array([hit.mtime_ns for hit in hits], np.int64)

    def search(self, query: Rows) -> Ids:
        """See `Engine`."""
        from clip_rt.search.catalogue import EVERYWHERE

        return self._find(query, EVERYWHERE)

    def search_tag(self, query: Rows, tag: int) -> Ids:
        """See `Engine`."""
        from clip_rt.search.catalogue import Where

        return self._find(query, Where(min_bytes=tag, max_bytes=tag))

    def add(self, ids: Ids, rows: Rows) -> None:
        """See `Engine`."""
        self._put(ids, rows)
        self.index._tidy()

    def delete(self, ids: Ids) -> None:
        """See `Engine`."""
        catalogue = self.index._catalogue
        with catalogue.transaction():
            for each in ids.tolist():
                catalogue.remove_files(f"/photos/{each}.jpg")

    def count(self) -> int:
        """See `Engine`."""
        return self.index.count()["files"]


class Numpy(Engine):
    """All rows times the query, of a mapped file of float32."""

    package = "numpy"
    is_exact = True
    has_filters = False

    @property
    def _path(self) -> Path:
        return self.folder / "rows.f32"

    def build(self, rows: Rows) -> None:
        """See `Engine`."""
        with self._path.open("wb") as file:
            for _, part in in_batches(rows):
                file.write(part.data)
            file.flush()
            os.fsync(file.fileno())
        self.open()

    def open(self) -> None:
        """See `Engine`."""
        self.rows = np.memmap(self._path, "<f4", "r").reshape(-1, self.dim)

    def search(self, query: Rows) -> Ids:
        """See `Engine`."""
        scores = self.rows @ query
        best = np.argpartition(-scores, NUM_HITS)[:NUM_HITS]
        return best[np.argsort(-scores[best])]

    def add(self, ids: Ids, rows: Rows) -> None:
        """See `Engine`."""
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(rows).data)
            file.flush()
            os.fsync(file.fileno())
        self.open()

    def delete(self, ids: Ids) -> None:
        """See `Engine`."""
        raise NotImplementedError("a file of rows has no room for it")

    def count(self) -> int:
        """See `Engine`."""
        return len(self.rows)


class Faiss(Engine):
    """An index of faiss by its factory string, saved as a whole."""

    package = "faiss-cpu"

    def __init__(self, folder: Path, dim: int, kind: str, ef: int = 0) -> None:
        super().__init__(folder, dim)
        self.kind, self.ef = kind, ef
        self.is_graph = "HNSW" in kind
        self.is_exact = kind == "Flat"

    @property
    def _path(self) -> str:
        return str(self.folder / "index.faiss")

    def build(self, rows: Rows) -> None:
        """See `Engine`."""
        faiss: Any = import_module("faiss")

        self.index = faiss.index_factory(self.dim, self.kind, faiss.METRIC_INNER_PRODUCT)
        if not self.index.is_trained:
            chosen = np.random.default_rng(0).choice(len(rows), 65_536, replace=False)
            self.index.train(np.ascontiguousarray(rows[np.sort(chosen)]))
        for _, part in in_batches(rows):
            self.index.add(part)
        self._save()
        self._tune()

    def _tune(self) -> None:
        faiss: Any = import_module("faiss")

        if self.ef:
            faiss.ParameterSpace().set_index_parameter(self.index, "efSearch", self.ef)

    def _save(self) -> None:
        faiss: Any = import_module("faiss")

        faiss.write_index(self.index, self._path)

    def open(self) -> None:
        """See `Engine`."""
        faiss: Any = import_module("faiss")

        self.index = faiss.read_index(self._path)
        self._tune()

    def search(self, query: Rows) -> Ids:
        """See `Engine`."""
        return np.asarray(self.index.search(query[None], NUM_HITS)[1][0], np.int64)

    def search_tag(self, query: Rows, tag: int) -> Ids:
        """See `Engine`."""
        faiss: Any = import_module("faiss")

        chosen = faiss.IDSelectorBatch(np.arange(tag, self.index.ntotal, NUM_TAGS))
        kind = faiss.SearchParametersHNSW if self.is_graph else faiss.SearchParameters
        parameters = kind(sel=chosen)
        return np.asarray(
            self.index.search(query[None], NUM_HITS, params=parameters)[1][0], np.int64
        )

    def add(self, ids: Ids, rows: Rows) -> None:
        """See `Engine`."""
        self.index.add(np.ascontiguousarray(rows))
        self._save()

    def delete(self, ids: Ids) -> None:
        """See `Engine`."""
        self.index.remove_ids(ids)
        self._save()

    def count(self) -> int:
        """See `Engine`."""
        return int(self.index.ntotal)


class Usearch(Engine):
    """HNSW of usearch, saved as a whole."""

    package = "usearch"
    is_graph = True

    def __init__(self, folder: Path, dim: int, dtype: str, ef: int) -> None:
        super().__init__(folder, dim)
        self.dtype, self.ef = dtype, ef

    def _make(self) -> Any:
        from usearch.index import Index

        return Index(ndim=self.dim, metric="cos", dtype=self.dtype, expansion_search=self.ef)

    def build(self, rows: Rows) -> None:
        """See `Engine`."""
        self.index = self._make()
        for ids, part in in_batches(rows):
            self.index.add(ids, part)
        self.index.save(str(self.folder / "index.usearch"))

    def open(self) -> None:
        """See `Engine`."""
        self.index = self._make()
        self.index.load(str(self.folder / "index.usearch"))

    def search(self, query: Rows) -> Ids:
        """See `Engine`."""
        return np.asarray(self.index.search(query, NUM_HITS).keys, np.int64)

    has_filters = False

    def add(self, ids: Ids, rows: Rows) -> None:
        """See `Engine`."""
        self.index.add(ids, rows)
        self.index.save(str(self.folder / "index.usearch"))

    def delete(self, ids: Ids) -> None:
        """See `Engine`."""
        self.index.remove(ids)
        self.index.save(str(self.folder / "index.usearch"))

    def count(self) -> int:
        """See `Engine`."""
        return len(self.index)


class Lance(Engine):
    """A table of LanceDB, without an index or with one of its kinds."""

    package = "lancedb"

    def __init__(self, folder: Path, dim: int, kind: str, refine: int = 0, probes: int = 0) -> None:
        super().__init__(folder, dim)
        self.kind, self.refine, self.probes = kind, refine, probes
        self.is_exact = not kind

    def _batch(self, ids: Ids, rows: Rows) -> Any:
        import pyarrow as pa

        flat = pa.array(np.ascontiguousarray(rows).reshape(-1))
        return pa.record_batch(
            [
                pa.array(ids),
                pa.array(ids % NUM_TAGS),
                pa.FixedSizeListArray.from_arrays(flat, self.dim),
            ],
            names=["id", "tag", "vector"],
        )

    def build(self, rows: Rows) -> None:
        """See `Engine`."""
        import lancedb

        batches = (self._batch(ids, part) for ids, part in in_batches(rows))
        first = next(batches)
        self.table = lancedb.connect(str(self.folder)).create_table("rows", first)
        for batch in batches:
            self.table.add(batch)
        if self.kind:
            self.table.create_index(metric="dot", vector_column_name="vector", index_type=self.kind)

    def open(self) -> None:
        """See `Engine`."""
        import lancedb

        self.table = lancedb.connect(str(self.folder)).open_table("rows")

    def _query(self, query: Rows) -> Any:
        asked = self.table.search(query, vector_column_name="vector")
        if not self.kind:
            asked = asked.distance_type("dot")
        if self.refine:
            asked = asked.refine_factor(self.refine)
        if self.probes:
            asked = asked.nprobes(self.probes)
        return asked.select(["id"]).limit(NUM_HITS)

    def search(self, query: Rows) -> Ids:
        """See `Engine`."""
        return self._query(query).to_arrow()["id"].to_numpy()

    def search_tag(self, query: Rows, tag: int) -> Ids:
        """See `Engine`."""
        asked = self._query(query).where(f"tag = {tag}", prefilter=True)
        return asked.to_arrow()["id"].to_numpy()

    def add(self, ids: Ids, rows: Rows) -> None:
        """See `Engine`."""
        self.table.add(self._batch(ids, rows))

    def delete(self, ids: Ids) -> None:
        """See `Engine`."""
        self.table.delete(f"id in ({', '.join(map(str, ids.tolist()))})")

    def count(self) -> int:
        """See `Engine`."""
        return int(self.table.count_rows())


class DuckDB(Engine):
    """A table of DuckDB, scanned, or with HNSW of its extension vss."""

    package = "duckdb"

    def __init__(self, folder: Path, dim: int, *, hnsw: bool) -> None:
        super().__init__(folder, dim)
        self.hnsw = self.is_graph = hnsw
        self.is_exact = not hnsw

    def _connect(self) -> None:
        import duckdb

        self.db = duckdb.connect(str(self.folder / "rows.duckdb"))
        if self.hnsw:
            # Fetched from DuckDB's own server; not a part of the wheel.
            self.db.execute("INSTALL vss")
            self.db.execute("LOAD vss")
            self.db.execute("SET GLOBAL hnsw_enable_experimental_persistence = true")

    open = _connect

    def _insert(self, ids: Ids, rows: Rows) -> None:
        import pyarrow as pa

        flat = pa.array(np.ascontiguousarray(rows).reshape(-1))
        part = pa.table({"id": ids, "vector": pa.FixedSizeListArray.from_arrays(flat, self.dim)})
        self.db.register("part", part)
        self.db.execute(f"INSERT INTO rows SELECT id, id % {NUM_TAGS}, vector FROM part")
        self.db.unregister("part")

    def build(self, rows: Rows) -> None:
        """See `Engine`."""
        self._connect()
        self.db.execute(f"CREATE TABLE rows (id BIGINT, tag BIGINT, vector FLOAT[{self.dim}])")
        for ids, part in in_batches(rows):
            self._insert(ids, part)
        if self.hnsw:
            self.db.execute("CREATE INDEX near ON rows USING HNSW (vector) WITH (metric = 'ip')")
        self.db.execute("CHECKPOINT")

    def _ask(self, query: Rows, condition: str) -> Ids:
        found = self.db.execute(
            f"SELECT id FROM rows {condition} ORDER BY "
            f"array_negative_inner_product(vector, ?::FLOAT[{self.dim}]) LIMIT {NUM_HITS}",
            [query.tolist()],
        )
        return np.array([row[0] for row in found.fetchall()], np.int64)

    def search(self, query: Rows) -> Ids:
        """See `Engine`."""
        return self._ask(query, "")

    def search_tag(self, query: Rows, tag: int) -> Ids:
        """See `Engine`."""
        return self._ask(query, f"WHERE tag = {tag}")

    def add(self, ids: Ids, rows: Rows) -> None:
        """See `Engine`."""
        self._insert(ids, rows)

    def delete(self, ids: Ids) -> None:
        """See `Engine`."""
        self.db.execute("DELETE FROM rows WHERE id = ANY (?)", [ids.tolist()])

    def count(self) -> int:
        """See `Engine`."""
        found = self.db.execute("SELECT count(*) FROM rows").fetchone()
        return int(found[0]) if found else 0


class SqliteVec(Engine):
    """A vec0 table of sqlite-vec, which scans all rows."""

    package = "sqlite-vec"
    is_exact = True

    def open(self) -> None:
        """See `Engine`."""
        import sqlite_vec

        self.db = sqlite3.connect(self.folder / "rows.sqlite")
        self.db.enable_load_extension(True)
        sqlite_vec.load(self.db)

    def build(self, rows: Rows) -> None:
        """See `Engine`."""
        self.open()
        self.db.execute(
            "CREATE VIRTUAL TABLE rows USING vec0(id INTEGER PRIMARY KEY, tag INTEGER, "
            f"vector float[{self.dim}] distance_metric=cosine)"
        )
        for ids, part in in_batches(rows):
            self.add(ids, part)

    def _ask(self, query: Rows, condition: str) -> Ids:
        found = self.db.execute(
            f"SELECT id FROM rows WHERE vector MATCH ? AND k = {NUM_HITS} {condition}",
            (query.astype("<f4").tobytes(),),
        )
        return np.array([row[0] for row in found.fetchall()], np.int64)

    def search(self, query: Rows) -> Ids:
        """See `Engine`."""
        return self._ask(query, "")

    def search_tag(self, query: Rows, tag: int) -> Ids:
        """See `Engine`."""
        return self._ask(query, f"AND tag = {tag}")

    def add(self, ids: Ids, rows: Rows) -> None:
        """See `Engine`."""
        values = [
            (each, each % NUM_TAGS, row.astype("<f4").tobytes())
            for each, row in zip(ids.tolist(), rows, strict=True)
        ]
        with self.db:
            self.db.executemany("INSERT INTO rows (id, tag, vector) VALUES (?, ?, ?)", values)

    def delete(self, ids: Ids) -> None:
        """See `Engine`."""
        with self.db:
            self.db.executemany("DELETE FROM rows WHERE id = ?", [(each,) for each in ids.tolist()])

    def count(self) -> int:
        """See `Engine`."""
        return int(self.db.execute("SELECT count(*) FROM rows").fetchone()[0])


ENGINES: dict[str, Callable[[Path, int], Engine]] = {
    "clip_rt.search": Ours,
    "numpy, float32, scanned": Numpy,
    "faiss, flat": lambda folder, dim: Faiss(folder, dim, "Flat"),
    "faiss, 8-bit, scanned": lambda folder, dim: Faiss(folder, dim, "SQ8"),
    "faiss, HNSW32, ef 256": lambda folder, dim: Faiss(folder, dim, "HNSW32", 256),
    "usearch, float16, ef 256": lambda folder, dim: Usearch(folder, dim, "f16", 256),
    "LanceDB, scanned": lambda folder, dim: Lance(folder, dim, ""),
    "LanceDB, IVF_PQ, 20 probes, refine 50": lambda folder, dim: Lance(
        folder, dim, "IVF_PQ", 50, 20
    ),
    "LanceDB, IVF_RQ, all probes, refine 100": lambda folder, dim: Lance(
        folder, dim, "IVF_RQ", 100, 100_000
    ),
    "DuckDB, scanned": lambda folder, dim: DuckDB(folder, dim, hnsw=False),
    "DuckDB, vss": lambda folder, dim: DuckDB(folder, dim, hnsw=True),
    "sqlite-vec, float32": SqliteVec,
}
"""By what the result calls them."""


def clear(folder: Path) -> None:
    """Make a folder empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
