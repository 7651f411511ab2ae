"""Databases with vectors among their types: LanceDB, DuckDB, SQLite with sqlite-vec."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.vector_store_engine import NUM_HITS, NUM_TAGS, Engine, Ids, Rows, in_batches


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
