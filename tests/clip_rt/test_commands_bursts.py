"""Items that come slowly are answered as they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from asking import BUNDLED, PICTURES

from clip_rt.commands.bursts import in_bursts

TIMEOUT_S = 60


def test_a_quick_source_is_one_burst():
    assert [list(each) for each in in_bursts(range(500), pause_s=5)] == [list(range(500))]


def test_an_empty_source_has_no_burst():
    assert list(in_bursts([])) == []


def test_what_waits_is_handed_out_without_the_next():
    go_on = threading.Event()

    def source():
        yield from (1, 2)
        assert go_on.wait(TIMEOUT_S)
        yield 3

    found = []
    for burst in in_bursts(source(), pause_s=0.05):
        found.append(list(burst))
        go_on.set()
    assert found == [[1, 2], [3]]


@pytest.mark.parametrize("pause_s", [5.0, 0.01])
def test_an_error_of_the_source_is_raised_after_what_came_before(pause_s):
    def source():
        yield 1
        time.sleep(0.05)
        raise OSError("gone")

    items = (each for burst in in_bursts(source(), pause_s=pause_s) for each in burst)
    assert next(items) == 1
    with pytest.raises(OSError, match="gone"):
        next(items)


@pytest.mark.slow
class TestNamesOnStdin:
    """`clip-rt classify -` in a process of its own."""

    @pytest.fixture
    def process(self, tmp_path):
        command = [sys.executable, "-m", "clip_rt", "classify", "-", "--labels", "rocket,pizza"]
        command += ["--json", "--repository", str(BUNDLED), "--server", "in_process"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CLIP_RT_CACHE_DIR": str(tmp_path)},
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(TIMEOUT_S)
            for stream in (process.stdin, process.stdout, process.stderr):
                stream.close()

    def test_each_is_answered_before_the_next_is_named(self, process):
        for path in PICTURES[:3]:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
            assert str(path) in process.stdout.readline()
        process.stdin.close()
        assert process.wait(TIMEOUT_S) == 0

    def test_ctrl_c_ends_it_while_it_waits_for_a_name(self, process):
        process.stdin.write(f"{PICTURES[0]}\n")
        process.stdin.flush()
        assert str(PICTURES[0]) in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 130
        assert "Fatal" not in process.stderr.read()
