"""What is measured, on which pictures, and whether answers are equal before they are timed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import clip_rt
from benchmarks import photos
from benchmarks.contenders.runtimes import Encode, load_onnxruntime, load_openvino
from benchmarks.timing import take_rounds, time_once, way_of
from clip_rt.embedded.server import EmbeddedServer, acquire_server

INT8, FP16_WEIGHTS = "int8", "fp16_weights"
"""Precisions, and the names under which these forms of the model are served."""
TIMEOUT_S = 3600.0
START_TIMEOUT_S = 300.0
MAX_DIFFERENCE = 1e-4
"""Between embeddings of the same picture in batches of other sizes: sums in another order."""

BATCH_ROWS = 32
SINGLES_A_TURN = 10
Array = NDArray[Any]
Found = dict[str, Any]
"""Part of a result, as JSON has it."""
Runtime = Literal["onnxruntime", "onnxruntime, its default", "openvino"]
"""What `BareRuntime` can be; the second is ONNX Runtime whose threads spin as it likes best."""
console = Console()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, and how much of it."""

    repository: Path
    """Holds `model` in FP32, and its other forms."""
    scratch: Path
    """For caches."""
    model: str
    num_images: int
    num_rounds: int
    num_classes: int

    def client(self, model: str | None = None, **options: Any) -> clip_rt.Client:
        """Return a client of the embedded server over the repository."""
        return clip_rt.Client(
            repository=self.repository,
            model=model or self.model,
            timeout_s=TIMEOUT_S,
            start_timeout_s=START_TIMEOUT_S,
            **options,
        )

    def onnx_file(self, name: str) -> Path:
        """Return the file of a Triton model."""
        return self.repository / name / "1" / "model.onnx"


@contextmanager
def acquired(repository: Path) -> Iterator[EmbeddedServer]:
    """Yield the embedded server over a repository, which the clients of this process share."""
    server = acquire_server(repository, start_timeout_s=START_TIMEOUT_S)
    try:
        yield server
    finally:
        server.stop()


def check_equal(found: Array, expected: Array, what: str) -> float:
    """Return the largest difference of two sets of embeddings.

    Raises:
        ValueError: they are not the same embeddings; then no time of theirs means anything.
    """
    if found.shape != expected.shape:
        raise ValueError(f"{what}: embeddings are {found.shape} and {expected.shape}")
    difference = float(np.abs(found - expected).max())
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(f"{what}: embeddings differ by {difference:.1e}, above {MAX_DIFFERENCE}")
    return difference


def embed_singly(
    encode: Callable[[Any], NDArray[np.float32]],
    items: Sequence[Any],
    expected_NE: NDArray[np.float32],
    num_threads: int,
    latencies_s: list[float],
) -> float:
    """Embed every item in a call of its own, check all rows, and return the seconds of it all.

    Args:
        encode: A method of a client.
        items: N images or texts.
        expected_NE: What they are embedded to in bulk.
        num_threads: That call at once.
        latencies_s: Gets the seconds of each call.
    """
    found_NE = np.zeros_like(expected_NE)

    def call(n: int) -> None:
        (found_NE[n],) = encode(items[n])

    elapsed_s, each_s = run_threads(call, len(items), num_threads)
    check_equal(found_NE, expected_NE, f"items alone, from {num_threads} threads,")
    latencies_s += each_s
    return elapsed_s


def preprocessed(bench: Bench, client: clip_rt.Client) -> list[Array]:
    """Return the small pictures as the model reads them, uint8 (S, S, 3) each."""
    encoded = photos.jpegs(photos.SMALL_PX, bench.num_images)
    return list(clip_rt.preprocess(encoded, side_px=client.manifest.side_px))


def by_turns(
    ways: Mapping[str, Callable[[], float]], num_rounds: int, what: str
) -> dict[str, list[float]]:
    """Time ways that were called already, once in each round.

    Args:
        ways: Each returns its time in seconds.
        num_rounds: How often.
        what: Said meanwhile.
    """
    with console.status(what):
        each = {name: way_of(way) for name, way in ways.items()}
        return take_rounds(each, num_rounds, is_warm=True)


