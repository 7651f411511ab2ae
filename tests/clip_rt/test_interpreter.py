"""Every mode of Python: what is optimised away, made an error, or named in its environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from owners import ROOT

pytestmark = pytest.mark.slow

MODES = {
    "no docstrings": (["-OO"], {}),
    "warnings are errors": (["-W", "error", "-X", "dev"], {}),
    "environment": (
        [],
        {
            "PYTHONOPTIMIZE": "2",
            "PYTHONWARNINGS": "error",
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONIOENCODING": "ascii",
            "LC_ALL": "C",
            "BASH_ENV": "/nowhere/to/be/found; exit 3",
        },
    ),
    "isolated": (["-I"], {}),
}

PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[2])
import clip_rt
# Only for those that it starts: with these, this Python would not start.
os.environ.update(PYTHONHOME="/nowhere", PYTHONPATH=os.getcwd(), PYTHONPLATLIBDIR="nowhere")
with clip_rt.Client(repository=sys.argv[1]) as client:
    print(client.encode_texts(["red"]).shape)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a folder whose files have names of modules that the server needs."""
    for name in ("dlpack", "json_", "model", "onnxruntime", "openvino", "selectors_"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    return tmp_path


@pytest.mark.parametrize(("options", "environment"), MODES.values(), ids=MODES.keys())
def test_the_embedded_server_answers_in_every_mode(
    repository: Path, project: Path, options: list[str], environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, *options, "-c", PROGRAM, str(repository), str(ROOT)],
        capture_output=True,
        text=True,
        cwd=project,
        env=os.environ | environment,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "(1, 8)\n"


@pytest.mark.parametrize("option", ["-O", "-OO", "-Werror", "-Xdev"])
@pytest.mark.parametrize("command", [[], ["doctor"], ["serve"]])
def test_the_commands_explain_themselves_in_every_mode(option: str, command: list[str]) -> None:
    done = run(option, "-m", "clip_rt", *command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: python -m clip_rt" in done.stdout


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        timeout=120,
        check=False,
    )


def test_commands_print_what_their_encoding_lacks(tmp_path: Path) -> None:
    missing = tmp_path / "modèles ✓"
    done = run("-m", "clip_rt", "serve", "--repository", str(missing))
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("-OO", "-m", "clip_rt", "doctor", "--repository", str(missing), "--json")
    assert "Traceback" not in done.stderr
    json.loads(done.stdout)
