"""The training step: what it asks of its device, and what a batch that is not finite leaves."""

from __future__ import annotations

import importlib
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from clip_rt.specs import MODELS, ResNetSpec
from training import build, parallel
from training import run as train
from training.journal import read_journal
from training.update import Tally, make_update

ADAM = importlib.import_module("torch.optim.adam")
CPU = parallel.World(0, 1, torch.device("cpu"))
META = parallel.World(0, 1, torch.device("meta"))
RESNET = replace(
    tiny_run.TINY, name="tiny-resnet@32px", image=ResNetSpec(layers=(1, 1, 1, 1), width=8)
)
WAYS = [
    {},
    {"chunk_size": 2},
    {"objective": "sigmoid"},
    {"patch_dropout": 0.5, "lock": "text"},
    {"model": RESNET.name},
]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for spec in (tiny_run.TINY, RESNET):
        monkeypatch.setitem(MODELS, spec.name, spec)
    return tiny_run.write_classes(tmp_path / "images")


@pytest.mark.parametrize("changes", WAYS, ids=str)
def test_an_update_reads_nothing_from_its_device(data, tmp_path, monkeypatch, changes) -> None:
    """On the meta device, where there is nothing to read: what waits for a GPU fails there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *_, **__: None)
    monkeypatch.setattr(ADAM, "_device_dtype_check_for_fused", lambda *_, **__: None)
    config = tiny_run.config(data, tmp_path / "out", precision="fp32", **changes)
    run = build.build(config, META)
    batches = build.open_data(config, CPU, run.clip).stream(0)
    tally = Tally.of(run)
    for _ in range(3):
        make_update(run, next(batches), tally)
    assert [each.device.type for each in tally.outcomes] == ["meta"] * 3
    with pytest.raises(NotImplementedError, match="no data"):
        tally.fetch()


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor: `item`, `bool`, `float`, `int`."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [*WAYS, {"precision": "fp16"}], ids=str)
def test_a_run_reads_numbers_at_logged_steps_only(data, tmp_path, monkeypatch, changes) -> None:
    config = tiny_run.config(
        data, tmp_path / "out", log_every_steps=4, eval_every_steps=12,
        **{"precision": "fp32", **changes},
    )  # fmt: skip
    before, fetched = [], []
    update, fetch = make_update, Tally.fetch

    def counted_update(*args):
        before.append(reads.count)
        update(*args)

    def counted_fetch(tally):
        fetched.append(len(before))
        return fetch(tally)

    monkeypatch.setattr(train, "make_update", counted_update)
    monkeypatch.setattr(Tally, "fetch", counted_fetch)
    with Reads() as reads:
        train.main(config)
    changed = [n for n in range(1, len(before)) if before[n] != before[n - 1]]
    lines = read_journal(config.out_dir / "log.jsonl")
    late = sum("skipped_batch" in line for line in lines)  # FP16 begins with a scale too large.
    assert changed == [4 + late, 8 + late]
    assert fetched[-3:] == [4 + late, 8 + late, 12 + late]
    assert (late > 0) == (config.precision == "fp16")


@pytest.mark.parametrize("model", [tiny_run.TINY.name, RESNET.name])
def test_a_batch_that_is_not_finite_changes_nothing(data, tmp_path, model) -> None:
    config = tiny_run.config(data, tmp_path / "out", precision="fp32", model=model)
    run = build.build(config, CPU)
    batches, tally = run.data.stream(0), Tally.of(run)
    make_update(run, next(batches), tally)
    assert tally.step == 1

    def everything():
        state = run.optimizer.state_dict()["state"]
        found = {f"{name} {role}": t for name, roles in state.items() for role, t in roles.items()}
        found |= {f"average {name}": t for name, t in run.average.average.items()}
        return {name: t.clone() for name, t in (run.clip.state_dict() | found).items()}

    before = everything()
    batch = next(batches)
    make_update(run, replace(batch, image_BCSS=batch.image_BCSS * torch.nan), tally)
    after = everything()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert (tally.step, tally.num_bad) == (1, 1)
    make_update(run, batch, tally)
    assert (tally.step, tally.num_bad) == (2, 0)
    assert [(each.was_made, each.is_bad) for each in tally.fetch()] == [
        (True, False), (False, True), (True, False),
    ]  # fmt: skip
    assert tally.fetch() == []


@pytest.mark.parametrize(
    "poisoned", [(2,), (1, 3), tuple(range(7, 12))], ids=["one", "two", "back to a snapshot"]
)
def test_how_often_a_run_is_logged_changes_no_bit_of_it(
    data, tmp_path, monkeypatch, poisoned
) -> None:
    """Also where batches are skipped: the host hears of them late, the device at once."""
    tiny_run.poison(monkeypatch, *poisoned)
    ends, lines = [], []
    for every in (1, 6):
        out_dir = tmp_path / f"every{every}"
        train.main(
            tiny_run.config(data, out_dir, log_every_steps=every, eval_every_steps=6, peak_lr=0.01)
        )
        end = out_dir / "snapshots/step_00000012.safetensors"
        with safe_open(end, framework="numpy") as file:
            facts = json.loads(file.metadata()["clip_rt.run"])
        ends.append((load_file(end), facts["data_step"], facts["num_rollbacks"]))
        skipped = [
            (line["step"], line["skipped_batch"])
            for line in read_journal(out_dir / "log.jsonl")
            if "skipped_batch" in line
        ]
        lines.append(skipped)
    (one, *one_facts), (other, *other_facts) = ends
    assert one_facts == other_facts
    assert lines[0] == lines[1]
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
