"""The engines that are compared: ours, libraries of indices, and databases."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.vector_store_databases import DuckDB, Lance, SqliteVec
from benchmarks.studies.vector_store_engine import NUM_HITS, NUM_TAGS, Engine, Ids, Rows, in_batches


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
        self.index._store.tidy()

    def open(self) -> None:
        """See `Engine`."""
        from clip_rt.search.index import Index

        self.index = Index.open(self.folder, create=True)
        self.generation, self.model = self.index._begin_update(self.manifest)

    def _put(self, ids: Ids, part: Rows) -> None:
        from clip_rt.search.catalogue import Catalogue

        catalogue: Catalogue = self.index._catalogue
        current = self.index._store.current()
        self.index._store.vectors(current).write(current.num_rows, part)
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
        from clip_rt.search.where import EVERYWHERE

        return self._find(query, EVERYWHERE)

    def search_tag(self, query: Rows, tag: int) -> Ids:
        """See `Engine`."""
        from clip_rt.search.where import Where

        return self._find(query, Where(min_bytes=tag, max_bytes=tag))

    def add(self, ids: Ids, rows: Rows) -> None:
        """See `Engine`."""
        self._put(ids, rows)
        self.index._store.tidy()

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
            chosen = np.random.default_rng(0).permutation(len(rows))[:65_536]
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
