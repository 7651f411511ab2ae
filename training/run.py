"""Train CLIP.

    python -m training.run                    # the recipe of the bundled model, on data/drawings
    python -m training.run --sample           # minutes, on the drawings that come with the code
    python -m training.run --help

Writes to `out_dir`: checkpoint.safetensors, log.jsonl and curves.png.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from clip_rt.errors import InputError
from clip_rt.specs import find_spec
from training.checkpoint import save_checkpoint
from training.curves import draw_curves
from training.data import Batch, DrawingBatches, Drawings, load_drawings
from training.evaluate import zero_shot_accuracy
from training.loss import contrastive_loss
from training.model import CLIP
from training.schedule import cosine_lr

SAMPLE_DIR = Path(__file__).with_name("sample")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on. The defaults are the recipe of the bundled model."""

    model: str = "RN26@64px"
    """Architecture, a key of clip_rt.specs.MODELS."""
    data_dir: Path = Path("data/drawings")
    """Folder with train/*.tar and styles/*.tar, made by python -m training.drawings."""
    out_dir: Path = Path("runs/drawings")
    """Where the checkpoint, the log and the curves go."""
    sample: bool = False
    """Train briefly on the small sample of drawings that comes with the code."""
    batch_size: int = 512
    """Pairs per update."""
    emoji_fraction: float = 0.6
    """Share of each batch that is emoji; the rest are icons."""
    total_steps: int | None = None
    """Updates in all; None is 2,800, or 150 with --sample."""
    warmup_steps: int = 150
    """Updates during which the learning rate rises; at most a quarter of all."""
    peak_lr: float = 1e-3
    """Highest learning rate."""
    weight_decay: float = 0.1
    """Of matrices; gains, biases and the temperature are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    eval_every_steps: int = 280
    """Updates between two zero-shot evaluations; each also saves."""
    log_every_steps: int = 10
    """Updates between two lines of log.jsonl."""
    bf16: bool = True
    """Compute matrix products and convolutions in bfloat16."""
    num_threads: int = 0
    """Threads of torch; 0 leaves its default."""
    seed: int = 0
    """Of weights, order, captions and augmentation."""

    def __post_init__(self) -> None:
        if not 0 <= self.emoji_fraction <= 1:
            raise InputError(f"emoji_fraction is {self.emoji_fraction}; it must be within 0 and 1.")
        for name in ("batch_size", "num_steps", "eval_every_steps", "log_every_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    @property
    def num_steps(self) -> int:
        """Updates this run makes."""
        if self.total_steps is not None:
            return self.total_steps
        return 150 if self.sample else 2800


@dataclass
class Run:
    """A training in progress."""

    config: TrainConfig
    model: CLIP
    optimizer: torch.optim.Optimizer
    batches: Iterator[Batch]
    styles: dict[str, Drawings]
    """Held-out emoji styles to evaluate on."""
    seen_V: Tensor
    """bool (V,): whether a token stood in any caption so far."""
    started_s: float = field(default_factory=time.monotonic)

    def log(self, step: int, **values: float) -> None:
        """Append one line to log.jsonl."""
        line = {"step": step, "elapsed_s": round(time.monotonic() - self.started_s, 1), **values}
        with (self.config.out_dir / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def build(config: TrainConfig) -> Run:
    """Read the data, build model and optimiser."""
    torch.manual_seed(config.seed)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    data_dir = SAMPLE_DIR if config.sample else config.data_dir
    train_shards = sorted(data_dir.glob("train/*.tar"))
    if not train_shards:
        raise InputError(
            f"{data_dir}/train holds no .tar shards. Make them with python -m training.drawings, "
            "or pass --sample to train on the drawings that come with the code."
        )
    spec = find_spec(config.model)
    model = CLIP(spec).to(memory_format=torch.channels_last)
    batches = DrawingBatches(
        load_drawings(train_shards),
        batch_size=config.batch_size,
        emoji_fraction=config.emoji_fraction,
        context_length=spec.text.context_length,
        seed=config.seed,
    )
    styles = {
        path.stem: load_drawings([path], progress=False)
        for path in sorted(data_dir.glob("styles/openmoji*.tar"))
    }
    config.out_dir.mkdir(parents=True, exist_ok=True)
    (config.out_dir / "log.jsonl").unlink(missing_ok=True)
    seen_V = torch.zeros(spec.text.vocab_size, dtype=torch.bool)
    return Run(config, model, adamw(model, config), iter(batches), styles, seen_V)


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only, with the betas of the paper's table 18."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def train_step(run: Run, batch: Batch, *, lr: float) -> Tensor:
    """Make one update; return its loss, detached."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast("cpu", torch.bfloat16, enabled=run.config.bf16):
        image_BCSS = batch.image_BCSS.contiguous(memory_format=torch.channels_last)
        image_BE, text_BE = run.model(image_BCSS, batch.tokens_BL)
    scale = run.model.logit_scale.exp()
    loss = contrastive_loss(image_BE, text_BE, scale, group_B=batch.group_B)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), run.config.max_grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.model.clamp_logit_scale()
    run.seen_V[batch.tokens_BL] = True
    return loss.detach()


