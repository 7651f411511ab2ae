"""What several studies are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clip_rt.specs import END_OF_TEXT, START_OF_TEXT, VOCAB_SIZE, ModelSpec, Tower
from training.accumulate import cached_backward
from training.data.batches import Batch, count_tokens
from training.loss import contrastive_loss
from training.model import CLIP
from training.optimizer import adamw
from training.parallel import clip_gradients

ROOT = Path(__file__).resolve().parents[2]
TOWERS: tuple[Tower, ...] = ("image", "text")
WEIGHT_DECAY = 0.2
MAX_NORM = 1.0
Precision = Callable[[], AbstractContextManager[object]]
PRECISIONS: dict[str, Precision] = {
    "fp32": nullcontext,
    "bf16": partial(torch.autocast, "cpu", torch.bfloat16),
}
console = Console()


def show(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Print a table; its first column is text."""
    table = Table(*columns, title=title or None)
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def write_towers(
    clip: CLIP, folder: Path, towers: Sequence[Tower] = TOWERS, *, is_fp16: bool = False
) -> dict[Tower, Path]:
    """Write towers as ONNX, `folder/TOWER/model.onnx`, and return their files."""
    # Here, because training steps are timed where nothing that exports is installed.
    from export.graphs import ImageGraph, TextGraph
    from export.onnx_writer import write_onnx
    from export.precision import bake_fp16

    files: dict[Tower, Path] = {}
    for tower in towers:
        files[tower] = folder / tower / "model.onnx"
        files[tower].parent.mkdir(parents=True, exist_ok=True)
        graph = ImageGraph(clip) if tower == "image" else TextGraph(clip)
        write_onnx(bake_fp16(graph) if is_fp16 else graph, clip.facts, files[tower])
    return files


def make_batch(spec: ModelSpec, num_pairs: int, num_tokens: int, *, seed: int = 0) -> Batch:
    """Draw images, and captions of `num_tokens` that are padded to the context length.

    Start and end of text are among the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    image_BCSS = torch.randn(num_pairs, 3, spec.side_px, spec.side_px, generator=generator)
    tokens_BL = torch.zeros(num_pairs, spec.text.context_length, dtype=torch.int64)
    tokens_BL[:, :num_tokens] = torch.randint(
        1, VOCAB_SIZE - 2, (num_pairs, num_tokens), generator=generator
    )
    tokens_BL[:, 0], tokens_BL[:, num_tokens - 1] = START_OF_TEXT, END_OF_TEXT
    group_B = torch.arange(num_pairs) + seed * num_pairs
    return Batch(image_BCSS, tokens_BL, group_B, count_tokens(tokens_BL))


def make_step(clip: CLIP, chunks: Sequence[Batch], autocast: Precision) -> Callable[[], Tensor]:
    """Prepare the step of `training.run` on one batch; it returns the loss."""
    optimizer = adamw(clip, peak_lr=5e-4, weight_decay=WEIGHT_DECAY)

    def objective(image_BE: Tensor, text_BE: Tensor, group_B: Tensor) -> Tensor:
        return contrastive_loss(image_BE, text_BE, clip.logit_scale.exp(), group_B=group_B)

    def step() -> Tensor:
        loss = cached_backward(clip, chunks, objective, autocast=autocast)
        clip_gradients(clip, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clip.clamp_logit_scale()
        return loss

    return step