def one_by_one(
    call: Callable[[int], float], num_items: int, latencies_s: list[float]
) -> Callable[[], float]:
    """Make of a call for one item a turn of `SINGLES_A_TURN`, each going on where the last ended.

    Args:
        call: Gets the number of an item, and returns its time in seconds.
        num_items: After the last comes the first again.
        latencies_s: Gets the seconds of each call.
    """
    numbers = itertools.cycle(range(num_items))

    def turn() -> float:
        each_s = [call(n) for n in itertools.islice(numbers, SINGLES_A_TURN)]
        latencies_s.extend(each_s)
        return sum(each_s)

    return turn


def rates(times_s: Mapping[str, Sequence[float]], num_items: int, unit: str) -> Found:
    """Return the median throughput of each way, and all its rounds."""
    return {
        name: {
            f"{unit}_per_s": round(num_items / statistics.median(times), 2),
            "rounds_s": [round(each, 4) for each in times],
        }
        for name, times in times_s.items()
    }


def run_threads(
    call: Callable[[int], object], num_calls: int, num_threads: int
) -> tuple[float, list[float]]:
    """Make calls from threads that begin together, each thread one after another.

    Args:
        call: Gets the number of the call, 0 to `num_calls` - 1, each once.
        num_calls: Of all threads.
        num_threads: How many.

    Returns:
        Seconds from the common start to the last end, and the seconds of each call. What a call
        raises is raised.
    """
    barrier = threading.Barrier(num_threads + 1)

    def work(first: int) -> list[float]:
        calls = [partial(call, n) for n in range(first, num_calls, num_threads)]
        barrier.wait()
        return [time_once(each) for each in calls]

    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(work, first) for first in range(num_threads)]
        barrier.wait()
        elapsed_s = time_once(partial(wait, futures))
        return elapsed_s, [each for future in futures for each in future.result()]


def describe_latencies(latencies_s: Sequence[float]) -> dict[str, float]:
    """Return percentiles in milliseconds."""
    return {
        f"p{percent}_ms": round(1e3 * float(np.percentile(latencies_s, percent)), 2)
        for percent in (50, 90, 99)
    }


class BareRuntime:
    """A runtime on one tower in a process of its own, which works only when it is asked to.

    Args:
        file: The tower, ONNX.
        inputs: Rows it may be asked for.
        runtime: What runs it.
    """

    def __init__(self, file: Path, inputs: Array, *, runtime: Runtime = "onnxruntime") -> None:
        self._pool = ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_load_bare,
            initargs=(file, inputs, runtime),
        )
        self.pid = self._pool.submit(os.getpid).result()

    def __enter__(self) -> BareRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def encode(self, start: int, stop: int) -> tuple[list[float], NDArray[np.float32]]:
        """Embed some rows, `BATCH_ROWS` at a time.

        Returns:
            Seconds of each batch, measured over there, and float32 (stop - start, D).
        """
        return self._pool.submit(_run_bare, start, stop, BATCH_ROWS).result()

    def encode_one(self, row: int) -> float:
        """Embed one row alone, and return the seconds it took over there."""
        (time_s,), _ = self._pool.submit(_run_bare, row, row + 1, 1).result()
        return time_s


_bare: tuple[Encode, Array]
"""In the process of a `BareRuntime`: what encodes, and the rows."""


def _load_bare(file: Path, inputs: Array, runtime: Runtime) -> None:
    global _bare
    if runtime == "openvino":
        _bare = load_openvino(file), inputs
    else:
        _bare = load_onnxruntime(file, is_default=runtime != "onnxruntime"), inputs


def _run_bare(start: int, stop: int, batch_rows: int) -> tuple[list[float], NDArray[np.float32]]:
    encode, rows = _bare
    times_s, found = [], []
    for first in range(start, stop, batch_rows):
        start_s = time.perf_counter()
        found.append(encode(rows[first : min(first + batch_rows, stop)]))
        times_s.append(time.perf_counter() - start_s)
    return times_s, np.concatenate(found)
