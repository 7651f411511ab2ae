"""What the process that measures does: a stage comes in, what it found so far goes out."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import surroundings
from benchmarks.gpu.bench import Bench, error_in_words, full_scale, rehearsal_scale
from benchmarks.gpu.orders import Order, Part

MODULES = {
    "device": "rates",
    "parity": "agreement",
    "encoders": "encoders",
    "training": "steps",
    "preprocessing": "pictures",
    "siglip": "siglip",
}
"""What measures each stage, imported when it begins: one may need what is not installed."""


def work(connection: Connection, folder: Path, is_rehearsal: bool) -> None:
    """Measure what is ordered until the other side closes."""
    os.setpgrp()  # To be ended together with what it starts.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = torch.device("cpu" if is_rehearsal else "cuda:0")
    found = surroundings.find()
    # What answers are held against is FP32 to the last bit.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if is_rehearsal:
        torch.set_num_threads(1)
        scale = rehearsal_scale()
    else:
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
        scale = full_scale(memory_bytes / 2**30)
    bench = Bench(device=device, scale=scale, is_rehearsal=is_rehearsal, folder=folder, found=found)
    # One stream for everyone; ONNX Runtime cannot be given the default one.
    with nullcontext() if is_rehearsal else torch.cuda.stream(torch.cuda.Stream()):
        while True:
            try:
                order: Order = connection.recv()
            except EOFError:
                return
            bench.earlier = order.earlier
            bench.ends_at_s = time.monotonic() + order.budget_s
            result: Mapping[str, Any] = {}
            error = ""
            try:
                module = importlib.import_module(f"benchmarks.gpu.{MODULES[order.stage]}")
                for result in module.measure(bench):
                    connection.send(Part(result=result, found=found))
            except Exception as caught:
                traceback.print_exc()
                error = error_in_words(caught)
            connection.send(Part(result=result, is_last=True, error=error, found=found))
            bench.free()


def _end_with_parent() -> None:
    """End when the one that writes was killed: nobody would read what is measured."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
