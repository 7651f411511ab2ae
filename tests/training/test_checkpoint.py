import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from clip_rt.errors import CheckpointError
from clip_rt.specs import MODELS
from training.checkpoint import (
    Snapshot,
    flatten_optimizer,
    load_last_snapshot,
    pack,
    remove_partials,
    save_checkpoint,
    save_snapshot,
    unflatten_optimizer,
    unpack,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3)}


def test_a_snapshot_comes_back_as_it_was(tmp_path: Path) -> None:
    save_snapshot(tmp_path, Snapshot(7, pack("model", TENSORS), {"best": 0.5}), keep_last=2)
    loaded = load_last_snapshot(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.facts) == (7, {"best": 0.5})
    back = unpack("model", loaded.tensors)
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[name], TENSORS[name]) for name in TENSORS)


def test_the_last_ones_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_snapshot(tmp_path, Snapshot(step, TENSORS, {}), keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000010.safetensors",
        "step_00000015.safetensors",
    ]
    loaded = load_last_snapshot(tmp_path)
    assert loaded is not None
    assert loaded.step == 15


def test_a_damaged_snapshot_is_passed_over_and_all_damaged_is_said(tmp_path: Path) -> None:
    assert load_last_snapshot(tmp_path / "none") is None
    for step in (5, 10):
        save_snapshot(tmp_path, Snapshot(step, TENSORS, {}), keep_last=2)
    newest = tmp_path / "step_00000010.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    loaded = load_last_snapshot(tmp_path)
    assert loaded is not None
    assert loaded.step == 5
    (tmp_path / "step_00000005.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 snapshots"):
        load_last_snapshot(tmp_path)


def test_a_full_disk_leaves_the_older_snapshot_and_no_half_one(tmp_path: Path) -> None:
    save_snapshot(tmp_path, Snapshot(1, TENSORS, {}), keep_last=2)
    # A limit on the size of files makes a real write fail half-way, as a full disk does.
    program = f"""
import resource, signal, torch
from pathlib import Path
from clip_rt.errors import CheckpointError
from training.checkpoint import Snapshot, save_snapshot
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_snapshot(Path({str(tmp_path)!r}), Snapshot(2, {{"x": torch.zeros(100_000)}}, {{}}),
                  keep_last=2)
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert "cannot be written" in done.stdout
    assert "--resume" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.safetensors"]


def test_what_a_kill_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    half = tmp_path / "snapshots" / ".step_00000009.safetensors.77.partial"
    half.write_bytes(b"half")
    (tmp_path / "mine.partial").write_bytes(b"a user's")
    remove_partials(tmp_path)
    assert not half.exists()
    assert (tmp_path / "mine.partial").exists()


def test_an_optimizers_state_comes_back_as_it_was() -> None:
    state = {"a.weight": {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}}
    back = unflatten_optimizer(flatten_optimizer(state))
    assert back["a.weight"]["step"] == 3.0
    assert torch.equal(back["a.weight"]["exp_avg"], torch.ones(2))


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "new" / "checkpoint.safetensors"
    save_checkpoint(path, TENSORS, MODELS["RN26@64px"].facts, step=3, config={"seed": 1})
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["architecture"] == "RN26@64px"
    assert metadata["activation"] == "quick_gelu"
    assert json.loads(metadata["config"]) == {"seed": 1}
    assert torch.equal(load_file(path)["a"], TENSORS["a"])
