"""The console script `clip-rt` runs our commands, from any folder, with what is installed."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_commands import HIDING, write

from clip_rt_commands import extras
from clip_rt_commands.console import COMMANDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = str(ROOT / "model_repository")
SCRIPT = """
import sys
sys.path.insert(1, {root!r})
from {module} import {function}
sys.exit({function}())
"""
"""What pip writes for an entry point; Python searches its folder first, not the working folder."""
GONE = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {names!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Gone())
"""


@pytest.fixture
def run(tmp_path):
    """Run the script that pyproject.toml declares, as pip writes it, in a folder of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, function = project["scripts"]["clip-rt"].partition(":")
    text = SCRIPT.format(root=str(ROOT), module=module, function=function)
    write(tmp_path, "bin/clip-rt", text)
    (tmp_path / "work").mkdir()

    def run(*arguments, cwd=tmp_path / "work", without=(), **variables):
        kept = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        if without:
            write(tmp_path, "gone/sitecustomize.py", GONE.format(names=sorted(without)))
            variables["PYTHONPATH"] = str(tmp_path / "gone")
        return subprocess.run(
            [sys.executable, tmp_path / "bin/clip-rt", *arguments],
            cwd=cwd,
            env={**kept, "COLUMNS": "100", **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def options_of(text: str) -> str:
    """What follows the usage in a text of help."""
    return text.partition("\n\n")[2]


def test_help_is_a_line_for_each_command_and_needs_nothing(run):
    done = run("--help", without={*extras.SLOW_MODULES, "tyro", "numpy", "tritonclient"})
    assert (done.returncode, done.stderr) == (0, "")
    lines = re.findall(r"^  ([a-z -]+?)  +(.+)$", done.stdout, re.MULTILINE)
    assert lines == [(name, line) for name, (_, line) in COMMANDS.items()]
    assert all(len(line) < 80 for line in done.stdout.splitlines())


def test_help_of_a_group_shows_the_group(run):
    done = run("export", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: clip-rt export COMMAND")
    shown = re.findall(r"^  (\w.*?)  ", done.stdout, re.MULTILINE)
    assert shown == [name for name in COMMANDS if name.startswith("export ")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], None),
        (["bake"], "'bake'"),
        (["bake", "--help"], "'bake'"),
        (["export"], None),
        (["export", "bake"], "'export bake'"),
        (["onnx"], "'onnx'"),
        (["--url", "x"], "'--url'"),
    ],
)
def test_what_is_no_command_is_said(run, arguments, said):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: clip-rt")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ([f"error: there is no command {said}"] if said else [])


def test_the_version_is_printed(run):
    assert run("--version").stdout == importlib.import_module("clip_rt").__version__ + "\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself_as_its_module_does(run, name):
    module, _ = COMMANDS[name]
    words = [name] if module == "clip_rt" else []
    door = run(*name.split(), "--help", without=extras.SLOW_MODULES)
    itself = subprocess.run(
        [sys.executable, "-m", module, *words, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (door.returncode, door.stderr) == (0, "")
    usage = " ".join(door.stdout.split())
    assert usage.startswith((f"usage: clip-rt {name} [", f"usage: clip-rt {name} -"))
    assert "--" in options_of(door.stdout)
    assert options_of(door.stdout) == options_of(itself.stdout)


def test_every_command_of_training_and_export_has_a_door():
    there = {module for module, _ in COMMANDS.values()} - {"clip_rt", "clip_rt_commands.completion"}
    found = set()
    for package in ("export", "training"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if re.search(r"\btyro\.(cli|extras\.subcommand)", path.read_text("utf-8")):
                found.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert found == there


def test_a_wrong_option_is_told_where_help_is(run):
    done = run("export", "canary", "--nothing", without=extras.SLOW_MODULES - {"rich"})
    # Its imports come first, and say what is not installed.
    assert done.stderr.startswith("error: export.canary needs ")
    done = run("models", "--nothing")
    assert done.returncode == 2
    assert "clip-rt models --help" in done.stderr


@pytest.mark.parametrize(
    ("gone", "arguments", "module", "extra"),
    [
        ("onnx", ["export", "onnx", "--model", "RN26@64px"], "export.onnx", "export"),
        ("webdataset", ["export", "compare", "a", "b"], "export.compare", "server,export"),
        ("torch", ["train", "--sample"], "training.run", "train"),
    ],
)
def test_what_is_missing_is_one_sentence(run, gone, arguments, module, extra):
    done = run(*arguments, without={gone})
    assert done.returncode == 1
    assert done.stderr == "error: " + extras.sentence(module, gone) + "\n"
    assert f"pip install 'clip-rt[{extra}]'" in done.stderr


class TestModels:
    def test_needs_nothing_that_the_client_does_not(self, run):
        done = run("models", "--repository", BUNDLED, without=extras.SLOW_MODULES)
        assert (done.returncode, done.stderr) == (0, "")
        header, line = done.stdout.splitlines()
        assert header.split() == "model architecture precision backend served kept weights".split()
        assert line.split()[:4] == ["drawings", "RN26@64px", "fp16_weights", "python"]

    def test_says_what_the_repository_command_says(self, run):
        done = run("export", "repository", "--repository", BUNDLED, TERM="dumb")
        cells = re.findall(r"[^\s│]+", done.stdout.splitlines()[3])
        assert cells == run("models", "--repository", BUNDLED).stdout.splitlines()[1].split()

    def test_the_repository_is_the_one_a_client_takes(self, run, tmp_path):
        assert "drawings" in run("models").stdout
        (tmp_path / "empty").mkdir()
        done = run("models", CLIP_RT_REPOSITORY=str(tmp_path / "empty"))
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {tmp_path}/empty holds no model")
        done = run("models", "--repository", BUNDLED, CLIP_RT_REPOSITORY=str(tmp_path / "empty"))
        assert done.returncode == 0

    def test_a_folder_that_is_not_there_is_an_error(self, run):
        done = run("models", "--repository", "nowhere")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "error: there is no folder nowhere; name one with --repository.\n"


class TestClassify:
    """Where the extra `commands` is not installed."""

    ASKED = (
        *("classify", str(ROOT / "docs/quickstart.png"), "--labels", "food,tools", "--top", "1"),
        *("--repository", BUNDLED, "--server", "in_process"),
    )

    @pytest.fixture
    def bare(self, run, tmp_path):
        def bare(*options):
            cache = str(tmp_path / "cache")
            return run(*self.ASKED, *options, without={"rich", "pyarrow"}, CLIP_RT_CACHE_DIR=cache)

        return bare

    def test_writes_json_and_csv(self, bare):
        done = bare("--csv")
        assert (done.returncode, done.stderr) == (0, "")
        header, line = done.stdout.splitlines()
        assert header == "image,label,probability,similarity,error"
        row = json.loads(bare("--json").stdout)
        assert line == ",".join("" if value is None else str(value) for value in row.values())
        assert row["label"] in ("food", "tools")

    def test_says_what_parquet_needs(self, bare, tmp_path):
        done = bare("--parquet", str(tmp_path / "out.parquet"))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(
            "error: Parquet needs pyarrow: pip install 'clip-rt[commands]'"
        )
        assert not (tmp_path / "out.parquet").exists()


class TestFoldersOfTheUsers:
    """The same names as ours, and as libraries', in the working folder and on PYTHONPATH."""

    NAMES = (*HIDING[:-1], "clip_rt.py")

    @pytest.fixture
    def folder(self, tmp_path):
        for name in self.NAMES:
            # A package comes before a module of the same name.
            package = name.removesuffix(".py") + "/__init__.py"
            if name == package or package not in self.NAMES:
                write(tmp_path / "users", name, "raise SystemExit('the user said so')\n")
        return tmp_path / "users"

    @pytest.mark.parametrize("path", [None, ".", "", "{folder}"])
    def test_the_working_folder_hides_nothing_of_ours(self, run, folder, path):
        variables = {} if path is None else {"PYTHONPATH": path.format(folder=folder) + os.pathsep}
        done = run("models", "--repository", BUNDLED, cwd=folder, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        assert "drawings" in done.stdout
        done = run("doctor", "--url", "127.0.0.1:1", cwd=folder, **variables)
        assert done.returncode == 1
        assert "fail  127.0.0.1:1 server" in done.stdout

    def test_what_pythonpath_names_hides_nothing_of_ours(self, run, tmp_path):
        for name in ("clip_rt.py", "export.py", "training/__init__.py"):
            write(tmp_path / "other", name, "raise SystemExit('the user said so')\n")
        command = ["export", "repository", "--repository", BUNDLED]
        done = run(*command, PYTHONPATH=str(tmp_path / "other"))
        assert (done.returncode, done.stderr) == (0, "")

    def test_their_own_command_of_the_same_name_is_not_ours(self, run, tmp_path):
        write(tmp_path / "work", "export/__init__.py")
        write(tmp_path / "work", "export/models.py", "raise SystemExit('the user said so')\n")
        done = run("models", "--repository", BUNDLED, PYTHONPATH=".")
        assert (done.returncode, done.stderr) == (0, "")

    def test_what_python_imports_at_its_start_is_named(self, run, tmp_path):
        write(tmp_path / "other", "training/__init__.py")
        write(tmp_path / "other", "sitecustomize.py", "import training\n")
        done = run("train", "--help", PYTHONPATH=str(tmp_path / "other"))
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {tmp_path}/other/training shadows clip-rt's own")
        assert done.stderr.count("\n") == 1
        # Commands of other packages do not mind.
        assert run("models", PYTHONPATH=str(tmp_path / "other")).returncode == 0

    def test_what_is_not_installed_is_not_looked_for_elsewhere(self, run, tmp_path):
        # As after another distribution of the same name was uninstalled again.
        shutil.copytree(ROOT / "clip_rt_commands", tmp_path / "bin/clip_rt_commands")
        write(tmp_path / "other", "training/run.py", "raise SystemExit('the user said so')\n")
        for text in ("", "# ours, without what it held\n"):
            if text:
                write(tmp_path / "bin", "training/__init__.py", text)
            done = run("train", "--help", PYTHONPATH=str(tmp_path / "other"))
            assert done.returncode == 1
            said = f"error: clip-rt's own training.run is missing in {tmp_path}/bin. "
            assert done.stderr.startswith(said)
            assert done.stderr.count("\n") == 1
