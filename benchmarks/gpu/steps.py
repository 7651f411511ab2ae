"""Stage 4: a training step in bf16, ours beside open_clip's, and a run that is killed and resumed.

Ours is `training.update.make_update`, all of it. open_clip's is that of `open_clip_train`. Both get
one batch in pinned memory with texts of all lengths up to the context, so that nothing is cut.

MFU is three times the operations of a forward pass of both towers, as `clip_rt.planning.work`
counts them without pruning, over the time of a step and the measured BF16 GEMM rate. What cached
gradients compute a second time does not count.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, noting, spread
from benchmarks.gpu.peers import make_open_clip
from benchmarks.gpu.resumed import kill_and_resume
from benchmarks.gpu.surroundings import OPEN_CLIP
from benchmarks.timing import ratio
from clip_rt.planning.work import flop_per_image, flop_per_text
from clip_rt.specs import END_OF_TEXT, START_OF_TEXT, ModelSpec
from training import parallel
from training.config import TrainConfig
from training.data.batches import Batch, BatchStream, count_tokens
from training.model import CLIP
from training.optimizer import adamw
from training.state import Run
from training.update import Tally, make_update

PEAK_LR, WEIGHT_DECAY, MAX_NORM = 5e-4, 0.2, 1.0
STEP_S = 8.0
"""For the turns of all steps of a model."""
COMPILE_S = 45.0
"""Time there must be before a whole model is compiled."""


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield what was found so far, after each model and the run."""
    result: dict[str, Any] = {"models": [], "left_out": []}
    for is_compiled, spec in product((False, True), reversed(bench.scale.models)):
        what = {"model": spec.name, "is_compiled": is_compiled}
        if bench.has_time(COMPILE_S if is_compiled and bench.is_cuda else 0.0):
            result["models"].append(what | _measure_model(bench, spec, is_compiled, result))
            bench.free()
            yield result
        else:
            result["left_out"].append(what)
    with noting(result, "a run that is killed and resumed"):
        result["resumed"] = kill_and_resume(bench)
    yield result


def make_batch(spec: ModelSpec, num_pairs: int, *, is_pinned: bool) -> Batch:
    """Draw normalised images, and texts of all lengths up to the context."""
    generator = torch.Generator().manual_seed(0)
    length = spec.text.context_length
    image_BCSS = torch.randn(num_pairs, 3, spec.side_px, spec.side_px, generator=generator)
    tokens_BL = torch.randint(1, START_OF_TEXT, (num_pairs, length), generator=generator)
    tokens_BL[:, 0] = START_OF_TEXT
    for row in range(num_pairs):
        end = length - 1 - row % (length - 2)
        tokens_BL[row, end] = END_OF_TEXT
        tokens_BL[row, end + 1 :] = 0
    group_B = torch.arange(num_pairs)
    tensors = (image_BCSS, tokens_BL, group_B, count_tokens(tokens_BL))
    return Batch(*(each.pin_memory() for each in tensors) if is_pinned else tensors)


def our_step(
    bench: Bench, spec: ModelSpec, batch: Batch, *, backend: str = "", chunk_size: int = 0
) -> Callable[[], Tensor]:
    """Prepare the update of `training.run`, as it makes each."""
    config = TrainConfig(
        model=spec.name,
        precision="bf16",
        batch_size=len(batch.group_B),
        chunk_size=chunk_size,
        compile_backend=backend,
        peak_lr=PEAK_LR,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_NORM,
    )
    clip = _own(bench, spec)
    if backend:
        clip.compile(backend=backend)
    run = Run(
        config=config,
        world=parallel.World(0, 1, bench.device),
        clip=clip,
        wrapped=clip,
        optimizer=adamw(clip, peak_lr=PEAK_LR, weight_decay=WEIGHT_DECAY),
        scaler=torch.amp.GradScaler(bench.device.type, enabled=False),
        data=cast(BatchStream, None),  # The batch is given.
        seen_V=torch.zeros(spec.text.vocab_size, dtype=torch.bool),
    )
    tally = Tally.of(run)

    def step() -> Tensor:
        make_update(run, batch, tally)
        run.data_step += 1
        (outcome,) = tally.outcomes[-1:]
        tally.outcomes.clear()
        return outcome[0]

    return step


