"""Commands run in any folder and print into any output, however it is encoded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import clip_rt_commands

ROOT = Path(__file__).resolve().parents[1]


def run_module(*arguments, cwd=ROOT, **variables) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=kept | variables,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
    )


def write(folder: Path, name: str, text: str = "") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


HIDING = [
    "training/__init__.py",
    "export/__init__.py",
    "benchmarks/__init__.py",
    "clip_rt/__init__.py",
    "export.py",
    "training.py",
    "tokenizers/__init__.py",
    "onnx.py",
    "console.py",
    "rich.py",
    "clip_rt_commands",
]
"""What users call their own, and ours or our libraries are called too."""


@pytest.mark.parametrize("name", HIDING[:-1])
def test_a_folder_of_the_users_hides_nothing_of_ours(tmp_path, name):
    write(tmp_path, name, "raise SystemExit('the user said so')\n")
    # Imports of each of our packages but this one, and of libraries.
    command = "benchmarks.findings" if name.startswith("benchmarks") else "export.samples"
    done = run_module("-m", command, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_all_of_them_at_once_and_in_each_way_to_say_it(tmp_path):
    for name in HIDING[:-1]:
        write(tmp_path, name, "raise SystemExit('the user said so')\n")
    ways = (
        ["-mexport.samples"],
        ["-Bum", "export.samples", "-m"],
        ["-Bumtraining.config"],
        ["-m", "benchmarks.findings"],
        ["-m", "clip_rt", "--help"],
    )
    for way in ways:
        done = run_module(*way, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), way


def test_their_own_command_of_the_same_name_is_still_theirs(tmp_path):
    write(tmp_path, "export/__init__.py")
    write(tmp_path, "export/onnx.py", "import training; print('theirs', training.__file__)\n")
    write(tmp_path, "training/__init__.py")
    done = run_module("-m", "export.onnx", cwd=tmp_path)
    assert done.stdout.split() == ["theirs", str(tmp_path / "training/__init__.py")]


def test_nothing_changes_for_other_programs(tmp_path):
    # `import training` finds theirs, and the working folder stays first.
    write(tmp_path, "training/__init__.py", "theirs = True\n")
    write(tmp_path, "app/__init__.py", "import clip_rt, export, training; assert training.theirs\n")
    show = "import sys; print(sys.path.index(sys.argv[1]), sys.meta_path[0])\n"
    write(tmp_path, "app/__main__.py", show)
    done = run_module("-m", "app", str(tmp_path), cwd=tmp_path)
    assert done.stdout.startswith("0 "), done.stderr
    assert "clip_rt" not in done.stdout


def test_a_checkout_runs_its_own_code(tmp_path):
    # Another checkout than the one that is installed.
    for name in ("__init__.py", "extras.py"):
        source = (ROOT / "clip_rt_commands" / name).read_text("utf-8")
        write(tmp_path, f"clip_rt_commands/{name}", source)
    write(tmp_path, "export/__init__.py", (ROOT / "export/__init__.py").read_text("utf-8"))
    write(tmp_path, "export/onnx.py", "import training; print(training.__file__)\n")
    write(tmp_path, "training/__init__.py")
    done = run_module("-m", "export.onnx", cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / "training/__init__.py")


def test_the_installation_brings_the_file_that_python_starts_with():
    purelib = Path(__import__("sysconfig").get_path("purelib"))
    installed = (purelib / "clip_rt_commands.pth").read_text("utf-8")
    assert installed == (ROOT / "clip_rt_commands.pth").read_text("utf-8")


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "cp1252"},
        {"LC_ALL": "POSIX", "TERM": "dumb", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_table_is_printed_whatever_the_encoding(variables):
    # Too narrow for it.
    command = ["-m", "export.repository", "--repository", "model_repository"]
    done = run_module(*command, COLUMNS="50", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    # Folded, not cut, and framed by what there is.
    cells = [line.split("|")[1].strip() for line in done.stdout.splitlines() if "|" in line]
    assert "drawings" in "".join(cells)


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("latin-1", "naïve-Ωfolder"), ("utf-8", os.fsdecode(b"not-utf8-\xe9"))],
)
def test_names_of_files_are_printed_whatever_the_encoding(name, encoding, tmp_path):
    command = ["-m", "export.repository", "--repository", str(tmp_path / name)]
    done = run_module(*command, PYTHONIOENCODING=encoding)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.match("error: there is no folder", done.stderr)


@pytest.mark.parametrize("package", ["benchmarks", "export", "training"])
def test_every_package_of_commands_prepares_them(package):
    # Whatever is printed first, and by whom.
    program = f"""
import sys
sys.argv, sys.orig_argv = ["-m"], [sys.executable, "-m", "{package}.any"]
import {package}
print("\\xd7 \\u03c9 \\udce9")
"""
    done = run_module("-c", program, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "\N{REPLACEMENT CHARACTER} \\u03c9 \\udce9"


def test_the_commands_of_the_client_print_anything(tmp_path):
    name = os.fsdecode(b"models-\xe9")
    done = run_module("-m", "clip_rt", "doctor", "--repository", str(tmp_path / name))
    assert done.returncode == 1
    assert "\\udce9" in done.stdout
    assert "Traceback" not in done.stderr


def test_an_output_that_is_no_file_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    clip_rt_commands.print_any_text()
