"""Train CLIP.

    python -m training.run                    # the recipe of the bundled model, on data/drawings
    python -m training.run --sample           # minutes, on the drawings that come with the code
    python -m training.run --resume           # go on after a kill, bit for bit
    torchrun --nproc-per-node 8 -m training.run --model ViT-B/32 --data 'shards/{000..099}.tar'
    python -m training.run --help

Writes to `out_dir`: checkpoint.safetensors (the newest weights, for export), best.safetensors (by
zero-shot accuracy or retrieval), snapshots/ (for --resume), log.jsonl and curves.png.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType

import torch
import tyro
from torch import Tensor

from clip_rt.errors import TrainingError
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training import parallel, precision
from training.accumulate import cached_backward, split_batch
from training.build import build, claim_folder, seed_everything
from training.checkpoint import save_checkpoint
from training.config import TrainConfig
from training.curves import draw_curves
from training.data.batches import Batch
from training.evaluation.judge import Judge
from training.journal import Journal
from training.loss import contrastive_loss, distillation_loss, sigmoid_loss
from training.optimizer import set_lr, train_unlocked
from training.schedule import cosine_lr
from training.state import Run, gather_average, restore, save

MAX_BAD_UPDATES = 5
"""Updates in a row without a finite loss or gradient before the run goes back to a snapshot."""
MAX_ROLLBACKS = 3


def main(config: TrainConfig) -> None:
    """Train, and say what came of it.

    Raises:
        InputError: the configuration, the data or out_dir cannot be used.
        TrainingError: the loss stays without a finite value.
        CheckpointError: weights cannot be read, or a snapshot not be read or written.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    with parallel.join(config.device) as world:
        if world.is_first:
            claim_folder(config)
        parallel.barrier()
        config, settled = precision.settle(config, world)
        run = build(config, world)
        judge = Judge(config, run.clip.spec, world.device) if world.is_first else None
        is_resumed = restore(run)
        journal = Journal(
            config.out_dir,
            step=run.step,
            num_steps=config.num_steps,
            elapsed_s=run.elapsed_s,
            tensorboard=config.tensorboard,
            silent=not world.is_first,
        )
        journal.say(f"precision {settled.precision}: {settled.reason}")
        journal.write(run.step, precision=settled.precision, precision_reason=settled.reason)
        if settled.warning:
            journal.say(f"warning: {settled.warning}")
        if config.resume and not is_resumed:
            journal.say(f"{config.out_dir} holds no run to go on with: a new one begins")
        with closing(journal), stopping(run):
            train(run, judge, journal)
    if run.stop_signal:
        raise SystemExit(128 + run.stop_signal)


def train(run: Run, judge: Judge | None, journal: Journal) -> None:
    """Update the model until `num_steps`, or until a signal asks to stop."""
    config = run.config
    batches = open_stream(run)
    num_bad = 0
    while run.step < config.num_steps and not run.stop_signal:
        update = make_update(run, next(batches))
        run.data_step += 1
        run.stop_signal = update.stop_signal
        if not update.was_made:
            journal.say(f"batch {run.data_step} skipped: loss {update.loss}, norm {update.norm}")
            journal.write(run.step, skipped_batch=run.data_step, skipped_loss=str(update.loss))
            num_bad += update.is_bad
            if num_bad == MAX_BAD_UPDATES:
                roll_back(run, journal)
                batches, num_bad = open_stream(run), 0
            continue
        run.step += 1
        num_bad = 0
        is_last = run.step == config.num_steps
        if run.step % config.log_every_steps == 0 or is_last:
            report(run, update, journal)
        if run.step % config.eval_every_steps == 0 or is_last:
            evaluate(run, judge, journal)
            save(run, elapsed_s=journal.elapsed_s)
        journal.bar.update()
    if run.stop_signal and run.step % config.eval_every_steps:
        save(run, elapsed_s=journal.elapsed_s)
        journal.say(f"stopped at step {run.step} by signal {run.stop_signal}; go on with --resume")


@dataclass(frozen=True)
class Update:
    """One batch's effect; the same on all processes."""

    loss: float
    norm: float
    """Of the gradient before it was clipped."""
    accuracy: float
    """Share of images whose text scored highest among this process's batch."""
    lr: float
    was_made: bool
    is_bad: bool
    """Not made, and not for the range of FP16, which the scaler finds by itself."""
    stop_signal: int


