"""What the soak is made of: loads, what is noticed, servers that are found; not a soak."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import soak
from benchmarks.replicas import find_children, find_server, kill
from benchmarks.resources import Resources, growth, heap_mib
from clip_rt.errors import ServerUnavailableError


def test_growth_is_what_a_line_through_the_values_rises_by() -> None:
    at_s = list(range(0, 600, 5))
    assert growth(at_s, [200.0] * len(at_s)) == pytest.approx(0)
    leak = [200 + 20 * t / 595 for t in at_s]
    assert growth(at_s, leak) == pytest.approx(20 / 210)
    saw = [200 + 4 * (n % 2) for n in range(len(at_s))]
    assert abs(growth(at_s, saw)) < 0.002
    assert math.isnan(growth([0.0, 5.0], [1.0, 2.0]))


def test_growth_leaves_the_warm_up_out() -> None:
    resources = Resources()
    for n in range(20):
        resources.sample(n, n)
        resources.samples[-1]["rss_mib"] = 100.0 if n < 4 else 200.0
    assert resources.growth()["rss_mib"] == pytest.approx(0)


def test_what_malloc_has_handed_out_is_counted_until_it_is_given_back() -> None:
    before_mib = heap_mib()
    if math.isnan(before_mib):
        pytest.skip("this libc does not tell")
    held = np.ones(64 * 2**20, np.uint8)
    assert heap_mib() - before_mib == pytest.approx(64, abs=2)
    del held
    assert heap_mib() - before_mib == pytest.approx(0, abs=2)


def test_rows_of_other_items_and_numbers_that_are_none_are_counted() -> None:
    expected = np.eye(4, dtype=np.float32)
    assert soak.count_wrong(expected.copy(), expected, 1e-4) == 0
    assert soak.count_wrong(expected[[1, 0, 2, 3]], expected, 1e-4) == 2
    broken = expected.copy()
    broken[2] = np.nan
    assert soak.count_wrong(broken, expected, 1e-4) == 1
    assert soak.count_wrong(expected[:3], expected, 1e-4) == 4


def test_answers_too_alike_to_be_told_apart_are_refused() -> None:
    rows = np.array([[1, 0], [0, 1], [1, 1e-5]], np.float32)
    kind = soak.Kind("x", 1.0, range(3), lambda some: rows[some], rows, 1e-4)
    with pytest.raises(ValueError, match="item 0"):
        soak.check_distinct(kind)


def test_a_load_tells_wrong_rows_errors_of_servers_and_others_apart() -> None:
    rows, stop, calls = np.eye(3, dtype=np.float32), threading.Event(), iter(range(6))

    def call(some: list[int]) -> np.ndarray:
        number = next(calls)
        if number == 1:
            raise ServerUnavailableError("away")
        if number == 2:
            raise ZeroDivisionError
        if number == 5:
            stop.set()
        return rows[some] if number else np.roll(rows, 1, axis=0)[some]

    load = soak.Load([soak.Kind("x", 1.0, range(3), call, rows, 1e-4)])
    load.work(0, stop)
    assert load.num_answered == 4
    assert 1 <= load.num_wrong_rows < load.num_rows
    assert load.server_errors == {"ServerUnavailableError": 1}
    assert load.other_errors == {"ZeroDivisionError": 1}
    assert "away" in load.examples["ServerUnavailableError"]
    assert load.began_at_s == {}
    found = load.to_json() | {"num_hanging": 0, "growth": {"fds": -0.06}}
    met = {bar.what: bar.is_met for bar in soak.bars_of("x", found, may_fail=False)}
    assert met == {
        "x: wrong rows": False,
        "x: hanging or late calls": True,
        "x: errors not of a server": False,
        "x: failed calls": False,
        "x: growth of fds": False,
    }


def test_a_call_under_way_is_seen() -> None:
    is_in, may_end = threading.Event(), threading.Event()

    def call(some: list[int]) -> np.ndarray:
        is_in.set()
        may_end.wait(10)
        return np.eye(1, dtype=np.float32)[some]

    load = soak.Load([soak.Kind("x", 1.0, range(1), call, np.eye(1, dtype=np.float32), 1e-4)])
    stop = threading.Event()
    assert load.overdue_s() == 0
    thread = threading.Thread(target=load.work, args=(0, stop), daemon=True)
    thread.start()
    assert is_in.wait(10)
    began_s = time.monotonic()
    while time.monotonic() <= began_s:
        pass
    assert load.overdue_s() > 0
    stop.set()
    may_end.set()
    thread.join(10)
    assert not thread.is_alive()


def test_only_the_server_on_its_port_is_found(tmp_path: Path) -> None:
    # As a tritonserver would be listed, with a child as the python backend has.
    program = tmp_path / "tritonserver"
    program.symlink_to(sys.executable)
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'input()'],"
        " stdin=subprocess.PIPE); print(p.pid, flush=True); p.wait()"
    )
    command = [str(program), "-c", code, "--grpc-port=65001"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert find_server(65001) == process.pid
        assert find_server(65002) is None
        assert find_children(process.pid) == [child]
        kill(child)
        assert process.wait(10) == 0
        kill(None)
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL)
    assert os.getpid() not in find_children(os.getpid())
