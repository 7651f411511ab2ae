"""A model and data so small that a whole run takes seconds; run as a program it trains."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from clip_rt.specs import MODELS, ModelSpec, TextSpec, ViTSpec
from training import run
from training.config import TrainConfig

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
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


if __name__ == "__main__":
    MODELS[TINY.name] = TINY
    sys.exit(run.main(tyro.cli(TrainConfig)))
