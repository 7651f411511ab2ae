"""One update: a batch goes in, the weights move, unless its loss or gradient is not finite.

Nothing here waits for the device, or it would idle until the host has made the next batch. Whether
a batch moves the weights is therefore decided on the device, and with it what depends on how many
did: learning rate and average. The host counts on every batch until `fetch` tells it what came of
those since the last time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from training import parallel
from training.accumulate import cached_backward, split_batch
from training.build import seed_everything
from training.config import TrainConfig
from training.data.batches import Batch
from training.loss import contrastive_loss, distillation_loss, sigmoid_loss
from training.optimizer import set_lr, train_unlocked
from training.recompute import running_statistics
from training.schedule import cosine_lr
from training.state import Run

MAX_BAD_UPDATES = 5
"""Updates in a row without a finite loss or gradient after which no batch moves the weights."""


@dataclass(frozen=True)
class Outcome:
    """What came of one batch; the same on all processes."""

    loss: float
    norm: float
    """Of the gradient before it was clipped."""
    accuracy: float
    """Share of images whose text scored highest among this process's batch."""
    was_made: bool
    """Whether the weights moved."""
    is_bad: bool
    """They did not, and not for the range of FP16, which the scaler finds by itself."""


@dataclass
class Tally:
    """How far a run is as its device knows, ahead of the host."""

    lr_N: Tensor
    """float32 (total_steps,): learning rate of each update."""
    step: Tensor
    """int64 (): updates made."""
    num_bad: Tensor
    """int64 (): batches in a row that were bad."""
    outcomes: list[Tensor] = field(default_factory=list)
    """Of each batch since the last `fetch`: float32 (5,), the fields of `Outcome`."""

    @classmethod
    def of(cls, run: Run) -> Tally:
        """Begin where the run is."""
        device = run.world.device
        lr_N = torch.tensor([lr_at(run.config, step) for step in range(run.config.total_steps)])
        step, num_bad = torch.tensor([run.step, 0], device=device)
        return cls(lr_N.to(device), step, num_bad)

    def fetch(self) -> list[Outcome]:
        """Wait for the device, and return what came of each batch since the last time."""
        if not self.outcomes:
            return []
        rows = torch.stack(self.outcomes).tolist()
        self.outcomes.clear()
        return [Outcome(*row[:3], *map(bool, row[3:])) for row in rows]


def lr_at(config: TrainConfig, step: int) -> float:
    """Return the learning rate of the update that follows `step` others."""
    return cosine_lr(
        step,
        peak_lr=config.peak_lr,
        warmup_steps=min(config.warmup_steps, config.total_steps // 4),
        total_steps=config.total_steps,
    )


def make_update(run: Run, batch: Batch, tally: Tally) -> None:
    """Move the weights by one batch, or leave all as it is where its loss is not finite."""
    config = run.config
    set_lr(run.optimizer, tally.lr_N.take(tally.step))
    train_unlocked(run.clip, config.lock)
    # All that dropout draws depends on the seed and the batch only: nothing to save for resuming.
    seed_everything(config.seed, run.data_step, run.world.rank)
    run.seen_V[batch.tokens_BL.cpu().long()] = True
    if run.world.device.type == "cpu":  # A GPU does it faster, and by itself: the weights are so.
        image_BCSS = batch.image_BCSS.contiguous(memory_format=torch.channels_last)
        batch = replace(batch, image_BCSS=image_BCSS)
    chunks = split_batch(batch, config.chunk_size or len(batch.group_B))
    correct: list[Tensor] = []
    statistics = [(each, each.clone()) for each in running_statistics(run.clip)]
    loss = cached_backward(
        run.wrapped,
        chunks,
        make_objective(run, chunks, correct),
        autocast=autocast(run),
        scaler=run.scaler,
    )
    run.scaler.unscale_(run.optimizer)
    norm = parallel.clip_gradients(run.wrapped, config.max_grad_norm)
    mean_loss, accuracy = parallel.mean_over_ranks(torch.stack([loss, correct[0]]))
    is_finite = mean_loss.isfinite() & norm.isfinite()
    # Once there are too many, all stays as it is until the host has heard of it.
    was_made = is_finite & (tally.num_bad < MAX_BAD_UPDATES)
    is_bad = ~(mean_loss.isfinite() if run.scaler.is_enabled() else is_finite)
    for after, before in statistics:
        after.copy_(after.where(was_made, before))
    run.optimizer.step_unless(~was_made)
    run.clip.clamp_logit_scale()
    if run.average is not None:
        run.average.update(tally.step, was_made)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    tally.step += was_made
    tally.num_bad = (tally.num_bad + is_bad).where(~was_made, 0)
    tally.outcomes.append(torch.stack([mean_loss, norm, accuracy, was_made, is_bad]))


def make_objective(
    run: Run, chunks: list[Batch], correct: list[Tensor]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Build the loss of a batch's embeddings; it leaves the batch's accuracy in `correct`."""
    config, clip = run.config, run.clip
    teacher = embed_by_teacher(run, chunks) if run.teacher is not None else None

    def objective(image_BE: Tensor, text_BE: Tensor, group_B: Tensor) -> Tensor:
        scale = clip.logit_scale.exp()
        if clip.logit_bias is not None:
            loss = sigmoid_loss(image_BE, text_BE, scale, clip.logit_bias, group_B=group_B)
        else:
            loss = contrastive_loss(image_BE, text_BE, scale, group_B=group_B)
        if teacher is not None:
            distilled = distillation_loss((image_BE, text_BE, scale), teacher)
            loss = loss + config.distill_weight * distilled
        with torch.no_grad():
            nearest_B = (image_BE @ text_BE.T).argmax(dim=1)
            correct.append((group_B[nearest_B] == group_B).float().mean())
        return loss

    return objective


@torch.no_grad()
def embed_by_teacher(run: Run, chunks: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Embed a batch with the teacher, for `distillation_loss`."""
    assert run.teacher is not None
    rows = []
    for chunk in chunks:
        with autocast(run)():
            device = run.world.device
            image_BCSS = chunk.image_BCSS.to(device, non_blocking=True)
            tokens_BL = chunk.tokens_BL.to(device, non_blocking=True)
            rows.append(run.teacher(image_BCSS, tokens_BL))
    images, texts = zip(*rows, strict=True)
    return torch.cat(images), torch.cat(texts), run.teacher.logit_scale.exp()


def autocast(run: Run) -> Callable[[], AbstractContextManager[object]]:
    """Choose the precision of a forward pass."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.config.precision)
    if dtype is None:
        return nullcontext
    return partial(torch.autocast, run.world.device.type, dtype)
