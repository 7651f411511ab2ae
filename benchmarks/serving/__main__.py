r"""What the client adds to the server behind it, held against bars: ViT-B/32, the embedded Triton.

    python -m benchmarks.serving
    python -m benchmarks.serving --only overhead,threads
    python -m benchmarks.serving --only classifier,cache --num-classes 100    # a quick look

Weights are random, since speed does not depend on them; the command of every export writes them
into a repository that is removed at the end. Everything is measured on one machine in one run, the
ways that are compared by turns, and what they answer is compared before anything is timed.

The measure of the client is a runtime called directly: ONNX Runtime, and OpenVINO, which runs the
FP32 models of the server. A process of its own loads the same file with the options that the server
uses, so with the same number of threads, which spin for a moment only. A process of its own,
because its threads must not be counted among the client's; and never at work while the client is,
because they would share the cores. With ONNX Runtime's own default, whose threads spin for long, it
is measured as well: a server that did would take the cores of its client.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.findings import Bar
from benchmarks.record import ROOT, describe_bar, save
from benchmarks.report.terminal import bar_table
from benchmarks.serving.bench import BATCH_ROWS, FP16_WEIGHTS, INT8, Bench, Found, acquired, console
from benchmarks.serving.classifier import measure_cache, measure_classifier
from benchmarks.serving.gateway import measure_overload
from benchmarks.serving.images import (
    measure_jpeg,
    measure_large_jpeg,
    measure_merging,
    measure_overhead,
    measure_threads,
)
from benchmarks.serving.in_process import measure_in_process
from benchmarks.serving.knee import measure_knee
from clip_rt.client import CACHE_VARIABLE
from clip_rt.errors import InputError
from clip_rt_commands import program
from clip_rt_commands.errors import command

MODEL = "ViT-B/32"
PARTS: Mapping[str, Callable[[Bench], tuple[Found, list[Bar]]]] = {
    "overhead": measure_overhead,
    "threads": measure_threads,
    "jpeg": measure_jpeg,
    "large_jpeg": measure_large_jpeg,
    "classifier": measure_classifier,
    "cache": measure_cache,
    "merging": measure_merging,
    "in_process": measure_in_process,
    "overload": measure_overload,
    "knee": measure_knee,
}


def export(repository: Path, model: str, cache_folder: Path) -> None:
    """Publish `model` in FP32 and its other forms, each with the command that anyone would use.

    Another process each time: torch shall not be in the one that is measured.
    """
    common = ["--model", model, "--weights", "random", "--repository", str(repository)]
    common += ["--max-batch-size", str(BATCH_ROWS), "--cache", str(cache_folder)]
    for extra in [], *(["--precision", name, "--name", name] for name in (FP16_WEIGHTS, INT8)):
        command = [sys.executable, "-m", "export.onnx", *common, *extra]
        subprocess.run(command, cwd=ROOT, check=True)


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """Measure, print a table, and write a dated JSON."""

    only: str = ",".join(PARTS)
    """Parts, with commas between them."""
    model: str = MODEL
    """Architecture."""
    num_images: int = 512
    """In bulk."""
    num_rounds: int = 3
    """Timed rounds of each comparison."""
    num_classes: int = 1000
    """Of the classifier, 1,000 at most."""
    repository: Path | None = None
    """Has the models already; otherwise they are exported."""

    def __post_init__(self) -> None:
        """Refuse parts that there are not."""
        if unknown := set(self.only.split(",")) - set(PARTS):
            raise InputError(f"--only names {', '.join(unknown)}; known are {', '.join(PARTS)}.")


def main(config: ServingConfig) -> int:
    """Measure each part; return 1 where one failed."""
    # No client shall find what another run has cached.
    os.environ.pop(CACHE_VARIABLE, None)
    load_before = os.getloadavg()[0]
    parts: dict[str, Found] = {}
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as folder:
        repository = config.repository or Path(folder, "models")
        if config.repository is None:
            export(repository, config.model, Path(folder, "exports"))
        bench = Bench(
            repository=repository,
            scratch=Path(folder),
            model=config.model,
            num_images=config.num_images,
            num_rounds=config.num_rounds,
            num_classes=config.num_classes,
        )
        # Held until the end, so that one server serves all.
        with acquired(repository):
            for name in config.only.split(","):
                start_s = time.perf_counter()
                try:
                    parts[name], found = PARTS[name](bench)
                    bars += found
                except Exception as error:  # The other parts are still worth their time.
                    console.print_exception()
                    parts[name] = {"failed": repr(error)}
                parts[name]["took_s"] = round(time.perf_counter() - start_s, 1)
                console.print(f"{name}: {parts[name]['took_s']} s")
    console.print(bar_table(bars))
    results = {
        "model": config.model,
        "num_threads": len(os.sched_getaffinity(0)),
        "num_rounds": config.num_rounds,
        "load_before": round(load_before, 2),
        "bars": [describe_bar(bar) for bar in bars],
        "parts": parts,
    }
    packages = ("nvidia-pytriton", "onnxruntime", "openvino", "pillow", "tritonclient")
    part = "" if set(parts) == set(PARTS) else "_".join(parts)
    save("serving", results, packages=packages, part=part)
    return int(any("failed" in part for part in parts.values()))


if __name__ == "__main__":
    with command():
        sys.exit(
            main(tyro.cli(ServingConfig, prog=program("benchmarks.serving"), description=__doc__))
        )
