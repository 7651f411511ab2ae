"""Time of one training step of ViT-B/32, ours and open_clip's, on the same batch by turns.

    python -m benchmarks.studies.training_step

A step is zeroed gradients, forward, InfoNCE, backward, clipping to norm 1 and AdamW, each as its
project's own training loop does them (open_clip: `open_clip_train/main.py` and `train.py`). Both
start from the same weights. Captions are padded to the context length, as open_clip's loader
pads them; the rows "cut" give us what our loader makes of captions of ordinary length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro
from torch import Tensor
from tyro.conf import UseAppendAction

from benchmarks.record import save
from benchmarks.studies.common import (
    MAX_NORM,
    PRECISIONS,
    WEIGHT_DECAY,
    Precision,
    make_batch,
    make_step,
    show,
)
from benchmarks.timing import speeds, take_rounds, time_each
from clip_rt.specs import find_spec
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training.accumulate import split_batch
from training.data.batches import Batch
from training.encoders.libraries import import_open_clip
from training.model import CLIP

CAPTION_TOKENS = 20
"""Start and end of text included; the rest of the 77 is padding."""
OPEN_CLIP = "open_clip"


@dataclass(frozen=True, kw_only=True)
class TrainingStepConfig:
    """Measure, print a table, and write a dated JSON."""

    batch_size: int = 32
    """Pairs of a step."""
    num_rounds: int = 9
    """Steps of each that are timed."""
    precision: UseAppendAction[tuple[str, ...]] = ()
    """fp32 or bf16; without it, both."""
    num_threads: int = 2
    """Threads of torch."""


def open_clip_step(
    open_clip: Any, reference: Any, batch: Batch, autocast: Precision
) -> Callable[[], Tensor]:
    """Prepare the step of `open_clip_train`, on what the open_clip package offers it."""
    loss_function = open_clip.ClipLoss()
    named = list(reference.named_parameters())
    plain = [p for name, p in named if p.ndim < 2 or "logit_scale" in name]
    decayed = [p for name, p in named if p.ndim >= 2 and "logit_scale" not in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": plain, "weight_decay": 0.0},
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
        ],
        lr=5e-4,
        betas=(0.9, 0.98),
        eps=1e-6,
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        with autocast():
            output = reference(batch.image_BCSS, batch.tokens_BL)
            loss = loss_function(**output, output_dict=True)["contrastive_loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM, norm_type=2.0)
        optimizer.step()
        with torch.no_grad():
            reference.logit_scale.clamp_(0, 4.6052)
        return loss.detach()

    return step


def measure(precision: str, batch_size: int, num_rounds: int) -> dict[str, Any]:
    """Time the steps by turns, after one of each that is not counted."""
    open_clip, autocast = import_open_clip(), PRECISIONS[precision]
    torch.manual_seed(0)
    reference = open_clip.create_model("ViT-B-32-quickgelu", output_dict=True).train()
    spec = find_spec("ViT-B/32")
    batch = make_batch(spec, batch_size, CAPTION_TOKENS)
    clips = [CLIP(spec).train() for _ in range(2)]
    for clip in clips:
        clip.load_state_dict(reference.state_dict())
    (cut,) = split_batch(batch, batch_size)
    steps = {
        OPEN_CLIP: open_clip_step(open_clip, reference, batch, autocast),
        "ours": make_step(clips[0], [batch], autocast),
        "ours, cut": make_step(clips[1], [cut], autocast),
    }
    losses: dict[str, list[float]] = {name: [] for name in steps}

    def take(name: str) -> None:
        losses[name].append(float(steps[name]()))

    times_s = take_rounds({name: time_each(partial(take, name)) for name in steps}, num_rounds)
    return {
        name: {
            "median_s": round(time_s.median, 3),
            "pairs_per_s": round(batch_size / time_s.median, 2),
            "speed_to_open_clip": round(speed.median, 3),
            "times_s": [round(each, 3) for each in times_s[name]],
            "losses": [round(each, 4) for each in losses[name]],
        }
        for name, (time_s, speed) in speeds(times_s, OPEN_CLIP).items()
    }


def main(config: TrainingStepConfig) -> None:
    """Measure each precision."""
    torch.set_num_threads(config.num_threads)
    results = {
        precision: measure(precision, config.batch_size, config.num_rounds)
        for precision in config.precision or PRECISIONS
    }
    figures = ("median_s", "pairs_per_s", "speed_to_open_clip")
    show(
        ("precision", "what", "s a step", "pairs/s", "speed to open_clip"),
        [
            (precision, name, *(row[each] for each in figures))
            for precision, found in results.items()
            for name, row in found.items()
        ],
    )
    settings = {"model": "ViT-B/32", "batch_size": config.batch_size}
    settings["num_threads"] = config.num_threads
    packages = ("torch", "open_clip_torch")
    save("studies.training_step", settings | {"results": results}, packages=packages)


if __name__ == "__main__":
    with command():
        main(tyro.cli(TrainingStepConfig, prog=program(__spec__.name), description=__doc__))
