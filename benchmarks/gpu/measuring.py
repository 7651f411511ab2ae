"""The process that measures, as the one that writes sees it.

Apart from each other, so that a stage which hangs, or breaks the CUDA context, can be ended and the
next one begun anew, and so that what was written stays whatever happens to the other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from benchmarks.gpu.orders import Order, Part


class Measuring:
    """Measures stages in a process of its own, begun anew where that had to be ended.

    Args:
        folder: For what is made: ONNX files, engines, data.
        is_rehearsal: Measure on the processor, and everything small.
    """

    def __init__(self, folder: Path, *, is_rehearsal: bool) -> None:
        self._folder, self._is_rehearsal = folder, is_rehearsal
        self._process: SpawnProcess | None = None
        self._connection: Connection[Any, Any] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, where there is one."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Begin the process, unless it is there."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(
                target=_work, args=(theirs, self._folder, self._is_rehearsal)
            )
            self._process.start()
            theirs.close()

    def order(self, order: Order) -> None:
        """Let it measure a stage.

        Raises:
            OSError: the process is gone.
        """
        self.start()
        assert self._connection is not None
        self._connection.send(order)

    def receive(self, timeout_s: float) -> Part | None:
        """Return what was found next; None when nothing came in that time.

        Raises:
            EOFError, OSError: the process is gone.
        """
        assert self._connection is not None
        if not self._connection.poll(max(0.0, timeout_s)):
            return None
        part: Part = self._connection.recv()
        return part

    def end(self, *, grace_s: float = 0.0) -> None:
        """End the process, which has some time to end by itself."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.join(grace_s)
            assert self._process.pid is not None
            with suppress(ProcessLookupError):  # No group yet, or no process any more.
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
        self._process = self._connection = None


def _work(connection: Any, folder: Path, is_rehearsal: bool) -> None:
    # Here, because only the process that measures needs torch.
    from benchmarks.gpu.worker import work

    work(connection, folder, is_rehearsal)
