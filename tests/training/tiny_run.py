"""A model and data so small that a whole run takes seconds; run as a program it trains."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_rt.specs import MODELS, ModelSpec, TextSpec, ViTSpec
from training import build, run
from training.config import TrainConfig
from training.data.batches import Batch, BatchStream

TINY = ModelSpec(
    name="tiny@32px", side_px=32, embedding_dim=16,
    image=ViTSpec(patch_px=8, width=32, layers=2, heads=2),
    text=TextSpec(width=32, layers=2, heads=2),
)  # fmt: skip


def write_classes(folder: Path, *, per_class: int = 8) -> Path:
    """Make noisy images of a few colours, in a folder for each."""
    rng = np.random.default_rng(0)
    for name, colour in {"red": 0, "green": 1, "blue": 2}.items():
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = rng.integers(0, 120, (40, 40, 3), dtype=np.uint8)
            pixels[..., colour] += 120
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def config(data: Path, out_dir: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "model": TINY.name, "data": (str(data),), "out_dir": out_dir, "batch_size": 6,
        "total_steps": 12, "warmup_steps": 2, "log_every_steps": 1, "eval_every_steps": 3,
        "num_workers": 0, "num_threads": 1, "device": "cpu",
        "peak_lr": 1e-3, "ema_decay": 0.998,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


class Poison:
    """Batches of a run, some of whose images are not numbers."""

    def __init__(self, data: BatchStream, poisoned: tuple[int, ...]) -> None:
        self._data, self._poisoned = data, poisoned
        self.skips = data.skips

    def stream(self, start_step: int, **place: int) -> Iterator[Batch]:
        for step, batch in enumerate(self._data.stream(start_step, **place), start=start_step):
            bad = step in self._poisoned
            yield replace(batch, image_BCSS=batch.image_BCSS * torch.nan) if bad else batch


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Spoil what a run reads at these places of its data."""
    open_data = build.open_data
    monkeypatch.setattr(build, "open_data", lambda *args: Poison(open_data(*args), steps))


if __name__ == "__main__":
    MODELS[TINY.name] = TINY
    sys.exit(run.main(run.parse()))
