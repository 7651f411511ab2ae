import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from processes import running
from safetensors import safe_open
from safetensors.torch import load_file

from clip_rt.classification.probe import Probe
from clip_rt.errors import CheckpointError, InputError, TrainingError
from clip_rt.specs import MODELS
from training import coop
from training.config import DrawingsConfig, TrainConfig
from training.coop import CoopConfig
from training.data.drawing_batches import Drawings, load_drawings
from training.evaluation import judge
from training.journal import read_journal
from training.run import main, parse
from training.weights.load import load_clip


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, tiny_run.TINY.name, tiny_run.TINY)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny_run.write_classes(tmp_path / "images")


def write_table(folder: Path) -> Path:
    """List the images of class folders beside them, as a user would."""
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in folder.rglob("*.png")]
    table = folder / "table.csv"
    table.write_text("\n".join(["image,label", *sorted(rows)]))
    return table


def start(data: Path, out_dir: Path, *options: str) -> subprocess.Popen[bytes]:
    """Train in a process of its own, as a user would."""
    given = ["--model", "tiny@32px", "--data", str(data), "--out-dir", str(out_dir)]
    given += "--batch-size 6 --total-steps 40 --warmup-steps 2 --log-every-steps 1".split()
    given += "--eval-every-steps 5 --num-workers 0 --num-threads 1 --device cpu".split()
    given += ["--patch-dropout", "0.25", "--ema-decay", "0.9"]
    root = Path(tiny_run.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, tiny_run.__file__, *given, *options],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    started.append(process)
    return process


started: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def all_end() -> Iterator[None]:
    """Whatever a test has started ends with it."""
    yield
    while started:
        process = started.pop()
        process.kill()
        process.communicate(timeout=60)


