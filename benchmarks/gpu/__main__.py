"""A GPU's figures: rates, parity, encoders, training, preprocessing, SigLIP. JSON, tables, plots.

    python -m benchmarks.gpu                          # 6 minutes, on any machine with CUDA
    python -m benchmarks.gpu --minutes 12 --stage device --stage encoders
    python -m benchmarks.gpu --rehearse               # every stage at tiny size, without a GPU
    python -m benchmarks.gpu --render benchmarks/results    # docs/gpus.md of the newest run there

Stages run in order of worth, each within its share of the time. What is not installed is left out,
and named. The JSON is written after every part of a stage; what is there of a run that was cut off
can be rendered.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from tyro.conf import FlagCreatePairsOff, UseAppendAction

from benchmarks.gpu import document
from benchmarks.gpu.measuring import Measuring
from benchmarks.gpu.orders import Order
from clip_rt.errors import InputError
from clip_rt_commands import program
from clip_rt_commands.errors import command

ROOT = Path(__file__).resolve().parents[2]
RESULTS_DIR, REHEARSAL_DIR = ROOT / "benchmarks/results", ROOT / "build/gpu"
SHARES = {
    "device": 0.08,
    "parity": 0.22,
    "encoders": 0.33,
    "training": 0.18,
    "preprocessing": 0.07,
    "siglip": 0.12,
}
"""Stages in order, and of the time what each may take; what one leaves goes to those after it."""
GRACE_S = 45.0
"""A stage that overran its time by so much is ended, whatever it does."""
WIDTH = 132
START_S = 60.0
"""For a new process to import torch and to open the device."""


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """What is measured, for how long, and where the results go."""

    minutes: float = 6.0
    """For all stages together."""
    out: Path | None = None
    """Folder of the results; else benchmarks/results, of a rehearsal build/gpu."""
    stage: UseAppendAction[tuple[str, ...]] = ()
    """Stages: device, parity, encoders, training, preprocessing, siglip; without it, all."""
    rehearse: FlagCreatePairsOff[bool] = False
    """Run every stage at tiny size on the processor."""
    render: Path | None = None
    """JSON of a run, or a folder with some: write docs/gpus.md of it, and measure nothing."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if not 0.1 <= self.minutes <= 600:
            raise InputError(f"--minutes is {self.minutes}; it must be from 0.1 to 600.")
        for each in self.stage:
            if each not in SHARES:
                raise InputError(
                    f"no stage is called {each[:80]!r}; there are {', '.join(SHARES)}."
                )

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in order."""
        return tuple(name for name in SHARES if not self.stage or name in self.stage)

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or (REHEARSAL_DIR if self.rehearse else RESULTS_DIR)


def measure(config: GpuConfig, console: Console) -> tuple[dict[str, Any], Path]:
    """Run the stages, and write the document after every part of each."""
    run = document.begin(minutes=config.minutes, is_rehearsal=config.rehearse, stages=config.stages)
    path = document.path_of(run, config.folder)
    document.write(path, run)
    ends_at_s = time.monotonic() + 60 * config.minutes
    with tempfile.TemporaryDirectory(prefix="clip_rt-gpu-") as made:
        measuring = Measuring(Path(made), is_rehearsal=config.rehearse)
        try:
            for place, name in enumerate(config.stages):
                left_s = ends_at_s - time.monotonic()
                rest = sum(SHARES[each] for each in config.stages[place:])
                _measure_stage(run, path, measuring, name, max(0.0, left_s) * SHARES[name] / rest)
                stage = run["stages"][name]
                console.print(f"{name}: {stage['status']}, {stage['seconds']:.1f} s")
            measuring.end(grace_s=GRACE_S)
        finally:
            measuring.end()
    return run, path


def _measure_stage(
    run: dict[str, Any], path: Path, measuring: Measuring, name: str, budget_s: float
) -> None:
    """Run one stage; it ends, is ended, or the process of it dies."""
    start_s = time.monotonic()
    stage: dict[str, Any] = {"status": "running", "seconds": 0.0, "budget_s": round(budget_s, 1)}
    run["stages"][name] = stage
    earlier = {each: found.get("result", {}) for each, found in run["stages"].items()}
    document.write(path, run)
    limit_s = budget_s + GRACE_S + (START_S if measuring.pid is None else 0.0)
    status, error = "cut off", f"it was still at work {GRACE_S:.0f} s after its time was over"
    try:
        measuring.order(Order(stage=name, budget_s=budget_s, earlier=earlier))
        while part := measuring.receive(start_s + limit_s - time.monotonic()):
            run["installed"] = dict(part.found)
            stage["result"] = dict(part.result)
            stage["seconds"] = round(time.monotonic() - start_s, 1)
            if part.is_last:
                status, error = ("failed" if part.error else "finished"), part.error
                break
            document.write(path, run)
    except (EOFError, OSError):
        error = "its process died"
    if status == "cut off":
        measuring.end()
    stage["status"] = status
    stage["seconds"] = round(time.monotonic() - start_s, 1)
    if error:
        stage["error"] = error
    document.write(path, run)


def render(source: Path, console: Console) -> None:
    """Write the page of a run, or of none where a folder holds no run.

    Raises:
        InputError: it is no run, or a rehearsal.
    """
    from benchmarks.gpu import page

    found = document.newest(source) if source.is_dir() else source
    run = None if found is None else document.read(found)
    if run is not None and run["is_rehearsal"]:
        raise InputError(f"{found} is a rehearsal: its figures are those of a processor.")
    page.PAGE.write_text(page.render(run, found), encoding="utf-8")
    console.print(f"written to {page.PAGE}", highlight=False, soft_wrap=True)


def main(config: GpuConfig) -> None:
    """Measure, or render.

    Raises:
        InputError: there is no GPU, or what is to be rendered is no run.
    """
    # Where nobody looks on, tables need not be as narrow as a screen.
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if config.render is not None:
        render(config.render, console)
        return
    import torch

    if not config.rehearse and not torch.cuda.is_available():
        raise InputError(
            f"torch {torch.__version__} sees no GPU here; --rehearse runs every stage without one."
        )
    from benchmarks.gpu.plots import render_png
    from benchmarks.gpu.tables import show

    run, path = measure(config, console)
    show(run, console)
    picture = path.with_suffix(".png")
    for each in (path, *([picture] if render_png(run, picture) else [])):
        console.print(f"written to {each}", highlight=False, soft_wrap=True)
    if any(stage["status"] != "finished" for stage in run["stages"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    with command():
        main(tyro.cli(GpuConfig, prog=program("benchmarks.gpu"), description=__doc__))
