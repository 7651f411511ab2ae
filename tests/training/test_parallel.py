"""Two processes train what one trains: this file is both the test and what torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import tiny_clip as tiny
import torch
from torch import Tensor, nn

from clip_rt.errors import InputError
from clip_rt.specs import END_OF_TEXT, START_OF_TEXT
from training import parallel
from training.accumulate import cached_backward, split_batch
from training.data.batches import Batch, count_tokens
from training.loss import contrastive_loss, distillation_loss, sigmoid_loss
from training.model import CLIP
from training.parallel import Kind

NUM_RANKS = 2
NUM_PAIRS = 12
MAX_NORM = 0.5
CASES = [
    *product(("infonce", "sigmoid"), ("ddp", "fsdp"), (0, 2)),
    ("distill", "ddp", 2),
    ("infonce, RN", "fsdp", 0),
    ("infonce, locked", "ddp", 2),
    ("infonce, locked", "fsdp", 2),
]
"""Objective, kind, and pairs of a chunk (0: all of a process's at once)."""


def make(case: str, *, seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    spec = tiny.RESNET if "RN" in case else tiny.VIT
    clip = CLIP(spec, logit_bias=-3.0 if case == "sigmoid" else None).train()
    if "RN" in case:
        # Batch statistics are each process's own, so only fixed ones can agree with one process.
        clip.visual.eval()
        for module in clip.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
    if "locked" in case:
        clip.visual.requires_grad_(False)
    return clip


def make_batch(case: str, step: int, *, rank: int = 0, size: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(step)
    side_px = 64 if "RN" in case else 32
    image_BCSS = torch.randn(NUM_PAIRS, 3, side_px, side_px, generator=generator)
    tokens_BL = torch.randint(1, 49000, (NUM_PAIRS, 9), generator=generator)
    tokens_BL[:, 0], tokens_BL[:, -1] = START_OF_TEXT, END_OF_TEXT
    group_B = torch.arange(NUM_PAIRS) % (NUM_PAIRS - 1)  # The last pair says what the first says.
    tensors = (image_BCSS, tokens_BL, group_B, count_tokens(tokens_BL))
    return Batch(*(tensor[rank::size] for tensor in tensors))


def objective(case: str, clip: CLIP, teacher: CLIP, batch: Batch) -> Callable[..., Tensor]:
    def loss(image_BE: Tensor, text_BE: Tensor, group_B: Tensor) -> Tensor:
        scale = clip.logit_scale.exp()
        if case == "sigmoid":
            return sigmoid_loss(image_BE, text_BE, scale, clip.logit_bias, group_B=group_B)
        contrastive = contrastive_loss(image_BE, text_BE, scale, group_B=group_B)
        if case != "distill":
            return contrastive
        with torch.no_grad():
            target = teacher(batch.image_BCSS, batch.tokens_BL)
        student, target = (image_BE, text_BE, scale), (*target, teacher.logit_scale.exp())
        return contrastive + 2.0 * distillation_loss(student, target)

    return loss


def make_optimizer(clip: nn.Module) -> torch.optim.AdamW:
    free = [parameter for parameter in clip.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in free if p.ndim == 0], "weight_decay": 0.0},
        {"params": [p for p in free if p.ndim > 0], "weight_decay": 0.1},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, fused=True)


def train(
    case: str, model: nn.Module, clip: CLIP, optimizer: torch.optim.Optimizer, **options: int
) -> list[float]:
    """Make the updates `steps` with what `case` says; return the losses and norms of gradients."""
    teacher, figures = make("", seed=9).eval(), []
    for step in range(options.get("first", 0), options.get("last", 2)):
        rank, size = options.get("rank", 0), options.get("size", 1)
        batch = make_batch(case, step, rank=rank, size=size)
        chunks = split_batch(batch, options.get("chunk_size") or NUM_PAIRS)
        loss = cached_backward(model, chunks, objective(case, clip, teacher, batch))
        norm = parallel.clip_gradients(model, MAX_NORM)
        figures += [float(parallel.mean_over_ranks(loss)), float(norm)]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clip.clamp_logit_scale()
    return figures


def file_name(*case: object) -> str:
    return "-".join(str(each).replace(", ", "_") for each in case) + ".pt"


def train_cases(world: parallel.World, folder: Path) -> None:
    place = {"rank": world.rank, "size": world.size}
    for case, kind, chunk_size in CASES:
        # Seeds differ: all ranks must begin with the first one's weights all the same.
        clip = make(case, seed=world.rank)
        model = parallel.wrap(clip, kind)
        optimizer = make_optimizer(clip)
        figures = train(case, model, clip, optimizer, chunk_size=chunk_size, **place)
        weights = parallel.gather_weights(model)
        assert bool(weights) == world.is_first
        if world.is_first:
            torch.save((weights, figures), folder / file_name(case, kind, chunk_size))


def evaluate_under_fsdp(world: parallel.World, folder: Path) -> None:
    """Call the towers by themselves, before and after an update."""
    clip = make("infonce")
    model = parallel.wrap(clip, "fsdp")
    batch = make_batch("infonce", 0)
    found = []
    for first in range(2):
        with torch.no_grad():
            found.append((clip.encode_image(batch.image_BCSS), clip.encode_text(batch.tokens_BL)))
        train("infonce", model, clip, make_optimizer(clip), first=first, last=first + 1,
              rank=world.rank, size=world.size)  # fmt: skip
    torch.save(found, folder / f"towers-{world.rank}.pt")


def save_and_resume(world: parallel.World, folder: Path) -> None:
    place = {"rank": world.rank, "size": world.size}
    for kind in ("ddp", "fsdp"):
        clip = make("infonce")
        model = parallel.wrap(clip, kind)
        optimizer = make_optimizer(clip)
        train("infonce", model, clip, optimizer, first=0, last=1, **place)
        weights = parallel.gather_weights(model)
        state = parallel.gather_optimizer(model, optimizer)
        if world.is_first:
            torch.save((weights, state), folder / file_name("half", kind))
        train("infonce", model, clip, optimizer, first=1, last=2, **place)
        whole = parallel.gather_weights(model)
        if world.is_first:
            torch.save(whole, folder / file_name("never stopped", kind))
    for saved, kind in product(("ddp", "fsdp"), repeat=2):
        clip = make("infonce", seed=5 + world.rank)
        model = parallel.wrap(clip, kind)
        optimizer = make_optimizer(clip)
        weights, state = (
            torch.load(folder / file_name("half", saved)) if world.is_first else ({}, {})
        )
        parallel.load_weights(model, weights)
        parallel.load_optimizer(model, optimizer, state)
        train("infonce", model, clip, optimizer, first=1, last=2, **place)
        whole = parallel.gather_weights(model)
        if world.is_first:
            torch.save(whole, folder / file_name("resumed", saved, kind))


def fail_on_one_rank(world: parallel.World, folder: Path) -> None:
    if world.rank == 1:
        raise InputError("this rank alone fails")
    parallel.barrier()


def torchrun(part: Callable[..., None], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(NUM_RANKS), __file__, part.__name__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run = torchrun(train_cases, folder)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    run = torchrun(save_and_resume, folder)
    assert run.returncode == 0, run.stderr
    return folder


def alone(case: str) -> tuple[CLIP, list[float]]:
    clip = make(case)
    return clip, train(case, clip, clip, make_optimizer(clip))


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(("case", "kind", "chunk_size"), CASES)
def test_two_processes_equal_one_on_the_joined_batch(trained, case, kind, chunk_size):
    weights, figures = torch.load(trained / file_name(case, kind, chunk_size))
    clip, expected_figures = alone(case)
    torch.testing.assert_close(figures, expected_figures, rtol=1e-5, atol=1e-5)
    assert_same_weights(weights, clip.state_dict())
    assert min(expected_figures[1::2]) > MAX_NORM, "the gradients were not clipped"
    fresh = make(case).state_dict()
    assert (weights["text_projection"] - fresh["text_projection"]).abs().max() > 1e-3
    assert (weights["logit_scale"] - fresh["logit_scale"]).abs() > 1e-3


def test_each_tower_can_be_called_by_itself_under_fsdp(tmp_path):
    run = torchrun(evaluate_under_fsdp, tmp_path)
    assert run.returncode == 0, run.stderr
    clip, batch = make("infonce"), make_batch("infonce", 0)
    for first in range(2):
        with torch.no_grad():
            expected = clip.encode_image(batch.image_BCSS), clip.encode_text(batch.tokens_BL)
        for rank in range(NUM_RANKS):
            found = torch.load(tmp_path / f"towers-{rank}.pt")[first]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        train("infonce", clip, clip, make_optimizer(clip), first=first, last=first + 1)


@pytest.mark.parametrize(("saved", "kind"), [*product(("ddp", "fsdp"), repeat=2)])
def test_what_two_processes_saved_two_go_on_with(resumed, saved: Kind, kind: Kind):
    expected = torch.load(resumed / file_name("never stopped", saved))
    assert_same_weights(torch.load(resumed / file_name("resumed", saved, kind)), expected)


@pytest.mark.parametrize("saved", ["ddp", "fsdp"])
def test_what_two_processes_saved_one_goes_on_with(resumed, saved):
    weights, state = torch.load(resumed / file_name("half", saved))
    clip = make("infonce", seed=5)
    optimizer = make_optimizer(clip)
    parallel.load_weights(clip, weights)
    parallel.load_optimizer(clip, optimizer, state)
    train("infonce", clip, clip, optimizer, first=1, last=2)
    assert_same_weights(clip.state_dict(), torch.load(resumed / file_name("never stopped", saved)))


def test_one_process_goes_on_bit_for_bit():
    clip = make("infonce")
    optimizer = make_optimizer(clip)
    train("infonce", clip, clip, optimizer, last=1)
    weights = parallel.gather_weights(clip)
    state = parallel.gather_optimizer(clip, optimizer)
    weights, state = torch.utils._pytree.tree_map(torch.clone, (weights, state))
    train("infonce", clip, clip, optimizer, first=1, last=2)
    other = make("infonce", seed=5)
    optimizer = make_optimizer(other)
    parallel.load_weights(other, weights)
    parallel.load_optimizer(other, optimizer, state)
    train("infonce", other, other, optimizer, first=1, last=2)
    for name, tensor in clip.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_when_one_process_fails_all_end_and_its_error_is_shown(tmp_path):
    started_s = time.monotonic()
    run = torchrun(fail_on_one_rank, tmp_path)
    assert run.returncode != 0
    assert "this rank alone fails" in run.stderr
    assert time.monotonic() - started_s < 60


def test_one_process_needs_no_group():
    with parallel.join("cpu") as world:
        assert (world.rank, world.size, world.is_first) == (0, 1, True)
        assert world.device == torch.device("cpu")
        assert not torch.distributed.is_initialized()
        clip = make("infonce")
        assert parallel.wrap(clip, "ddp") is clip
        assert parallel.wrap(clip, "fsdp") is clip
        parallel.barrier()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused():
    with pytest.raises(InputError, match="CUDA device"), parallel.join("cuda"):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    with parallel.join("cpu", timeout_s=120.0) as this_world:
        globals()[sys.argv[1]](this_world, Path(sys.argv[2]))