@torch.no_grad()
def forget_unseen_tokens(run: Run) -> None:
    """Zero the embeddings of tokens that no caption held: noise to the model, weight to a file."""
    run.model.token_embedding.weight[~run.seen_V] = 0


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Measure zero-shot top-1 on the held-out emoji styles, save, and redraw the curves."""
    scores = {}
    for style, drawings in run.styles.items():
        labels = [record["name"] for record in drawings.records]
        scores[f"top1_{style}"] = zero_shot_accuracy(run.model, drawings, labels).top1
    run.log(step, **scores)
    config = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(run.config).items()
    }
    save_checkpoint(
        run.config.out_dir / "checkpoint.safetensors", run.model, step=step, config=config
    )
    draw_curves(run.config.out_dir / "log.jsonl", run.config.out_dir / "curves.png")
    return scores


def train(run: Run) -> dict[str, float]:
    """Update the model until `num_steps`; return the last evaluation."""
    config = run.config
    run.model.train()
    scores: dict[str, float] = {}
    bar = tqdm(total=config.num_steps, desc="training", unit="step", dynamic_ncols=True)
    for step, batch in enumerate(islice(run.batches, config.num_steps), start=1):
        lr = cosine_lr(
            step - 1,
            peak_lr=config.peak_lr,
            warmup_steps=min(config.warmup_steps, config.num_steps // 4),
            total_steps=config.num_steps,
        )
        loss = train_step(run, batch, lr=lr)
        if step % config.log_every_steps == 0 or step == config.num_steps:
            value = loss.item()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {value} at step {step}; lower peak_lr.")
            rate = config.batch_size * step / (time.monotonic() - run.started_s)
            run.log(
                step,
                loss=value,
                lr=lr,
                images_per_s=rate,
                logit_scale=run.model.logit_scale.exp().item(),
            )
            bar.set_postfix(loss=f"{value:.3f}", images_per_s=f"{rate:.0f}", **_percent(scores))
        if step == config.num_steps:
            forget_unseen_tokens(run)
        if step % config.eval_every_steps == 0 or step == config.num_steps:
            scores = evaluate(run, step)
        bar.update()
    bar.close()
    return scores


def _percent(scores: dict[str, float]) -> dict[str, str]:
    return {name: f"{100 * value:.1f}%" for name, value in scores.items()}


def main(config: TrainConfig) -> None:
    """Train, and say what came of it."""
    run = build(config)
    scores: dict[str, Any] = _percent(train(run))
    print(f"{config.out_dir}/checkpoint.safetensors: {scores}")  # noqa: T201


if __name__ == "__main__":
    main(tyro.cli(TrainConfig))
