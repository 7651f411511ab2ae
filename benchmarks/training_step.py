"""Time of one training step of ViT-B/32, ours and open_clip's, on the same batch by turns.

    python -m benchmarks.training_step

A step is zeroed gradients, forward, InfoNCE, backward, clipping to norm 1 and AdamW, each as its
project's own training loop does them (open_clip: `open_clip_train/main.py` and `train.py`). Both
start from the same weights. Captions are padded to the context length, as open_clip's loader
pads them; the rows "cut" give us what our loader makes of captions of ordinary length.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.record import save
from clip_rt.specs import END_OF_TEXT, START_OF_TEXT, find_spec
from training.accumulate import cached_backward, split_batch
from training.data.batches import Batch
from training.loss import contrastive_loss
from training.model import CLIP
from training.optimizer import adamw
from training.parallel import clip_gradients

CAPTION_TOKENS = 20
"""Start and end of text included; the rest of the 77 is padding."""
WEIGHT_DECAY = 0.2
MAX_NORM = 1.0

Step = Callable[[], Tensor]
Precision = Callable[[], AbstractContextManager[object]]
PRECISIONS: dict[str, Precision] = {
    "fp32": nullcontext,
    "bf16": partial(torch.autocast, "cpu", torch.bfloat16),
}


def make_batch(num_pairs: int) -> Batch:
    """Draw images and captions of ordinary length, padded to 77 tokens."""
    generator = torch.Generator().manual_seed(0)
    image_BCSS = torch.randn(num_pairs, 3, 224, 224, generator=generator)
    tokens_BL = torch.zeros(num_pairs, 77, dtype=torch.int64)
    tokens_BL[:, :CAPTION_TOKENS] = torch.randint(
        1, 49000, (num_pairs, CAPTION_TOKENS), generator=generator
    )
    tokens_BL[:, 0], tokens_BL[:, CAPTION_TOKENS - 1] = START_OF_TEXT, END_OF_TEXT
    return Batch(image_BCSS, tokens_BL, torch.arange(num_pairs))


def our_step(clip: CLIP, batch: Batch, autocast: Precision) -> Step:
    """Prepare the step of `training.run`."""
    optimizer = adamw(clip, peak_lr=5e-4, weight_decay=WEIGHT_DECAY)

    def objective(image_BE: Tensor, text_BE: Tensor, group_B: Tensor) -> Tensor:
        return contrastive_loss(image_BE, text_BE, clip.logit_scale.exp(), group_B=group_B)

    def step() -> Tensor:
        loss = cached_backward(clip, [batch], objective, autocast=autocast)
        clip_gradients(clip, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clip.clamp_logit_scale()
        return loss

    return step


def open_clip_step(reference: Any, batch: Batch, autocast: Precision) -> Step:
    """Prepare the step of `open_clip_train`, on what the open_clip package offers it."""
    loss_function = importlib.import_module("open_clip").ClipLoss()
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


def import_open_clip() -> Any:
    """Import open_clip beside a torch that torchvision's compiled operators were not built for.

    None of them is used here; declared, they no longer stop the import.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_open_clip.declared = library  # type: ignore[attr-defined]
    return importlib.import_module("open_clip")


def measure(precision: str, batch_size: int, num_rounds: int) -> dict[str, Any]:
    """Time the steps by turns, after one of each that is not counted."""
    open_clip, autocast = import_open_clip(), PRECISIONS[precision]
    torch.manual_seed(0)
    reference = open_clip.create_model("ViT-B-32-quickgelu", output_dict=True).train()
    batch = make_batch(batch_size)
    clips = [CLIP(find_spec("ViT-B/32")).train() for _ in range(2)]
    for clip in clips:
        clip.load_state_dict(reference.state_dict())
    (cut,) = split_batch(batch, batch_size)
    steps = {
        "open_clip": open_clip_step(reference, batch, autocast),
        "ours": our_step(clips[0], batch, autocast),
        "ours, cut": our_step(clips[1], cut, autocast),
    }
    losses = {name: [float(step())] for name, step in steps.items()}
    times_s: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            started_s = time.perf_counter()
            losses[name].append(float(step()))
            times_s[name].append(time.perf_counter() - started_s)
    return summarise(times_s, losses, batch_size)


def summarise(
    times_s: dict[str, list[float]], losses: dict[str, list[float]], batch_size: int
) -> dict[str, Any]:
    """Take medians, and the median of the ratios within each round."""
    return {
        name: {
            "median_s": round(statistics.median(times), 3),
            "pairs_per_s": round(batch_size / statistics.median(times), 2),
            "speed_to_open_clip": round(
                statistics.median(
                    theirs / ours for theirs, ours in zip(times_s["open_clip"], times, strict=True)
                ),
                3,
            ),
            "times_s": [round(each, 3) for each in times],
            "losses": [round(each, 4) for each in losses[name]],
        }
        for name, times in times_s.items()
    }


def main(
    batch_size: Annotated[int, typer.Option(help="Pairs of a step.")] = 32,
    num_rounds: Annotated[int, typer.Option(help="Steps of each that are timed.")] = 9,
    precision: Annotated[list[str], typer.Option(help="fp32, bf16, or both.")] = ["fp32", "bf16"],  # noqa: B006
    num_threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Measure, print a table, and write a dated JSON."""
    torch.set_num_threads(num_threads)
    table = Table("precision", "what", "s a step", "pairs/s", "speed to open_clip")
    results = {}
    for each in precision:
        results[each] = measure(each, batch_size, num_rounds)
        for name, row in results[each].items():
            figures = (row["median_s"], row["pairs_per_s"], row["speed_to_open_clip"])
            table.add_row(each, name, *map(str, figures))
        Console().print(table)
    settings = {"model": "ViT-B/32", "batch_size": batch_size, "num_threads": num_threads}
    path = save(
        "training_step", {**settings, "results": results}, packages=("torch", "open_clip_torch")
    )
    Console().print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
