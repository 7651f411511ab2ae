"""Every recipe is one the command can follow, and says what came of it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from clip_rt.errors import InputError
from training.config import TrainConfig
from training.recipe import RECIPES, read_options, read_recipe
from training.run import parse

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))
STAGES = [
    f"{name}{stage}"
    for name in NAMES
    for stage in ("", *(f":{each}" for each in read_recipe(RECIPES / f"{name}.toml").stages))
]
BEFORE = json.loads("""{
    "max_pixels": 64000000, "max_bytes": 33554432, "model": "RN26@64px", "activation": null,
    "init_from": null, "out_dir": "runs/drawings", "resume": false, "data": [],
    "data_dir": "data/drawings", "sample": false, "emoji_fraction": 0.5,
    "templates": "openai_imagenet", "data_weights": [], "crop_scale": [0.9, 1.0],
    "colour_jitter": 0.0, "grey_probability": 0.0, "allow_commands": false,
    "allow_outside": false, "folder_kind": "auto", "max_bad_share": 0.2, "num_workers": 2,
    "eval_data": [], "class_names": null, "objective": "infonce", "teacher": null,
    "teacher_model": "ViT-B/32", "teacher_activation": null, "distill_weight": 1.0,
    "batch_size": 512, "chunk_size": 0, "total_steps": null, "warmup_steps": 150,
    "peak_lr": 0.001, "layer_decay": 1.0, "weight_decay": 0.2, "max_grad_norm": 1.0,
    "lock": "none", "patch_dropout": 0.0, "ema_decay": 0.998, "precision": "auto",
    "grad_checkpointing": false, "compile_backend": "", "device": "auto", "parallel": "ddp",
    "num_threads": 0, "seed": 0, "eval_every_steps": 320, "log_every_steps": 10, "keep_last": 2,
    "tensorboard": false
}""")
"""What a snapshot of the bundled model's run said when its options were every run's defaults."""


def test_there_is_a_recipe_for_each_purpose() -> None:
    assert NAMES == ["drawings", "fine_tune", "web"]


@pytest.mark.parametrize("name", STAGES)
def test_a_recipe_is_a_configuration_and_holds_each_of_its_options(name: str) -> None:
    config = parse(["--recipe", name])
    assert config.recipe == name
    recipe = read_recipe(RECIPES / f"{name.partition(':')[0]}.toml")
    stage = name.partition(":")[2]
    options = {**recipe.options, **(recipe.stages[stage] if stage else {})}
    assert options.items() <= config.as_json().items()


@pytest.mark.parametrize("name", NAMES)
def test_each_run_of_a_recipe_is_a_command_that_follows_it(name: str) -> None:
    runs = read_recipe(RECIPES / f"{name}.toml").runs
    assert runs
    for run in runs:
        program, _, options = run.command.partition("-m training.run ")
        assert program.split()[0] in ("python", "torchrun")
        assert parse(shlex.split(options)).recipe.partition(":")[0] == name
        assert run.machine
        assert run.result
        assert isinstance(run.hours, str) or run.hours > 0
        # What was not run has no result, and what has none was not run.
        assert (run.hours == "not run") == (run.result == "not run") == (run.machine == "not run")


def test_options_of_the_command_line_win_wherever_they_stand() -> None:
    for words in (
        ["--recipe", "drawings:second", "--peak-lr", "0.5", "--sample"],
        ["--peak-lr", "0.5", "--sample", "--recipe", "drawings:second"],
    ):
        config = parse(words)
        assert (config.peak_lr, config.drawings.sample, config.seed) == (0.5, True, 1)
    assert parse(["--recipe", "web", "--data", "a", "b"]).data == ("a", "b")


def test_without_data_a_run_follows_the_recipe_of_the_bundled_model() -> None:
    """As before there were recipes, option for option."""
    was = {**BEFORE, "total_steps": 3200}
    now = parse([]).as_json()
    assert {name: now[name] for name in was} == was
    now = parse(["--sample"]).as_json()
    assert {name: now[name] for name in was} == {**was, "total_steps": 150, "sample": True}


def test_with_data_a_run_follows_none() -> None:
    assert parse(["--data", "a"]) == TrainConfig(data=("a",))


def test_a_run_that_was_begun_before_there_were_recipes_goes_on() -> None:
    parse(["--resume"]).check_resumes(BEFORE)
    parse(["--sample", "--resume"]).check_resumes({**BEFORE, "sample": True})
    own = {**BEFORE, "data": ["a.csv"], "total_steps": 500}
    with pytest.raises(InputError, match=r"model was 'RN26@64px'.*--recipe drawings"):
        parse(["--resume", "--data", "a.csv", "--total-steps", "500"]).check_resumes(own)
    parse(
        ["--recipe", "drawings", "--resume", "--data", "a.csv", "--total-steps", "500"]
    ).check_resumes(own)
    with pytest.raises(InputError, match="total_steps was 3200 and is 7"):
        parse(["--resume", "--total-steps", "7"]).check_resumes(BEFORE)


def test_ones_own_recipe_is_named_by_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'purpose = "mine"\n[options]\ndata = ["a.csv", "b"]\npeak_lr = 1e-4\ntensorboard = true\n'
        "[stages.b]\nallow_outside = false\n"
    )
    config = parse(["--recipe", f"{path}:b"])
    assert (config.data, config.peak_lr, config.tensorboard) == (("a.csv", "b"), 1e-4, True)
    assert read_options(f"{path}:b")[-1] == "--no-allow-outside"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("web2", "no recipe 'web2'; there are drawings, fine_tune, web"),
        ("drawings:third", "no stage 'third'; it has first, second, sample"),
        ("web:first", "no stage 'first'; it has none"),
        ("nowhere/a.toml", "nowhere/a.toml.*cannot be read"),
    ],
)
def test_a_recipe_that_is_not_there_is_said_not_to_be(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(["--recipe", name])


@pytest.mark.parametrize(
    "text", ["options = [", "[options]", 'purpose = "x"\noptions = {}\nhours = 3', "\x00"]
)
def test_what_is_no_recipe_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError, match="cannot be read"):
        parse(["--recipe", str(path)])


def test_an_option_the_command_does_not_know_ends_it(tmp_path: Path, capsys) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('purpose = "x"\n[options]\npeek_lr = 1.0\n')
    with pytest.raises(SystemExit):
        parse(["--recipe", str(path)])
    assert "--peek-lr" in capsys.readouterr().err


def test_help_shows_the_options_of_drawings_by_themselves(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(["--help"])
    core, _, drawings = capsys.readouterr().out.partition("drawings options")
    assert "--model" in core
    for option in ("--data-dir", "--sample", "--emoji-fraction", "--random-convolutions"):
        assert option in drawings
        assert option not in core
