"""Imports go down the layers of pyproject.toml; `lint-imports` finds what is planted against it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("clip_rt", "training", "export", "benchmarks")
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The modules of this project without their data."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_contract_is_kept(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "words"),
    [
        ("clip_rt/inputs/items.py", "from clip_rt.client import Client", "inputs is not allowed"),
        ("clip_rt/requests/replica.py", "from clip_rt.embedded import server", "requests is not"),
        ("clip_rt/wire/canary.py", "def late(): from clip_rt.requests import dispatch", "wire is"),
        ("training/model.py", "import export.onnx", "training is not allowed to import export"),
    ],
)
def test_an_upward_import_is_found(copy: Path, module: str, line: str, words: str) -> None:
    with (copy / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1
    assert words in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("clip_rt/requests/replica.py", "from clip_rt.requests import server_pool"),
        ("clip_rt/inputs/items.py", "from clip_rt.inputs import images"),
        ("export/parity.py", "import export.onnx"),
    ],
)
def test_a_circle_is_found(copy: Path, module: str, line: str) -> None:
    with (copy / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1
    assert "No cycles are allowed" in done.stdout