def finish(process: subprocess.Popen[bytes]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()
    return output.decode()


def losses_of(out_dir: Path) -> list[float]:
    return [line["loss"] for line in read_journal(out_dir / "log.jsonl") if "loss" in line]


def wait_for_step(out_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        log = out_dir / "log.jsonl"
        if log.exists() and any(line["step"] >= step for line in read_journal(log)):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was never reached")


def assert_same_end(one: Path, other: Path) -> None:
    for name in ("checkpoint.safetensors", "snapshots/step_00000040.safetensors"):
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted, on the same images as each test has."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(tiny_run.write_classes(folder / "images"), folder / "out"))
    return folder / "out"


def test_a_run_killed_at_random_steps_ends_with_the_weights_of_one_never_killed(
    tmp_path: Path, data: Path, whole: Path
) -> None:
    killed = tmp_path / "killed"
    steps = sorted(random.sample(range(6, 38), 2))
    for step in steps:
        process = start(data, killed, "--resume")
        wait_for_step(killed, step)
        process.kill()
        process.wait(timeout=60)
    finish(start(data, killed, "--resume"))
    assert_same_end(whole, killed)
    logged = [line["step"] for line in read_journal(killed / "log.jsonl") if "loss" in line]
    assert logged == list(range(1, 41)), f"killed at {steps}"


def test_sigterm_ends_in_a_state_to_resume_from(tmp_path: Path, data: Path, whole: Path) -> None:
    stopped = tmp_path / "stopped"
    process = start(data, stopped)
    wait_for_step(stopped, 11)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "go on with --resume" in output.decode()
    last = max(path.name for path in (stopped / "snapshots").iterdir())
    assert last > "step_00000010.safetensors"
    finish(start(data, stopped, "--resume"))
    assert_same_end(whole, stopped)


@pytest.mark.timeout(600)
def test_a_short_run_on_drawings_learns_and_leaves_what_the_next_step_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_few(shards: Sequence[Path], *, progress: bool) -> Drawings:
        """All of them take a minute to judge."""
        drawings = load_drawings(shards, progress=progress)
        return replace(drawings, pixels=drawings.pixels[:200], records=drawings.records[:200])

    monkeypatch.setattr(judge, "load_drawings", load_few)
    config = replace(
        parse(["--sample"]), out_dir=tmp_path, batch_size=32, total_steps=12, warmup_steps=2,
        log_every_steps=1, eval_every_steps=12,
    )  # fmt: skip
    main(config)
    lines = read_journal(tmp_path / "log.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert set(lines[-1]) >= {"top1_openmoji", "top5_openmoji-black", "recall10_openmoji"}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(tmp_path / "checkpoint.safetensors", framework="numpy") as file:
        assert file.metadata()["architecture"] == "RN26@64px"
        assert file.metadata()["step"] == "12"
        words = file.get_tensor("token_embedding.weight")
    assert (np.abs(words).sum(axis=1) == 0).mean() > 0.5  # tokens that no caption held
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.safetensors", "checkpoint.safetensors", "curves.png", "log.jsonl", "snapshots",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "sigmoid", "grad_checkpointing": True},
        {"chunk_size": 2, "precision": "fp32", "patch_dropout": 0.5},
        {"precision": "fp16", "layer_decay": 0.7},
        {"lock": "image", "compile_backend": "aot_eager", "precision": "fp32"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_every_way_to_train_lowers_the_loss(
    tmp_path: Path, data: Path, changes: dict[str, object]
) -> None:
    config = tiny_run.config(data, tmp_path / "out", total_steps=30, eval_every_steps=30)
    main(replace(config, **changes))
    losses = losses_of(tmp_path / "out")
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_chunks_change_memory_not_the_result(tmp_path: Path, data: Path) -> None:
    losses = []
    for chunk_size in (0, 2):
        out_dir = tmp_path / str(chunk_size)
        main(tiny_run.config(data, out_dir, chunk_size=chunk_size, precision="fp32"))
        losses.append(losses_of(out_dir))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_student_learns_from_its_teacher(tmp_path: Path, data: Path) -> None:
    main(tiny_run.config(data, tmp_path / "teacher"))
    teacher = tmp_path / "teacher/checkpoint.safetensors"
    config = tiny_run.config(
        data, tmp_path / "student", teacher=teacher, teacher_model="tiny@32px", total_steps=20,
    )  # fmt: skip
    main(config)
    losses = losses_of(tmp_path / "student")
    assert losses[-1] < losses[0]


def test_fine_tuning_begins_with_the_weights_it_is_given(tmp_path: Path, data: Path) -> None:
    main(tiny_run.config(data, tmp_path / "first"))
    weights = tmp_path / "first/checkpoint.safetensors"
    config = tiny_run.config(data, tmp_path / "second", init_from=weights, total_steps=1, peak_lr=0)
    main(config)
    before, after = load_file(weights), load_file(tmp_path / "second/checkpoint.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    load_clip(tiny_run.TINY, tmp_path / "second/checkpoint.safetensors")


def test_fine_tuning_keeps_the_activation_the_weights_were_trained_with(tmp_path, data) -> None:
    main(tiny_run.config(data, tmp_path / "first", total_steps=1, activation="gelu"))
    weights = str(tmp_path / "first/checkpoint.safetensors")
    main(tiny_run.config(data, tmp_path / "second", total_steps=1, init_from=weights))
    with safe_open(tmp_path / "second/checkpoint.safetensors", framework="numpy") as file:
        assert file.metadata()["activation"] == "gelu"
    config = {"init_from": weights, "activation": "quick_gelu"}
    with pytest.raises(CheckpointError, match="quick_gelu"):
        main(tiny_run.config(data, tmp_path / "third", **config))


@pytest.mark.parametrize("lock", ["none", "image"])
def test_one_command_tunes_towers_on_a_users_table_of_labels(tmp_path, data, lock) -> None:
    main(tiny_run.config(data, tmp_path / "first", total_steps=1))
    weights = tmp_path / "first/checkpoint.safetensors"
    table = write_table(data)
    config = tiny_run.config(
        table, tmp_path / "tuned", init_from=str(weights), lock=lock, total_steps=30,
        peak_lr=3e-3, eval_data=(table,), eval_every_steps=30,
    )  # fmt: skip
    main(config)
    before, after = load_file(weights), load_file(tmp_path / "tuned/checkpoint.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "transformer" in changed
    assert ("visual" in changed) == (lock == "none")
    line = read_journal(tmp_path / "tuned/log.jsonl")[-1]
    assert line["top1_one_prompt"] > 0.5


def test_classes_that_say_nothing_are_named_by_a_table(tmp_path: Path, data: Path) -> None:
    wnids = dict(
        zip(("blue", "green", "red"), ("n01440764", "n01443537", "n01484850"), strict=True)
    )
    for name, wnid in wnids.items():
        shutil.copytree(data / name, tmp_path / "data" / wnid)
    table = tmp_path / "names.tsv"
    table.write_text("".join(f"{wnid}\t{name}\n" for name, wnid in wnids.items()))
    config = {"eval_data": (tmp_path / "data",), "total_steps": 1, "eval_every_steps": 1}
    with pytest.raises(InputError, match=r"n01440764.*--class-names"):
        main(tiny_run.config(data, tmp_path / "unnamed", **config))
    main(tiny_run.config(data, tmp_path / "named", class_names=table, **config))
    assert "top1_ensemble" in read_journal(tmp_path / "named/log.jsonl")[-1]


def test_words_are_learned_from_the_same_table(tmp_path, data) -> None:
    main(tiny_run.config(data, tmp_path / "first", total_steps=1))
    coop.main(
        CoopConfig(
            checkpoint=str(tmp_path / "first/checkpoint.safetensors"),
            data=(write_table(data),),
            out=tmp_path / "kinds.npz",
            num_steps=3,
        )
    )
    assert Probe.load(tmp_path / "kinds.npz").labels == ("blue", "green", "red")


def test_held_out_data_are_evaluated_and_the_best_weights_kept(tmp_path: Path, data: Path) -> None:
    main(tiny_run.config(data, tmp_path / "out", eval_data=(data,), total_steps=30, peak_lr=3e-3))
    lines = read_journal(tmp_path / "out/log.jsonl")
    scores = [line["top1_one_prompt"] for line in lines if "top1_one_prompt" in line]
    with safe_open(tmp_path / "out/best.safetensors", framework="numpy") as file:
        best = int(file.metadata()["step"])
    steps = [line["step"] for line in lines if "top1_one_prompt" in line]
    assert dict(zip(steps, scores, strict=True))[best] == max(scores)
    assert max(scores) > 1 / 3


def test_a_batch_without_a_finite_loss_is_skipped_and_logged(tmp_path, data, monkeypatch) -> None:
    tiny_run.poison(monkeypatch, 4)
    main(tiny_run.config(data, tmp_path / "out"))
    lines = read_journal(tmp_path / "out/log.jsonl")
    assert [line["skipped_batch"] for line in lines if "skipped_batch" in line] == [5]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    load_clip(tiny_run.TINY, tmp_path / "out/checkpoint.safetensors")  # refuses NaN


def test_bad_samples_are_replaced_counted_and_named(tmp_path, data, capsys) -> None:
    (data / "red" / "0.png").write_bytes(b"no image")
    main(tiny_run.config(data, tmp_path / "out", total_steps=8))
    last = read_journal(tmp_path / "out/log.jsonl")[-2]
    assert last["bad_samples"] == 2  # 48 pairs are two epochs of 24
    said = capsys.readouterr().out
    assert "2 x unusable image" in said
    assert "red/0.png" in said


def test_several_in_a_row_send_the_run_back_to_its_last_snapshot(
    tmp_path, data, monkeypatch
) -> None:
    tiny_run.poison(monkeypatch, *range(5, 10))
    main(tiny_run.config(data, tmp_path / "out"))
    lines = read_journal(tmp_path / "out/log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    snapshots = tmp_path / "out/snapshots"
    with safe_open(snapshots / "step_00000012.safetensors", framework="numpy") as file:
        facts = json.loads(file.metadata()["clip_rt.run"])
    # Five batches made no update, and the two updates after the snapshot were taken back.
    assert (facts["data_step"], facts["num_rollbacks"]) == (12 + 5 + 2, 1)


def test_a_run_that_never_recovers_says_so(tmp_path, data, monkeypatch) -> None:
    tiny_run.poison(monkeypatch, *range(5, 1000))
    with pytest.raises(TrainingError, match="after 3 returns to a snapshot"):
        main(tiny_run.config(data, tmp_path / "out"))


@pytest.mark.timeout(900)
def test_two_processes_train_as_one_and_one_goes_on_from_their_snapshot(
    tmp_path: Path, data: Path
) -> None:
    # Without the crop's randomness rows would still be the same: augmentation follows the row.
    common = {"total_steps": 40, "eval_every_steps": 5, "ema_decay": 0.9, "precision": "fp32"}
    main(tiny_run.config(data, tmp_path / "one", **common))
    for kind in ("ddp", "fsdp"):
        out_dir = tmp_path / kind
        torchrun(data, out_dir, "--precision", "fp32", "--parallel", kind, stop_at=12)
        main(tiny_run.config(data, out_dir, **common, resume=True))
        one, two = losses_of(tmp_path / "one"), losses_of(out_dir)
        assert len(two) == 40
        assert two == pytest.approx(one, rel=1e-3)


def torchrun(data: Path, out_dir: Path, *options: str, stop_at: int) -> None:
    """Train on two processes until a step is reached, then ask them to stop."""
    given = ["--model", "tiny@32px", "--data", str(data), "--out-dir", str(out_dir)]
    given += "--batch-size 6 --total-steps 40 --warmup-steps 2 --log-every-steps 1".split()
    given += "--eval-every-steps 5 --num-workers 0 --num-threads 1 --device cpu".split()
    given += ["--ema-decay", "0.9", "--peak-lr", "1e-3"]
    root = Path(tiny_run.__file__).parents[2]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with running(
        [*launcher, "--nproc-per-node=2", tiny_run.__file__, *given, *options],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        wait_for_step(out_dir, stop_at)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert "go on with --resume" in output.decode()


def test_an_out_dir_that_holds_a_run_is_never_overwritten(tmp_path: Path, data: Path) -> None:
    main(tiny_run.config(data, tmp_path / "out", total_steps=3))
    with pytest.raises(InputError, match="--resume"):
        main(tiny_run.config(data, tmp_path / "out", total_steps=3))


def test_a_run_is_not_resumed_under_another_configuration(tmp_path: Path, data: Path) -> None:
    main(tiny_run.config(data, tmp_path / "out", total_steps=3))
    with pytest.raises(InputError, match=r"peak_lr was 0\.001 and is 0\.5"):
        main(tiny_run.config(data, tmp_path / "out", total_steps=3, peak_lr=0.5, resume=True))


@pytest.mark.parametrize("name", ["init_from", "teacher"])
def test_a_fine_tune_is_not_resumed_as_a_run_from_nothing(name: str) -> None:
    """A file may have moved, but without it the weights would become others."""
    earlier = TrainConfig(**{name: "a.safetensors"}).as_json()
    TrainConfig(**{name: "moved/a.safetensors"}).check_resumes(earlier)
    with pytest.raises(InputError, match=rf"{name} was 'a\.safetensors' and is None"):
        TrainConfig().check_resumes(earlier)
    with pytest.raises(InputError, match=rf"{name} was None and is 'b'"):
        TrainConfig(**{name: "b"}).check_resumes(TrainConfig().as_json())


def test_missing_data_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.drawings"):
        main(TrainConfig(drawings=DrawingsConfig(data_dir=tmp_path), out_dir=tmp_path / "out"))
    with pytest.raises(InputError, match="no tar shard, no table"):
        main(TrainConfig(data=("nowhere",), out_dir=tmp_path / "other"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0}, {"total_steps": 0}, {"chunk_size": -1}, {"ema_decay": -0.1},
        {"precision": "fp16", "parallel": "fsdp"},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_configuration_names_the_field(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        TrainConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"emoji_fraction": 1.5}, {"random_convolutions": -1}], ids=str)
def test_a_wrong_option_of_drawings_names_it(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        DrawingsConfig(**wrong)


def test_drawings_of_another_size_than_the_model_reads_name_what_fits(tmp_path: Path) -> None:
    config = TrainConfig(drawings=DrawingsConfig(sample=True), out_dir=tmp_path)
    with pytest.raises(InputError, match=r"64 px wide, and ViT-B/32 reads 224 px.*drawings"):
        main(config)