def make_update(run: Run, batch: Batch) -> Update:
    """Move the weights by one batch, unless its loss or gradient is not finite."""
    config = run.config
    lr = cosine_lr(
        run.step,
        peak_lr=config.peak_lr,
        warmup_steps=min(config.warmup_steps, config.num_steps // 4),
        total_steps=config.num_steps,
    )
    set_lr(run.optimizer, lr)
    train_unlocked(run.clip, config.lock)
    # All that dropout draws depends on the seed and the batch only: nothing to save for resuming.
    seed_everything(config.seed, run.data_step, run.world.rank)
    run.seen_V[batch.tokens_BL.cpu().long()] = True
    image_BCSS = batch.image_BCSS.contiguous(memory_format=torch.channels_last)
    batch = replace(batch, image_BCSS=image_BCSS)
    chunks = split_batch(batch, config.chunk_size or len(batch.group_B))
    correct: list[Tensor] = []
    loss = cached_backward(
        run.wrapped,
        chunks,
        make_objective(run, chunks, correct),
        autocast=autocast(run),
        scaler=run.scaler,
    )
    run.scaler.unscale_(run.optimizer)
    norm = parallel.clip_gradients(run.wrapped, config.max_grad_norm)
    received = torch.tensor(float(run.received_signal), device=loss.device)
    facts = parallel.mean_over_ranks(torch.stack([loss, correct[0], received]))
    mean_loss, accuracy, asked_to_stop = facts.tolist()
    was_made = math.isfinite(mean_loss) and math.isfinite(norm)
    if was_made:
        run.scaler.step(run.optimizer)
        run.clip.clamp_logit_scale()
        if run.average is not None:
            run.average.update(run.step)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return Update(
        loss=mean_loss,
        norm=float(norm),
        accuracy=accuracy,
        lr=lr,
        was_made=was_made,
        is_bad=not was_made and (not run.scaler.is_enabled() or not math.isfinite(mean_loss)),
        stop_signal=(run.received_signal or signal.SIGTERM) if asked_to_stop else 0,
    )


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
            rows.append(run.teacher(chunk.image_BCSS.to(device), chunk.tokens_BL.to(device)))
    images, texts = zip(*rows, strict=True)
    return torch.cat(images), torch.cat(texts), run.teacher.logit_scale.exp()


def autocast(run: Run) -> Callable[[], AbstractContextManager[object]]:
    """Choose the precision of a forward pass."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.config.precision)
    if dtype is None:
        return nullcontext
    return partial(torch.autocast, run.world.device.type, dtype)


def report(run: Run, update: Update, journal: Journal) -> None:
    """Log an update and show it on the progress bar."""
    run.elapsed_s = journal.elapsed_s
    images_per_s = run.config.batch_size * journal.steps_per_s(run.step)
    journal.write(
        run.step,
        loss=update.loss,
        batch_accuracy=update.accuracy,
        grad_norm=update.norm,
        lr=update.lr,
        images_per_s=images_per_s,
        logit_scale=run.clip.logit_scale.exp().item(),
        bad_samples=run.data.skips.total,
    )
    journal.show(
        loss=f"{update.loss:.3f}",
        accuracy=f"{update.accuracy:.0%}",
        images_per_s=f"{images_per_s:.0f}",
    )


def evaluate(run: Run, judge: Judge | None, journal: Journal) -> None:
    """Measure what would be served, write it for export, and redraw the curves."""
    config = run.config
    if left_out := str(run.data.skips):
        journal.say(f"left out of the data so far: {left_out}")
    if run.average is not None:
        weights = gather_average(run)
    else:
        weights = parallel.gather_weights(run.wrapped)
    seen_V = parallel.mean_over_ranks(run.seen_V.float()) > 0
    if judge is not None:
        if config.init_from is None and run.step == config.num_steps:
            # Embeddings of tokens that no caption held: noise to the model, weight to a file.
            weights["token_embedding.weight"] = weights["token_embedding.weight"] * seen_V[:, None]
        scores = judge.score(weights)
        if scores:
            journal.write(run.step, **scores)
        journal.show(**{name: f"{score:.1%}" for name, score in scores.items() if "top1" in name})
        paths = [config.out_dir / "checkpoint.safetensors"]
        score = judge.rank(scores)
        if score >= run.best_score:
            run.best_score = score
            paths.append(config.out_dir / "best.safetensors")
        for path in paths:
            save_checkpoint(path, weights, run.clip.spec, step=run.step, config=config.as_json())
        draw_curves(journal.path, config.out_dir / "curves.png")
    parallel.barrier()


def roll_back(run: Run, journal: Journal) -> None:
    """Take the weights of the last snapshot, and go on with data that were not seen yet."""
    run.num_rollbacks += 1
    way_out = "Lower --peak-lr or --max-grad-norm, or use --precision bf16 or fp32."
    if run.num_rollbacks > MAX_ROLLBACKS:
        raise TrainingError(
            f"after {MAX_ROLLBACKS} returns to a snapshot the loss is still not finite at step "
            f"{run.step}. {way_out}"
        )
    if not restore(run):
        raise TrainingError(f"{MAX_BAD_UPDATES} updates in a row were not finite. {way_out}")
    journal.say(f"went back to step {run.step} after {MAX_BAD_UPDATES} updates without a number")
    journal.rewind(run.step)


def open_stream(run: Run) -> Iterator[Batch]:
    """Open the data where the run is."""
    return run.data.stream(run.data_step, rank=run.world.rank, world_size=run.world.size)


@contextmanager
def stopping(run: Run) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the run after the update under way, with a snapshot."""

    def stop(number: int, frame: FrameType | None) -> None:
        run.received_signal = number
        signal.signal(number, before[number])  # The second one ends it at once.

    before = {int(n): signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    with command():
        main(tyro.cli(TrainConfig, prog=program("training.run")))
