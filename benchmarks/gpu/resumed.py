"""A training run of 60 steps, killed after its first snapshot and resumed: does it get to its end?

Its data are a few images made here, so that it is the same wherever it runs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.gpu.bench import Bench

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS, SNAPSHOT_EVERY = 60, 20
CLASSES = {"red": 0, "green": 1, "blue": 2, "grey": None}
IMAGES_PER_CLASS = 16
LONGEST_S = 150.0
"""For either life of the run."""


def kill_and_resume(bench: Bench) -> dict[str, Any]:
    """Run, kill by SIGKILL, resume, and return what the log says.

    Raises:
        RuntimeError: the run ended otherwise; carries the end of what it said.
    """
    folder = bench.folder / "run"
    data = write_images(bench.folder / "images", side_px=64 if bench.is_rehearsal else 256)
    command = [
        *(sys.executable, "-m", "training.run", "--model", bench.scale.trained),
        *("--data", str(data), "--out-dir", str(folder), "--device", bench.device.type),
        *("--batch-size", str(bench.scale.trained_batch), "--total-steps", str(NUM_STEPS)),
        *("--eval-every-steps", str(SNAPSHOT_EVERY), "--log-every-steps", "1"),
        *("--num-workers", "0" if bench.is_rehearsal else "4"),
        *(("--num-threads", "1") if bench.is_rehearsal else ()),
    ]
    start_s = time.monotonic()
    said = bench.folder / "run.txt"
    with said.open("w", encoding="utf-8") as output:
        first = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            while not any((folder / "snapshots").glob("step_*.safetensors")):
                if first.poll() is not None or time.monotonic() - start_s > LONGEST_S:
                    raise RuntimeError(f"it made no snapshot: {said.read_text('utf-8')[-300:]}")
                time.sleep(0.02)
        finally:
            first.kill()
            first.wait()
        killed_at = _steps(folder)[-1]["step"]
        second = subprocess.run(
            [*command, "--resume"],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            timeout=LONGEST_S,
            check=False,
        )
    if second.returncode:
        raise RuntimeError(f"it did not go on: {said.read_text('utf-8')[-300:]}")
    lines = _steps(folder)
    losses = [line["loss"] for line in lines]
    return {
        "model": bench.scale.trained,
        "batch": bench.scale.trained_batch,
        "killed_at_step": killed_at,
        "steps_logged": [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1)),
        "is_finite": all(map(math.isfinite, losses)),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "seconds": round(time.monotonic() - start_s, 1),
    }


def write_images(folder: Path, *, side_px: int) -> Path:
    """Make noisy images of a few colours, in a folder for each."""
    rng = np.random.default_rng(0)
    for name, channel in CLASSES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(IMAGES_PER_CLASS):
            pixels = rng.integers(0, 120, (side_px, side_px, 3), dtype=np.uint8)
            if channel is not None:
                pixels[..., channel] += 120
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def _steps(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the log that are of updates."""
    text = (folder / "log.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [line for line in lines if "loss" in line]
