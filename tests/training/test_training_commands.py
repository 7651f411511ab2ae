"""What cannot be used ends every command of training with one line that names it, no traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_clip as tiny
import torch
import tyro
from PIL import Image
from tar_shards import encode

from clip_rt.specs import MODELS
from clip_rt_commands.errors import command
from training import coop, evaluate, few_shot, interpolate, parallel, probe
from training import run as train
from training.build import build_clip, open_data
from training.checkpoint import save_checkpoint
from training.config import TrainConfig
from training.evaluation.labelled import read_samples

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("allow_outside", "max_bad_share", "folder_kind", "max_pixels", "max_bytes")
COMMANDS = {
    "run": (TrainConfig, train.main),
    "evaluate": (evaluate.EvaluateConfig, evaluate.main),
    "probe": (probe.ProbeConfig, probe.main),
    "coop": (coop.CoopConfig, coop.main),
    "few_shot": (few_shot.FewShotConfig, few_shot.main),
    "interpolate": (interpolate.InterpolateConfig, interpolate.main),
}


def run(name: str, *arguments: object) -> None:
    """Do what `python -m training.NAME` does."""
    _, main = COMMANDS[name]
    with command():
        main(read(name, *arguments))


def read(name: str, *arguments: object) -> Any:
    """Read the options of `python -m training.NAME`."""
    words = list(map(str, arguments))
    return train.parse(words) if name == "run" else tyro.cli(COMMANDS[name][0], args=words)


def fail(name: str, *arguments: object) -> str:
    """Return the line that a command ends with; each option it names must be one of its own."""
    with (
        pytest.raises(SystemExit, match="1"),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        run(name, *arguments)
    # What libraries print comes first.
    message = said.getvalue().splitlines()[-1]
    assert message.startswith("error: ")
    wanted = {each for each in OPTIONS if each in message}
    wanted |= {each.replace("-", "_") for each in re.findall(r"--([a-z][a-z-]+)", message)}
    assert wanted <= {field.name for field in dataclasses.fields(COMMANDS[name][0])}, message
    return message


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / f"classes/{name}").mkdir(parents=True)
        for number in range(2):
            (tmp_path / f"classes/{name}/{number}.jpg").write_bytes(encode((number * 90, 9, 9)))
    return tmp_path / "classes"


TRAIN = ("--batch-size", 4, "--total-steps", 1, "--num-workers", 0, "--precision", "fp32")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run", ("--data", "nowhere/photos", "--out-dir", "{tmp}/out")),
        ("run", ("--data", "nowhere/a.tar", "--out-dir", "{tmp}/out")),
        ("run", ("--data", "nowhere/a.csv", "--out-dir", "{tmp}/out")),
        ("run", ("--sample", "--eval-data", "nowhere/val", "--out-dir", "{tmp}/out")),
        ("run", ("--sample", "--init-from", "nowhere/a.pt", "--out-dir", "{tmp}/out")),
        ("evaluate", ("--checkpoint", "nowhere/a.pt", "--data", ".")),
        ("evaluate", ("--checkpoint", "nowhere/folder", "--data", ".")),
        ("evaluate", ("--checkpoint", "openai", "--data", "nowhere/val")),
        ("probe", ("--checkpoint", "nowhere/a.pt", "--data", ".", "--out", "{tmp}/p.npz")),
        (
            "probe",
            (
                *("--checkpoint", "openai", "--data", ".", "--test", "nowhere/test"),
                *("--out", "{tmp}/p.npz"),
            ),
        ),
        (
            "coop",
            ("--checkpoint", "openai", "--data", "nowhere/a", "--out", "{tmp}/p.npz"),
        ),
        ("few_shot", ("--checkpoint", "nowhere/a.safetensors", "--data", ".")),
        (
            "interpolate",
            ("--zero-shot", "nowhere/a.safetensors", "--fine-tuned", "nowhere/b.safetensors"),
        ),
    ],
)
def test_what_is_not_there_is_said_not_to_be_there(
    tmp_path: Path, name: str, arguments: tuple[str, ...]
) -> None:
    message = fail(name, *(str(each).replace("{tmp}", str(tmp_path)) for each in arguments))
    assert "nowhere" in message
    assert re.search(r"does not exist|no checkpoint file|there is no|No such file", message)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("run", ("--sample", "--out-dir", ".")),
        ("evaluate", ("--checkpoint", "nowhere/a.safetensors", "--data", ".")),
        ("drawings", ("--packages", "nowhere")),
    ],
)
def test_a_process_ends_with_one_line_too(
    tmp_path: Path, module: str, arguments: tuple[str, ...]
) -> None:
    found = subprocess.run(
        [sys.executable, "-m", f"training.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert found.stderr.strip().splitlines()[-1].startswith("error: ")


def test_bad_data_end_a_run_with_one_line(tmp_path: Path, classes: Path) -> None:
    for path in classes.rglob("*.jpg"):
        path.write_bytes(b"<html>")
    message = fail("run", "--data", classes, "--out-dir", tmp_path / "out", *TRAIN)
    assert "4 of the first 4 samples are bad" in message


def test_an_out_dir_that_is_not_empty_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("mine")
    assert f"{tmp_path} is not empty" in fail("run", "--sample", "--out-dir", tmp_path)


def test_an_image_over_a_limit_names_no_option_that_is_not_there(
    tmp_path: Path, classes: Path
) -> None:
    for path in classes.rglob("*.jpg"):
        Image.new("L", (9000, 9000)).save(path)
    message = fail("run", "--data", classes, "--out-dir", tmp_path / "out", *TRAIN)
    assert "9000 x 9000 px" in message
    assert "4 x unusable image" in message


@pytest.mark.parametrize("kind", ["table", "links", "folder"])
def test_the_ways_out_that_are_named_are_ways_out(tmp_path: Path, classes: Path, kind: str) -> None:
    images = sorted(classes.rglob("*.jpg"))
    data = tmp_path / "elsewhere"
    data.mkdir()
    option: tuple[str, ...] = ("--allow-outside",)
    if kind == "table":
        data /= "train.csv"
        data.write_text("image,caption\n" + "".join(f"{path},a cat\n" for path in images))
    elif kind == "links":
        for path in images:
            link = data / path.relative_to(classes)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path)
    else:
        data = classes
        images[0].with_suffix(".txt").write_text("0 0 9 9")
        option = ("--folder-kind", "classes")
    arguments = ("--data", data, "--out-dir", tmp_path / "out", *TRAIN)
    assert option[0] in fail("run", *arguments)
    config = read("run", *arguments, *option)
    world = parallel.World(0, 1, torch.device("cpu"))
    batches = open_data(config, world, build_clip(config))
    assert len(next(batches.stream(0)).group_B) == 4


@pytest.mark.parametrize("name", ["evaluate", "probe", "coop", "few_shot"])
def test_a_table_of_absolute_paths_is_read_where_that_is_asked_for(
    tmp_path: Path, classes: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, tiny.VIT.name, tiny.VIT)
    model = tiny.make(tiny.VIT)
    save_checkpoint(
        tmp_path / "w.safetensors", model.state_dict(), tiny.VIT.facts, step=0, config={}
    )
    (tmp_path / "table").mkdir()
    rows = [f"{path},{path.parent.name}\n" for path in sorted(classes.rglob("*.jpg"))]
    (tmp_path / "table/t.csv").write_text("image,label\n" + "".join(rows))
    arguments = ["--checkpoint", tmp_path / "w.safetensors", "--data", tmp_path / "table/t.csv"]
    if name != "evaluate":
        arguments += ["--out", tmp_path / "out.npz"]
    assert "--allow-outside" in fail(name, *arguments)
    config = read(name, *arguments, "--allow-outside")
    samples = read_samples(config.data, allow_outside=config.allow_outside)
    assert [sample.label for sample in samples] == ["cat", "cat", "dog", "dog"]