def open_clip_step(
    bench: Bench, spec: ModelSpec, batch: Batch, *, backend: str = ""
) -> Callable[[], Tensor]:
    """Prepare the step of `open_clip_train` (its `main.py` and `train.py`), with amp_bf16."""
    clip = bench.clip(spec)
    model: Any = make_open_clip(clip, bench.device, dtype=None).train()
    model.requires_grad_(True)
    loss_function = importlib.import_module("open_clip").ClipLoss()
    named = list(model.named_parameters())
    plain = [p for name, p in named if p.ndim < 2 or "logit_scale" in name]
    decayed = [p for name, p in named if p.ndim >= 2 and "logit_scale" not in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": plain, "weight_decay": 0.0},
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
        ],
        lr=PEAK_LR,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    forward = torch.compile(model, backend=backend) if backend else model

    def step() -> Tensor:
        images = batch.image_BCSS.to(bench.device, non_blocking=True)
        texts = batch.tokens_BL.to(bench.device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(bench.device.type, torch.bfloat16):
            output = forward(images, texts)
            loss = loss_function(**output, output_dict=True)["contrastive_loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, norm_type=2.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        return loss.detach()

    return step


def _own(bench: Bench, spec: ModelSpec) -> CLIP:
    """Return the same weights as the peer's, to be trained."""
    clip = CLIP(spec)
    clip.load_state_dict(bench.clip(spec).state_dict())
    return clip.to(bench.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _measure_model(
    bench: Bench, spec: ModelSpec, is_compiled: bool, result: dict[str, Any]
) -> dict[str, Any]:
    num_pairs = bench.scale.pairs.get(spec.name) or min(bench.scale.pairs.values())
    batch = make_batch(spec, num_pairs, is_pinned=bench.is_cuda)
    backend = bench.scale.compile_backend if is_compiled else ""
    ours = partial(our_step, bench, spec, batch, backend=backend)
    makers: dict[str, Callable[[], Callable[[], Any]]] = {"ours": ours}
    if not is_compiled:
        makers["ours, cached gradients"] = partial(ours, chunk_size=num_pairs // 4)
    if bench.has(OPEN_CLIP):
        makers[OPEN_CLIP] = partial(open_clip_step, bench, spec, batch, backend=backend)
    steps: dict[str, Callable[[], Any]] = {}
    rows = {}
    for name, make in makers.items():
        with noting(result, f"{name}, {spec.name}{', compiled' if is_compiled else ''}"):
            rows[name] = _first_steps(bench, make, steps, name)
    if not steps:
        return {"batch": num_pairs, "rows": {}}
    turns = bench.turns(
        {name: bench.device_way(step) for name, step in steps.items()}, budget_s=STEP_S
    )
    flop = (
        3
        * num_pairs
        * (
            flop_per_image(spec, is_pruned=False)
            + flop_per_text(spec, spec.text.context_length, is_pruned=False)
        )
    )
    peak = bench.gemm_flop_per_s("bf16")
    for name in steps:
        row = rows[name]
        row["step_ms"] = spread(turns[name], 1e3)
        row["images_per_s"] = spread(turns[name], num_pairs, is_rate=True)
        if peak is not None:
            row["mfu"] = spread(turns[name], flop / peak, is_rate=True)
        if OPEN_CLIP in turns:
            theirs_s = turns[OPEN_CLIP].samples_s
            row["speed_to_open_clip"] = round(ratio(theirs_s, turns[name].samples_s), 3)
    return {"batch": num_pairs, "flop_per_pair": flop // num_pairs, "rows": rows}


def _first_steps(
    bench: Bench, make: Callable[[], Callable[[], Any]], steps: dict[str, Any], name: str
) -> dict[str, Any]:
    """Make two steps; return their losses, and how much memory they took at most."""
    bench.free()
    before = torch.cuda.memory_allocated() if bench.is_cuda else 0
    if bench.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    step = make()
    losses = [float(step()) for _ in range(2)]
    if not all(map(math.isfinite, losses)):
        raise ArithmeticError(f"the losses of its first steps are {losses}")
    steps[name] = step
    row: dict[str, Any] = {"losses": [round(each, 4) for each in losses]}
    if bench.is_cuda:
        row["memory_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
    return row
