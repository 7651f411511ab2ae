"""Train CLIP.

    torchrun --nproc-per-node 8 -m training.run --model ViT-B/32 --data 'shards/{000..099}.tar'
    python -m training.run --recipe fine_tune --init-from clip.safetensors --data products.csv
    python -m training.run                    # --recipe drawings, on data/drawings
    python -m training.run --sample           # minutes, on the drawings that come with the code
    python -m training.run --resume           # go on after a kill, bit for bit
    python -m training.run --help

Writes to `out_dir`: checkpoint.safetensors (the newest weights, for export), best.safetensors (by
zero-shot accuracy or retrieval), snapshots/ (for --resume), log.jsonl and curves.png.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from types import FrameType

import torch
import tyro

from clip_rt.errors import TrainingError
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training import parallel, precision
from training.build import build, claim_folder
from training.checkpoint import save_checkpoint
from training.config import TrainConfig
from training.curves import draw_curves
from training.data.batches import Batch
from training.evaluation.judge import Judge
from training.journal import Journal
from training.recipe import read_options
from training.state import Run, gather_average, restore, save
from training.update import MAX_BAD_UPDATES, Outcome, Tally, lr_at, make_update

MAX_ROLLBACKS = 3


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Read the options of a command line; they win over those of the recipe that it names.

    Args:
        arguments: The options; those of this process if None.

    Raises:
        InputError: there is no such recipe.
        SystemExit: an option is not known, or help was asked for.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    named = _parse(arguments)
    recipe = named.recipe
    if recipe is None and not named.data:
        recipe = "drawings:sample" if named.drawings.sample else "drawings"
    if recipe is None:
        return named
    return replace(_parse([*read_options(recipe), *arguments]), recipe=recipe)


def _parse(arguments: Sequence[str]) -> TrainConfig:
    return tyro.cli(TrainConfig, args=arguments, prog=program("training.run"))


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
        judge = Judge(config, run.clip, world.device) if world.is_first else None
        is_resumed = restore(run)
        journal = Journal(
            config.out_dir,
            step=run.step,
            num_steps=config.total_steps,
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
    """Update the model until `total_steps`, or until a signal asks to stop."""
    config = run.config
    batches, tally, signals = open_stream(run), Tally.of(run), parallel.Signals()
    while run.step < config.total_steps and not run.stop_signal:
        make_update(run, next(batches), tally)
        run.data_step += 1
        journal.bar.update()
        run.stop_signal = signals.exchange(run.received_signal)
        # Batches that were skipped are not known of yet: the run is at most so far.
        if not run.stop_signal and not is_due(config, run.step + len(tally.outcomes)):
            continue
        outcomes = tally.fetch()
        if not count(run, outcomes, journal):
            roll_back(run, journal)
            batches, tally = open_stream(run), Tally.of(run)
        elif outcomes[-1].was_made:
            if is_due(config, run.step, every=config.log_every_steps):
                report(run, outcomes[-1], journal)
            if is_due(config, run.step, every=config.eval_every_steps):
                evaluate(run, judge, journal)
                save(run, elapsed_s=journal.elapsed_s)
    if run.stop_signal and run.step % config.eval_every_steps:
        save(run, elapsed_s=journal.elapsed_s)
        journal.say(f"stopped at step {run.step} by signal {run.stop_signal}; go on with --resume")


def is_due(config: TrainConfig, step: int, *, every: int | None = None) -> bool:
    """Tell whether something is to be done at a step: every so many, and at the last one."""
    steps = (config.log_every_steps, config.eval_every_steps) if every is None else (every,)
    return step == config.total_steps or any(step % each == 0 for each in steps)


def count(run: Run, outcomes: list[Outcome], journal: Journal) -> bool:
    """Count the updates that were made, and log the batches that were skipped.

    Returns:
        False where too many in a row were bad: the batches after them moved nothing, and the run
        stands before them.
    """
    first = run.data_step - len(outcomes)
    for number, outcome in enumerate(outcomes, start=first + 1):
        if outcome.was_made:
            run.step += 1
            run.num_bad = 0
            continue
        journal.bar.update(-1)
        journal.say(f"batch {number} skipped: loss {outcome.loss}, norm {outcome.norm}")
        journal.write(run.step, skipped_batch=number, skipped_loss=str(outcome.loss))
        run.num_bad += outcome.is_bad
        if run.num_bad == MAX_BAD_UPDATES:
            run.data_step = number
            return False
    return True


def report(run: Run, outcome: Outcome, journal: Journal) -> None:
    """Log an update and show it on the progress bar."""
    run.elapsed_s = journal.elapsed_s
    images_per_s = run.config.batch_size * journal.steps_per_s(run.step)
    journal.write(
        run.step,
        loss=outcome.loss,
        batch_accuracy=outcome.accuracy,
        grad_norm=outcome.norm,
        lr=lr_at(run.config, run.step - 1),
        images_per_s=images_per_s,
        logit_scale=run.clip.logit_scale.exp().item(),
        bad_samples=run.data.skips.total,
    )
    journal.show(
        loss=f"{outcome.loss:.3f}",
        accuracy=f"{outcome.accuracy:.0%}",
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
        if run.is_from_nothing and run.step == config.total_steps:
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
        tensors, facts = run.clip.to_file(weights), run.clip.facts
        for path in paths:
            save_checkpoint(path, tensors, facts, step=run.step, config=config.as_json())
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
        main(parse())
