"""What is measured, on which pictures, and whether answers are equal before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

import clip_rt
from benchmarks import photos
from benchmarks.serving.timing import console, run_threads
from clip_rt.embedded.server import EmbeddedServer, acquire_server, release_server

INT8 = "int8"
"""Name under which the INT8 form of the model is served."""
SMALL_PX, LARGE_PX = (640, 480), (4000, 3000)
TIMEOUT_S = 3600.0
START_TIMEOUT_S = 300.0
MAX_DIFFERENCE = 1e-4
"""Between embeddings of the same picture in batches of other sizes: sums in another order."""

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, and how much of it."""

    repository: Path
    """Holds `model` in FP32 and `INT8`."""
    scratch: Path
    """For inputs of other processes and for caches."""
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
        release_server(server)


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


@cache
def pictures(size: tuple[int, int], num: int) -> list[bytes]:
    """Return JPEG files of that many pictures."""
    indices = track(range(num), description="draw pictures", console=console, transient=True)
    return [photos.jpeg(size, index) for index in indices]


def preprocessed(bench: Bench, client: clip_rt.Client) -> list[Array]:
    """Return the small pictures as the model reads them, uint8 (S, S, 3) each."""
    encoded = pictures(SMALL_PX, bench.num_images)
    return list(clip_rt.preprocess(encoded, side_px=client.manifest.side_px))
