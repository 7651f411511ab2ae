"""A run in progress, and how it is put to rest on disk and woken again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training import parallel
from training.checkpoint import (
    Snapshot,
    flatten_optimizer,
    load_last_snapshot,
    pack,
    save_snapshot,
    unflatten_optimizer,
    unpack,
)
from training.config import TrainConfig
from training.data.batches import BatchStream
from training.dual_encoder import DualEncoder
from training.ema import WeightAverage
from training.optimizer import AdamW


@dataclass
class Run:
    """A training in progress, on one of its processes."""

    config: TrainConfig
    world: parallel.World
    clip: DualEncoder
    wrapped: nn.Module
    """The same, as the processes share it."""
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    data: BatchStream
    seen_V: Tensor
    """bool (V,): whether a token stood in any caption so far."""
    is_from_nothing: bool = False
    """Whether the weights were random, so that nothing is known of a token that never stood in any.
    """
    teacher: DualEncoder | None = None
    average: WeightAverage | None = None
    step: int = 0
    """Updates done."""
    data_step: int = 0
    """Batches taken: `step`, and those that were skipped."""
    num_bad: int = 0
    """Batches in a row without a finite loss or gradient."""
    best_score: float = -math.inf
    elapsed_s: float = 0.0
    num_rollbacks: int = 0
    received_signal: int = 0
    """The signal that asked this process to stop, or 0."""
    stop_signal: int = 0
    """The same once all processes know of it."""


def gather_average(run: Run) -> dict[str, Tensor]:
    """Collect the average of the weights on the first process; nothing where none is kept."""
    if run.average is None:
        return {}
    with run.average.in_model():
        weights = parallel.gather_weights(run.wrapped)
        # In one process these are the model's own tensors, which change back.
        return {name: tensor.clone() for name, tensor in weights.items()}


def save(run: Run, *, elapsed_s: float) -> None:
    """Write all that the run needs to go on from here."""
    seen_V = parallel.mean_over_ranks(run.seen_V.float()) > 0
    tensors = pack("model", parallel.gather_weights(run.wrapped))
    state = parallel.gather_optimizer(run.wrapped, run.optimizer)
    tensors |= pack("optimizer", flatten_optimizer(state))
    tensors |= pack("average", gather_average(run))
    facts = {
        "config": run.config.as_json(),
        "data_step": run.data_step,
        "best_score": run.best_score,
        "elapsed_s": elapsed_s,
        "num_rollbacks": run.num_rollbacks,
        "scaler": run.scaler.state_dict(),
    }
    if run.world.is_first:
        save_snapshot(
            run.config.out_dir / "snapshots",
            Snapshot(run.step, {**tensors, "seen": seen_V}, facts),
            keep_last=run.config.keep_last,
        )
    parallel.barrier()


def restore(run: Run) -> bool:
    """Put the run back to its last snapshot; False if there is none."""
    snapshot = None
    if run.world.is_first:
        snapshot = load_last_snapshot(run.config.out_dir / "snapshots")
    step, facts = parallel.broadcast((snapshot.step, snapshot.facts) if snapshot else (0, None))
    if facts is None:
        return False
    run.config.check_resumes(facts["config"])
    tensors = snapshot.tensors if snapshot else {}
    if run.average is not None:
        parallel.load_weights(run.wrapped, unpack("average", tensors))
        run.average = WeightAverage(run.clip, decay=run.config.ema_decay)
    parallel.load_weights(run.wrapped, unpack("model", tensors))
    state = unflatten_optimizer(unpack("optimizer", tensors))
    parallel.load_optimizer(run.wrapped, run.optimizer, state)
    run.scaler.load_state_dict(facts["scaler"])
    if snapshot:
        run.seen_V |= tensors["seen"]
    run.step, run.num_bad = step, 0
    run.data_step = max(run.data_step, facts["data_step"])
    run.best_score = facts["best_score"]
    run.elapsed_s = facts["elapsed_s"]
    run.num_rollbacks = max(run.num_rollbacks, facts["num_rollbacks"])
    return True
