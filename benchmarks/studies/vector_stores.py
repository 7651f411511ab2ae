"""Which engine keeps the vectors of an index of images: speed, recall, costs, crashes, packaging.

    python -m benchmarks.studies.vector_stores                       # 100,000 and 1,000,000 rows
    python -m benchmarks.studies.vector_stores --rows 100000 --engine clip_rt.search

Rows are unit vectors of 512 numbers: without any structure, which is the hard case of every
approximate index, and in clusters, as embeddings are. Each engine runs in a process of its own, one
after the other, and is asked one query at a time. What is not installed is absent, with the reason.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from benchmarks.record import save
from benchmarks.studies.vector_store_engine import (
    NUM_HITS,
    NUM_TAGS,
    Engine,
    Rows,
    clear,
    in_batches,
)
from benchmarks.studies.vector_store_engines import ENGINES
from clip_rt.errors import InputError
from clip_rt_commands import program
from clip_rt_commands.errors import command

DIM = 512
CLUSTER_ROWS, CLUSTER_SPREAD = 1000, 0.8
"""Rows of a cluster on average, and how far they are from its centre, which is of length 1."""
NUM_QUERIES = 200
NUM_CHANGED = 1000
BUILD_LIMIT_S = 420.0
"""An index that would be built for longer, by its build at the smaller number of rows, is left
out; graphs are taken to need 1.5 times as long for each row of ten times as many."""
MAX_QUERIES_S, PROCESS_LIMIT_S = 8.0, 600.0
CRASH_ROWS, CRASH_BATCH, NUM_CRASHES = 5000, 100, 5
SIZES = (100_000, 1_000_000)
DATA = ("random", "clustered")


@dataclass(frozen=True, kw_only=True)
class VectorStoresConfig:
    """What is measured; the last three options are for the processes that the study starts."""

    rows: tuple[int, ...] = SIZES
    """Numbers of rows."""
    data: tuple[str, ...] = DATA
    """Kinds of rows."""
    engine: tuple[str, ...] = tuple(ENGINES)
    """Which engines, by their names in the result."""
    folder: Path = Path(tempfile.gettempdir()) / "clip_rt-vector-stores"
    """Where rows and indices are written; some 10 GB."""
    part: str = ""
    """Of the name of the result."""
    measure: Path | None = None
    """Measure one engine on the rows of this file."""
    crash: Path | None = None
    """Add rows to an index in this folder until killed."""
    count: Path | None = None
    """Count the rows of an index in this folder."""


def make_rows(kind: str, num: int, path: Path) -> None:
    """Write float32 (num, DIM) of length 1, and queries of the same kind."""
    generator = np.random.default_rng(1)
    num_clusters = max(num // CLUSTER_ROWS, 1)
    centres = _normalise(generator.standard_normal((num_clusters, DIM), np.float32))

    def make(count: int) -> Rows:
        noise = _normalise(generator.standard_normal((count, DIM), np.float32))
        if kind == "random":
            return noise
        # Clusters of very different sizes, and neighbours that lie next to each other on disk.
        which = (generator.random(count) ** 2 * num_clusters).astype(np.int64)
        return _normalise(centres[which] + CLUSTER_SPREAD * noise)

    with path.open("wb") as file:
        for start in range(0, num, 65_536):
            file.write(make(min(65_536, num - start)).data)
    np.save(path.with_suffix(".queries.npy"), make(NUM_QUERIES))


def _normalise(rows: Rows) -> Rows:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def find_truth(rows: Rows, queries: Rows, tag: int | None = None) -> NDArray[np.int64]:
    """Return the nearest rows of each query, exactly, int64 (Q, NUM_HITS)."""
    best_scores = np.full((len(queries), NUM_HITS), -2.0, np.float32)
    best_ids = np.zeros((len(queries), NUM_HITS), np.int64)
    for ids, part in in_batches(rows):
        scores = queries @ part.T
        if tag is not None:
            scores[:, ids % NUM_TAGS != tag] = -2
        joined = np.concatenate([best_scores, scores], axis=1)
        joined_ids = np.concatenate([best_ids, np.broadcast_to(ids, scores.shape)], axis=1)
        order = np.argpartition(-joined, NUM_HITS, axis=1)[:, :NUM_HITS]
        best_scores = np.take_along_axis(joined, order, axis=1)
        best_ids = np.take_along_axis(joined_ids, order, axis=1)
    return best_ids


def recall(found: Sequence[NDArray[np.int64]], truth: NDArray[np.int64]) -> float:
    """Return the share of the nearest that were found."""
    # Of slow engines not all queries are asked.
    pairs = zip(found, truth, strict=False)
    shares = [len(set(a.tolist()) & set(b.tolist())) / NUM_HITS for a, b in pairs]
    return float(np.mean(shares))


def time_queries(
    search: Callable[[Rows], NDArray[np.int64]], queries: Rows, truth: NDArray[np.int64]
) -> dict[str, float]:
    """Ask one query at a time, after some that do not count."""
    for query in queries[:3]:
        search(query)
    times_ms, cpu_ms, found = [], [], []
    end_s = time.perf_counter() + MAX_QUERIES_S
    for query in queries:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        found.append(search(query))
        times_ms.append(1000 * (time.perf_counter() - start_s))
        cpu_ms.append(1000 * (time.process_time() - start_cpu_s))
        if time.perf_counter() > end_s:
            break
    return {
        # Of a machine that is busy otherwise the first says more than the second.
        "p05_ms": round(float(np.percentile(times_ms, 5)), 3),
        "p50_ms": round(float(np.percentile(times_ms, 50)), 3),
        "p99_ms": round(float(np.percentile(times_ms, 99)), 3),
        "p50_cpu_ms": round(float(np.percentile(cpu_ms, 50)), 3),
        "recall_at_10": round(recall(found, truth), 4),
        "queries": len(found),
    }


def measure(name: str, path: Path, folder: Path) -> dict[str, Any]:
    """Build, ask and change one engine's index in this process."""
    rows: Rows = np.memmap(path, "<f4", "r").reshape(-1, DIM)
    queries = np.load(path.with_suffix(".queries.npy"))
    truth = np.load(path.with_suffix(".truth.npy"))
    tag_truth = np.load(path.with_suffix(".tag.npy"))
    clear(folder)
    engine = ENGINES[name](folder, DIM)

    def timed(work: Callable[[], object]) -> float:
        start_s = time.perf_counter()
        work()
        return round(time.perf_counter() - start_s, 4)

    result: dict[str, Any] = {"build_s": timed(lambda: engine.build(rows))}
    result["build_peak_rss_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["disk_bytes"] = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
    engine = ENGINES[name](folder, DIM)
    result["open_s"] = timed(engine.open)
    result["first_query_s"] = timed(lambda: engine.search(queries[0]))
    result |= time_queries(engine.search, queries, truth)
    result["rss_bytes"], result["private_bytes"] = _memory()
    result["load_1min"] = round(os.getloadavg()[0], 2)
    if engine.has_filters:
        with _or_reason(result, "filter"):
            result["filter"] = time_queries(
                lambda query: engine.search_tag(query, 3), queries[:50], tag_truth[:50]
            )
    changed = np.ascontiguousarray(rows[:NUM_CHANGED][::-1])
    ids = len(rows) + np.arange(NUM_CHANGED)
    with _or_reason(result, "add_1000_s"):
        result["add_1000_s"] = timed(lambda: engine.add(ids, changed))
    with _or_reason(result, "delete_1000_s"):
        result["delete_1000_s"] = timed(lambda: engine.delete(ids))
    return result


@contextlib.contextmanager
def _or_reason(result: dict[str, Any], key: str) -> Any:
    """Note what an engine cannot do."""
    try:
        yield
    # Each engine has its own errors.
    except Exception as error:
        result[key] = f"{type(error).__name__}: {str(error)[:160]}"


def _memory() -> tuple[int, int]:
    """Return the memory that this process has, and what of it is no mapped file, in bytes."""
    fields = {}
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        key, _, value = line.partition(":")
        fields[key] = value.split()
    return 1024 * int(fields["VmRSS"][0]), 1024 * int(fields["RssAnon"][0])


def add_until_killed(name: str, folder: Path) -> None:
    """Build a small index, then add to it and say so, until somebody ends this process."""
    generator = np.random.default_rng(2)
    clear(folder)
    engine = ENGINES[name](folder, DIM)
    engine.build(_normalise(generator.standard_normal((CRASH_ROWS, DIM), np.float32)))
    number = CRASH_ROWS
    while True:
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        rows = _normalise(generator.standard_normal((CRASH_BATCH, DIM), np.float32))
        engine.add(number + np.arange(CRASH_BATCH), rows)
        number += CRASH_BATCH


def crash(name: str, folder: Path) -> dict[str, Any]:
    """Kill an engine while it adds rows; count how often what it had acknowledged was there."""
    outcome: dict[str, Any] = {"kills": 0, "intact": 0, "lost": 0, "unreadable": 0}
    for number in range(NUM_CRASHES):
        writer = subprocess.Popen(
            [*_myself(name), "--crash", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert writer.stdout is not None
        first = writer.stdout.readline()
        if not first:
            writer.wait()
            return outcome | {"error": "it did not come to add"}
        time.sleep(0.35 + 0.13 * number)
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged = int([first, *writer.stdout.read().split("\n")[:-1]][-1])
        writer.wait()
        outcome["kills"] += 1
        counted = _run(name, "--count", str(folder))
        if isinstance(counted, str):
            outcome["unreadable"] += 1
            outcome["error"] = counted
        else:
            outcome["intact" if counted["rows"] >= acknowledged else "lost"] += 1
    return outcome


def count(name: str, folder: Path) -> dict[str, Any]:
    """Open an index and count its rows, and ask it something."""
    engine: Engine = ENGINES[name](folder, DIM)
    engine.open()
    query = np.zeros(DIM, np.float32)
    query[0] = 1
    assert len(engine.search(query)) == NUM_HITS
    return {"rows": engine.count()}


def describe_package(package: str) -> dict[str, Any]:
    """Return version, licence and installed size of a distribution, without what it needs."""
    found = importlib.metadata.distribution(package)
    files = [Path(str(found.locate_file(each))) for each in found.files or ()]
    licences = found.metadata.get_all("License-Expression") or found.metadata.get_all("License")
    licence = (licences or [""])[0]
    classifiers = [
        each.rpartition(" :: ")[2]
        for each in found.metadata.get_all("Classifier") or ()
        if each.startswith("License ::")
    ]
    return {
        "version": found.version,
        "licence": (licence.splitlines() or [""])[0][:60] or ", ".join(classifiers),
        "installed_bytes": sum(each.stat().st_size for each in files if each.is_file()),
        "requires": [each for each in found.requires or () if "extra ==" not in each],
    }


def _myself(name: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.studies.vector_stores", "--engine", name]


def _run(name: str, *arguments: str) -> dict[str, Any] | str:
    """Run this study in another process for one engine; return its JSON, or why there is none."""
    try:
        done = subprocess.run(
            [*_myself(name), *arguments], capture_output=True, text=True, timeout=PROCESS_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"not done after {PROCESS_LIMIT_S:g} s"
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    lines = [each for each in done.stderr.strip().splitlines() if each.strip()]
    return (lines or ["it said nothing"])[-1][:300]


def run(config: VectorStoresConfig) -> dict[str, Any]:
    """Measure all engines on all rows."""
    config.folder.mkdir(parents=True, exist_ok=True)
    packages = {}
    for package in sorted({_package(name) for name in config.engine}):
        try:
            packages[package] = describe_package(package)
        except importlib.metadata.PackageNotFoundError:
            packages[package] = {"absent": f"{package} is not installed"}
    results: dict[str, Any] = {name: {} for name in config.engine}
    build_s: dict[tuple[str, str], tuple[int, float]] = {}
    for num in sorted(config.rows):
        for kind in config.data:
            path = config.folder / f"{kind}-{num}.f32"
            make_rows(kind, num, path)
            rows: Rows = np.memmap(path, "<f4", "r").reshape(-1, DIM)
            queries = np.load(path.with_suffix(".queries.npy"))
            np.save(path.with_suffix(".truth.npy"), find_truth(rows, queries))
            np.save(path.with_suffix(".tag.npy"), find_truth(rows, queries[:50], 3))
            for name in config.engine:
                if kind != config.data[0] and ENGINES[name](config.folder, DIM).is_exact:
                    continue  # It takes what it takes, whatever the rows are.
                if "absent" in packages[_package(name)]:
                    results[name]["absent"] = packages[_package(name)]["absent"]
                    continue
                label = f"{kind}, {num} rows"
                predicted_s = 0.0
                if (name, kind) in build_s:
                    before, took_s = build_s[name, kind]
                    is_graph = ENGINES[name](config.folder, DIM).is_graph
                    predicted_s = took_s * num / before * (1.5 if is_graph else 1.0)
                if predicted_s > BUILD_LIMIT_S:
                    results[name][label] = (
                        f"left out: it would be built for {predicted_s:.0f} s by its build at "
                        f"{before} rows"
                    )
                else:
                    folder = config.folder / "index"
                    found = _run(name, "--measure", str(path), "--folder", str(folder))
                    results[name][label] = found
                    if isinstance(found, dict):
                        build_s[name, kind] = num, found["build_s"]
                    clear(folder)
                print(name, label, results[name][label], flush=True)  # noqa: T201
            for each in config.folder.glob(f"{path.stem}.*"):
                each.unlink()
    for name in config.engine:
        if "absent" not in results[name] and _package(name) != "numpy":
            results[name]["killed while adding"] = crash(name, config.folder / "crash")
            print(name, results[name]["killed while adding"], flush=True)  # noqa: T201
    clear(config.folder / "crash")
    return {"dimensions": DIM, "queries": NUM_QUERIES, "packages": packages, "results": results}


def _package(name: str) -> str:
    return ENGINES[name](Path("."), DIM).package


def main(config: VectorStoresConfig) -> None:
    """Do what was asked for."""
    unknown = set(config.engine) - set(ENGINES)
    if unknown:
        raise InputError(f"there is no engine {min(unknown)!r}; there are {', '.join(ENGINES)}.")
    if config.measure is not None:
        print(json.dumps(measure(config.engine[0], config.measure, config.folder)))  # noqa: T201
    elif config.crash is not None:
        add_until_killed(config.engine[0], config.crash)
    elif config.count is not None:
        print(json.dumps(count(config.engine[0], config.count)))  # noqa: T201
    else:
        packages = ("numpy", "faiss-cpu", "usearch", "lancedb", "duckdb", "sqlite-vec", "pyarrow")
        results = run(config) | {"sqlite": __import__("sqlite3").sqlite_version}
        save("studies.vector_stores", results, packages=packages, part=config.part)


if __name__ == "__main__":
    with command():
        main(tyro.cli(VectorStoresConfig, prog=program(__spec__.name), description=__doc__))
