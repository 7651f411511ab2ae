"""Whatever hangs in a test, the run ends, says where, and with an exit code that is not 0."""

import os
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from processes import running

TESTS = Path(__file__).parent
WATCHDOG = "Timeout (0:00:0"
"""Its first words; the stacks come after them."""
CONFTEST = 'pytest_plugins = ["time_limits"]\n'
BLOCKED_IN_C = """
    def test_hangs():
        # Locked twice: no signal gets a thread out of that.
        library, mutex = ctypes.{loader}(None), ctypes.create_string_buffer(64)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
"""


def run_pytest(folder: Path, program: str, grace_s: int) -> tuple[int, str]:
    """Run a file of tests with a limit of a second; return exit code and output."""
    (folder / "conftest.py").write_text(CONFTEST)
    imports = "import ctypes, os, signal, threading, time, pytest\n"
    (folder / "test_planted.py").write_text(imports + textwrap.dedent(program))
    limits = f"-p no:cacheprovider --timeout=1 -o timeout_grace={grace_s}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--rootdir=.", *limits.split()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "waits",
    [
        "threading.Event().wait()",
        "os.read(os.pipe()[0], 1)",
        "t = threading.Thread(target=time.sleep, args=(9,), daemon=True); t.start(); t.join()",
    ],
)
def test_a_test_that_waits_fails_and_the_next_one_runs(waits: str, tmp_path: Path) -> None:
    program = f"""
        def test_hangs():
            {waits}

        def test_next():
            pass
    """
    code, output = run_pytest(tmp_path, program, grace_s=30)
    assert code == 1
    assert "1 failed, 1 passed" in output
    assert "Timeout (>1.0s)" in output
    assert "test_planted.py::test_hangs" in output


@pytest.mark.parametrize("loader", ["CDLL", "PyDLL"])  # The second keeps the GIL.
def test_a_call_into_c_that_never_returns_ends_the_run(loader: str, tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, BLOCKED_IN_C.format(loader=loader), grace_s=3)
    assert code == 1
    assert WATCHDOG in output
    assert "in test_hangs" in output


@pytest.mark.parametrize(
    "program",
    [
        # A fixture that hangs after its test has failed, by a wait no signal ends.
        """
        @pytest.fixture
        def hangs():
            yield
            while True:
                try:
                    time.sleep(60)
                except BaseException:
                    pass

        def test_fails(hangs):
            assert False
        """,
        # A thread that Python waits for when it ends.
        """
        def test_leaves_a_thread():
            threading.Thread(target=time.sleep, args=(600,)).start()
        """,
        # A module that hangs while it is imported.
        """
        time.sleep(600)
        """,
    ],
    ids=["fixture", "thread", "import"],
)
def test_what_hangs_outside_a_test_ends_the_run(program: str, tmp_path: Path) -> None:
    code, output = run_pytest(tmp_path, program, grace_s=3)
    assert code == 1
    assert WATCHDOG in output
    assert "test_planted.py" in output


def test_a_test_may_have_more_time(tmp_path: Path) -> None:
    program = """
        @pytest.mark.timeout(30)
        def test_slow():
            time.sleep(2.5)
    """
    code, output = run_pytest(tmp_path, program, grace_s=30)
    assert code == 0, output


HEARS = """
    import subprocess, sys

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
    def test_children_hear(number):
        child = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            child.stdout.readline()
            child.send_signal(number)
            assert child.wait(timeout={limit_s}) == -number
        finally:
            child.kill()

    def test_nohup_still_counts():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
"""


@pytest.mark.parametrize(("makes_deliverable", "limit_s"), [(True, 30), (False, 1)])
def test_children_hear_signals_that_the_run_was_started_without(
    makes_deliverable: bool, limit_s: int, tmp_path: Path
) -> None:
    """As `nohup make test &` in a script starts it, and some runners do."""
    ways = "from processes import make_signals_deliverable as pytest_configure\n"
    conftest = CONFTEST + (ways if makes_deliverable else "")
    (tmp_path / "conftest.py").write_text(conftest)
    program = textwrap.dedent(HEARS).format(limit_s=limit_s)
    (tmp_path / "test_planted.py").write_text("import signal, pytest\n" + program)
    pytest_command = f"{shlex.quote(sys.executable)} -m pytest -p no:cacheprovider --rootdir=."
    with running(
        ["bash", "-c", f"trap '' INT QUIT TERM HUP; exec {pytest_command} --timeout=60"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        output, _ = process.communicate(timeout=120)
    assert (process.returncode == 0) is makes_deliverable, output
    assert ("4 passed" in output) is makes_deliverable


def test_a_process_ends_with_its_block() -> None:
    with (
        pytest.raises(ZeroDivisionError),
        running(["sleep", "600"], stdout=subprocess.PIPE) as process,
    ):
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGKILL
