"""The script of `clip-rt completion bash`, in a real shell."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clip_rt_commands.completion import make_script
from clip_rt_commands.console import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_tyro_clip_rt
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "clip-rt.bash"
    done = subprocess.run(
        [sys.executable, "-m", "clip_rt_commands.completion", "bash"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    path.write_text(done.stdout)
    return path


@pytest.fixture
def complete(script):
    def complete(*words):
        done = subprocess.run(
            ["bash", "-c", ASK, "bash", script, "clip-rt", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split("\n")[:-1]

    return complete


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
class TestBash:
    def test_knows_every_command(self, complete):
        words = {name.split()[0] for name in COMMANDS}
        assert words <= set(complete(""))
        assert complete("cla") == ["classify"]

    def test_knows_the_commands_of_a_group(self, complete):
        found = set(complete("export", ""))
        assert {name.split()[1] for name in COMMANDS if name.startswith("export ")} <= found

    def test_knows_options_and_their_values(self, complete):
        found = complete("classify", "--t")
        assert set(found) == {"--top", "--threshold", "--templates", "--timeout-s"}
        assert complete("classify", "--server", "") == ["auto", "embedded", "in_process"]

    @pytest.mark.parametrize(
        "name", [name for name, (module, _) in COMMANDS.items() if module == "clip_rt"]
    )
    def test_suggests_nothing_but_options(self, complete, name):
        found = [each for each in complete(name, "--") if each]
        assert found
        assert all(re.fullmatch(r"--[a-z0-9-]+", each) for each in found)

    def test_leaves_names_of_files_to_the_shell(self, script):
        assert "complete -o default -F _tyro_clip_rt clip-rt\n" in script.read_text()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_scripts_of_all_commands(shell):
    script = make_script(shell)
    assert "clip-rt" in script
    for name in COMMANDS:
        assert name.split()[-1] in script
