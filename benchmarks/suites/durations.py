"""What is done now and then, each once, in a process of its own: exports, an engine, training."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.findings import Duration
from benchmarks.resources import peak_mib

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 1800.0
PAIRS, STEPS = 32, 3
SPAWN = multiprocessing.get_context("spawn")


def measure_durations(
    *, model: str, weights: str, say: Callable[[str], None]
) -> Iterator[Duration | str]:
    """Time the export of a model, what else is made of it, and a step of its training.

    Nothing that another export has left is used.

    Args:
        model: Architecture.
        weights: As `export.onnx` takes them.
        say: Told what is measured next.

    Yields:
        What it took; or why it could not be measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        common = ["--model", model, "--weights", weights, "--cache", f"{folder}/cache"]
        publish = ["--repository", f"{folder}/models"]
        jobs: list[tuple[str, str, list[str]]] = [
            ("export to ONNX, FP32", "both towers, with the parity gate", ["export.onnx", *publish])
        ]
        if _has("nncf", "openvino"):
            more = ["--precision", "int8", "--name", "int8"]
            note = "both towers, from the FP32 ONNX files, with the parity gate"
            jobs.append(("export to INT8", note, ["export.onnx", *publish, *more]))
        else:
            yield "export to INT8: nncf and openvino are not installed"
        if _has("tensorrt_rtx") or _has("tensorrt_rtx_bindings"):
            more = ["--runtime", "rtx", "--engines", f"{folder}/engines"]
            note = "both towers, compiled without a GPU, with the parity gate of their ONNX files"
            jobs.append(("TensorRT for RTX engines", note, ["export.trt", *more]))
        else:
            yield "TensorRT for RTX engines: tensorrt_rtx is not installed"
        for what, note, arguments in jobs:
            say(what)
            yield time_command([sys.executable, "-m", *arguments, *common], what, note)
    if _has("open_clip", "torch"):
        say("training step")
        yield from _training_steps()
    else:
        yield "training step: open_clip and torch are not installed"


def time_command(command: Sequence[str], what: str, note: str) -> Duration | str:
    """Run a command from the checkout's root and say how long it took, or its last words."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        try:
            done, elapsed_s, rss_mib = pool.submit(_run, command).result()
        except subprocess.TimeoutExpired as error:
            return f"{what}: {error}"
    if done.returncode:
        words = done.stdout.strip().splitlines()[-3:]
        return f"{what}: exit code {done.returncode}: {' | '.join(words)}"
    return Duration(what=what, seconds=elapsed_s, peak_rss_mib=rss_mib, note=note)


def _run(command: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], float, float]:
    """Be a process that has this one child, so that the most its children held is that."""
    start_s = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S,
    )
    elapsed_s = time.perf_counter() - start_s
    return done, elapsed_s, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def _training_steps() -> Iterator[Duration | str]:
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        try:
            steps_s, rss_mib = pool.submit(_time_training_steps).result(timeout=TIMEOUT_S)
        except Exception as error:  # Whatever a peer's package raises, the rest is worth its time.
            yield f"training step: {error!r}"
            return
    note = f"ViT-B/32, FP32, {PAIRS} pairs, median of {STEPS} by turns; memory of all together"
    for name, seconds in steps_s.items():
        yield Duration(
            what=f"training step, {name}", seconds=seconds, peak_rss_mib=rss_mib, note=note
        )


def _time_training_steps() -> tuple[dict[str, float], float]:
    """Be the process that trains."""
    import torch

    from benchmarks.studies.training_step import measure

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found = measure("fp32", PAIRS, STEPS)
    return {name: row["median_s"] for name, row in found.items()}, peak_mib(os.getpid())


def _has(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)
