"""The README's Python runs as printed and prints what the README says, and its commands exist.

The commands themselves run in `make extras`, each where only what README installs is installed.
"""

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import clip_rt
from benchmarks.record import read_run
from benchmarks.report.readme import check, results_of
from clip_rt.specs import MODELS
from clip_rt.testing import FakeServer

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "model_repository/README.md")
TOOLS = ("make ", "pip ", "docker ", "curl ", "tritonserver ", "pre-commit ")


def load_step():
    """`make extras`, which reads README's commands too."""
    spec = importlib.util.spec_from_file_location("extras_step", ROOT / ".ci/extras.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


STEP = load_step()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.M)


def python_commands() -> list[str]:
    """Commands of ours in all documents, in blocks and within sentences."""
    found: list[str] = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text("utf-8")
        inline = re.findall(r"(?<!`)`((?:python|torchrun) [^`]+)`(?!`)", text)
        found += [*STEP.commands(ROOT / name), *(" ".join(each.split()) for each in inline)]
    pieces = [piece.strip() for each in found for piece in each.split("&&")]
    return [each for each in dict.fromkeys(pieces) if re.match(r"(python|torchrun) ", each)]


@functools.cache
def help_of(command: tuple[str, ...]) -> str:
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", python_commands())
def test_every_command_of_the_documents_has_the_options_it_is_shown_with(command):
    words = shlex.split(command)
    if "-c" in words:
        compile(words[words.index("-c") + 1], command, "exec")
        return
    if "-m" in words:
        start = words.index("-m")
        program, rest = words[start : start + 2], words[start + 2 :]
    else:
        program, rest = words[1:2], words[2:]
    if rest and program[1:] in (["clip_rt"], ["export.bundle"]):
        program, rest = [*program, rest[0]], rest[1:]
    if program == ["-m", "pytest"]:
        return
    text = help_of(tuple(program))
    if program[0] == "-m":
        assert f"usage: python -m {' '.join(program[1:])} " in " ".join(text.lower().split())
    options = [word.partition("=")[0] for word in rest if word.startswith("--")]
    assert [each for each in options if not re.search(rf"{each}(?![\w-])", text)] == []


def test_what_the_step_leaves_out_or_makes_smaller_is_in_the_readme():
    commands = STEP.commands(README)
    for start in STEP.NOT_RUN:
        assert any(STEP.why_not(each) == STEP.NOT_RUN[start] for each in commands), start
    assert [full for full, _ in STEP.SMALLER if not any(full in each for each in commands)] == []
    assert [each for each in STEP.BEFORE if not any(each in other for other in commands)] == []


def test_whatever_is_no_command_of_ours_is_known():
    for command in STEP.commands(README):
        assert command.startswith((*STEP.SHELL, "import ")), command


def test_the_readme_lists_the_architectures_there_are():
    text = " ".join(README.read_text("utf-8").split())
    listed = re.search(r"`--model` is the architecture: (.*?)\. ", text)[1]
    assert re.split(r", | or ", listed) == list(MODELS)


def test_the_calls_of_production_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with FakeServer(model="shop-v3") as a, FakeServer(model="shop-v3") as b:
        code = SNIPPETS[1].replace("triton-a:8001", a.url).replace("triton-b:8001", b.url)
        code = code.replace("/var/cache/clip_rt", str(tmp_path))
        kept = []
        names = {
            "clip_rt": clip_rt,
            "token": "t",
            "labels": ["cat", "dog"],
            "paths": ["examples/images/rocket.png", "nowhere.png"],
            "millions_of_paths": ["examples/images/pizza.png"] * 3,
            "index": type("Index", (), {"add": staticmethod(lambda *row: kept.append(row))}),
        }
        exec(compile(code, "README.md", "exec"), names)
        names["client"].close()
    assert [error.index for error in names["scores"].failures] == [1]
    assert sum(len(rows) for _, rows in kept) == 3


def test_the_test_of_ones_own_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    picture = (ROOT / "examples/images/rocket.png").read_bytes()
    (tmp_path / "tests/cat.jpg").write_bytes(picture)
    exec(compile(SNIPPETS[2], "README.md", "exec"), {"clip_rt": clip_rt})


def test_the_example_prints_what_the_readme_shows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, output = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL).groups()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == output


def test_every_figure_of_the_readme_is_in_a_result() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"## What was measured\n(.*?)\n## ", text, re.DOTALL)[1]
    figures = re.findall(r"\b0\.\d{3,}\b", table)
    results = "".join(path.read_text() for path in (ROOT / "benchmarks/results").glob("*.json"))
    known = {f"{float(number):.3f}" for number in re.findall(r"\d\.\d+(?:e-\d+)?", results)}
    assert len(figures) > 4
    assert not {figure for figure in figures if f"{float(figure):.3f}" not in known}


def test_the_benchmark_tables_are_those_of_their_results():
    readme = ROOT / "README.md"
    paths = results_of(readme)
    assert paths
    for path in paths:
        assert check(readme, read_run(path), path), f"python -m benchmarks.report.readme {path}"
