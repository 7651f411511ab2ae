"""What the client is held against: a runtime called directly, without a server."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

BATCH_ROWS = 32
Array = NDArray[Any]
Runtime = Literal["onnxruntime", "onnxruntime, its default", "openvino"]
"""What `BareRuntime` can be; the second is ONNX Runtime whose threads spin as it likes best."""


class BareRuntime:
    """A runtime on one tower in a process of its own, which works only when it is asked to.

    Args:
        file: The tower, ONNX.
        inputs: Rows it may be asked for; saved to `scratch`.
        scratch: Folder.
        runtime: What runs it.
    """

    def __init__(
        self, file: Path, inputs: Array, scratch: Path, *, runtime: Runtime = "onnxruntime"
    ) -> None:
        rows_file = scratch / f"{file.parents[1].name}_inputs.npy"
        np.save(rows_file, inputs)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_run_bare, args=(theirs, file, rows_file, runtime), daemon=True
        )
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def __enter__(self) -> BareRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def encode(self, start: int, stop: int) -> tuple[list[float], NDArray[np.float32]]:
        """Embed some rows, `BATCH_ROWS` at a time.

        Returns:
            Seconds of each batch, measured over there, and float32 (stop - start, D).
        """
        return self._ask(start, stop, BATCH_ROWS)

    def encode_one(self, row: int) -> float:
        """Embed one row alone, and return the seconds it took over there."""
        (time_s,), _ = self._ask(row, row + 1, 1)
        return time_s

    def _ask(self, *order: int) -> tuple[list[float], NDArray[np.float32]]:
        self._pipe.send(order)
        answer: tuple[list[float], NDArray[np.float32]] = self._pipe.recv()
        return answer


def _run_bare(pipe: Connection, file: Path, rows_file: Path, runtime: Runtime) -> None:
    """Be the other process of `BareRuntime`, until its end of the pipe is closed."""
    # Here, so that each is loaded only where it is run. Both have the options that
    # export/python_model.py gives them.
    if runtime == "openvino":
        from benchmarks.contenders import openvino

        encode = openvino.load(file)
    else:
        from benchmarks.contenders import onnxruntime

        encode = onnxruntime.load(file, is_default=runtime != "onnxruntime")
    rows = np.load(rows_file)
    pipe.send("ready")
    while True:
        try:
            start, stop, batch_rows = pipe.recv()
        except EOFError:
            return
        parts, times_s = [], []
        for first in range(start, stop, batch_rows):
            batch = rows[first : min(first + batch_rows, stop)]
            start_s = time.perf_counter()
            embeddings = encode(batch)
            times_s.append(time.perf_counter() - start_s)
            parts.append(embeddings)
        pipe.send((times_s, np.concatenate(parts)))
