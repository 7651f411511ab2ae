"""Which runtime is chosen by given times, and a cache that can only save time."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clip_rt.embedded import runtime_choice
from clip_rt.embedded.runtime_choice import (
    Choice,
    alone,
    available_bytes,
    choose,
    default_folder,
    digest_machine,
    digest_model,
    recall,
    recall_all,
    remember,
    time_by_turns,
)

MACHINE, MODEL = "a" * 32, "b" * 32
CHOICE = Choice("onnxruntime", {"openvino": 20.0, "onnxruntime": 10.0})


class Clock:
    """Time that passes only in calls."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now_s

    def way(self, name: str, *durations_s: float):
        durations = itertools.chain(durations_s, itertools.repeat(durations_s[-1]))

        def call() -> None:
            self.calls.append(name)
            self.now_s += next(durations)

        return call


@pytest.mark.parametrize(
    ("times_s", "runtime"),
    [
        ({"openvino": 0.060, "onnxruntime": 0.066}, "openvino"),
        ({"openvino": 0.066, "onnxruntime": 0.060}, "onnxruntime"),
        ({"onnxruntime": 0.060, "openvino": 0.060}, "openvino"),
        ({"onnxruntime": 0.060}, "onnxruntime"),
    ],
)
def test_the_faster_is_chosen(times_s, runtime) -> None:
    choice = choose(times_s)
    assert choice.runtime == runtime
    assert choice.times_ms == {name: pytest.approx(1e3 * each) for name, each in times_s.items()}
    assert f"{runtime_choice.RUNTIMES[runtime]} is the faster here" in str(choice)


def test_calls_take_turns_and_the_warm_up_does_not_count() -> None:
    clock = Clock()
    ways = {"a": clock.way("a", 9.0, 0.1), "b": clock.way("b", 5.0, 0.2)}
    found = time_by_turns(ways, budget_s=15.0, clock=clock)
    assert found == {"a": pytest.approx(0.1), "b": pytest.approx(0.2)}
    assert clock.calls[:8] == ["a", "b", "a", "b", "b", "a", "a", "b"]


def test_one_slow_moment_decides_nothing() -> None:
    clock = Clock()
    ways = {"a": clock.way("a", 0.1, 0.1, 3.0, 0.1), "b": clock.way("b", 0.2)}
    found = time_by_turns(ways, budget_s=5.0, clock=clock)
    assert found["a"] < found["b"]


@pytest.mark.parametrize(
    ("call_s", "most_s"), [(0.001, 0.1), (0.06, 1.7), (0.4, 3.5), (2.0, 9.0), (30.0, 121.0)]
)
def test_it_ends_soon_whatever_a_call_takes(call_s, most_s) -> None:
    clock = Clock()
    time_by_turns({"a": clock.way("a", call_s), "b": clock.way("b", call_s)}, clock=clock)
    assert clock.now_s <= most_s
    assert clock.calls.count("a") >= 2  # the warm-up and one that counts


def test_what_a_way_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        time_by_turns({"a": lambda: 1 / 0, "b": lambda: None})


def test_a_choice_is_remembered_for_its_machine_and_model(tmp_path) -> None:
    folder = tmp_path / "not" / "there"
    assert recall(folder, MACHINE, MODEL) is None
    assert remember(folder, MACHINE, MODEL, CHOICE, name="tiny_text")
    assert recall(folder, MACHINE, MODEL) == CHOICE
    assert recall(folder, "c" * 32, MODEL) is None
    assert recall(folder, MACHINE, "c" * 32) is None
    assert recall_all(folder, MACHINE) == {"tiny_text": CHOICE}
    assert recall_all(folder, "c" * 32) == {}
    assert folder.stat().st_mode & 0o077 == 0


def test_a_copy_of_another_name_is_remembered_under_both(tmp_path) -> None:
    remember(tmp_path, MACHINE, MODEL, CHOICE, name="tiny_text")
    for _ in range(2):
        assert recall(tmp_path, MACHINE, MODEL, "well_text") == CHOICE
        assert recall_all(tmp_path, MACHINE) == {"tiny_text": CHOICE, "well_text": CHOICE}
        assert len(list(tmp_path.iterdir())) == 2


GOOD = {"model": "tiny_text", "runtime": "openvino", "times_ms": CHOICE.times_ms}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps(GOOD | {"runtime": "/bin/sh"}).encode(),
        json.dumps(GOOD | {"runtime": ["openvino"]}).encode(),
        json.dumps(GOOD | {"model": 7}).encode(),
        json.dumps(GOOD | {"times_ms": {"openvino": 1.0}}).encode(),
        json.dumps(GOOD | {"times_ms": {"openvino": float("nan"), "onnxruntime": 1}}).encode(),
        json.dumps(GOOD | {"times_ms": {"openvino": -1.0, "onnxruntime": 1.0}}).encode(),
        json.dumps(GOOD | {"times_ms": {"openvino": "x", "onnxruntime": 1.0}}).encode(),
        json.dumps(GOOD | {"times_ms": {"openvino": 10**400, "onnxruntime": 1.0}}).encode(),
        json.dumps(GOOD | {"model": "x" * 100_000}).encode(),
    ],
)
def test_what_is_not_as_it_was_written_is_not_there_and_written_anew(content, tmp_path) -> None:
    remember(tmp_path, MACHINE, MODEL, CHOICE, name="tiny_text")
    (entry,) = tmp_path.glob("*.json")
    entry.write_bytes(content)
    assert recall(tmp_path, MACHINE, MODEL) is None
    assert recall_all(tmp_path, MACHINE) == {}
    assert remember(tmp_path, MACHINE, MODEL, CHOICE, name="tiny_text")
    assert recall(tmp_path, MACHINE, MODEL) == CHOICE


def test_what_is_no_file_is_not_waited_for(tmp_path) -> None:
    remember(tmp_path, MACHINE, MODEL, CHOICE, name="tiny_text")
    (entry,) = tmp_path.glob("*.json")
    entry.unlink()
    os.mkfifo(entry)
    start_s = time.monotonic()
    assert recall(tmp_path, MACHINE, MODEL) is None
    assert time.monotonic() - start_s < 5


@pytest.mark.parametrize("what", ["a file", "below a file", "/proc", None])
def test_a_folder_that_cannot_be_used_fails_nothing(what, tmp_path) -> None:
    (tmp_path / "file").touch()
    places = {"a file": tmp_path / "file", "below a file": tmp_path / "file/x/y"}
    folder = places.get(what) or (Path("/proc/clip_rt") if what else None)
    assert not remember(folder, MACHINE, MODEL, CHOICE, name="tiny_text")
    assert recall(folder, MACHINE, MODEL) is None
    assert recall_all(folder, MACHINE) == {}


@pytest.mark.parametrize("folder", [Path("/proc/clip_rt"), None])
def test_one_measures_at_a_time_where_nothing_can_be_kept(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with alone(folder) as is_first, alone(folder, timeout_s=0.1) as is_second:
        assert (is_first, is_second) == (True, False)
    with alone(folder) as is_third:
        assert is_third


def test_nobody_measures_where_nothing_can_be_written(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with alone(tmp_path / "file") as is_alone:
        assert is_alone is None


def test_a_link_in_the_temporary_folder_is_not_followed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target = tmp_path / "target"
    (tmp_path / f"clip_rt-runtimes-{os.getuid()}.lock").symlink_to(target)
    with alone(None) as is_alone:
        assert is_alone is None
    assert not target.exists()


def test_many_writers_leave_one_whole_entry_and_nothing_else(tmp_path) -> None:
    slow = Choice("openvino", {"openvino": 1.0, "onnxruntime": 2.0})
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(
            lambda index: remember(
                tmp_path, MACHINE, MODEL, CHOICE if index % 2 else slow, name="tiny_text"
            ),
            range(200),
        ):
            assert recall(tmp_path, MACHINE, MODEL) in (CHOICE, slow)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_the_folder_does_not_grow_for_ever(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runtime_choice, "MAX_ENTRIES", 3)
    for index in range(6):
        remember(tmp_path, MACHINE, f"{index:032d}", CHOICE, name=f"model_{index}")
        for path in tmp_path.glob("*.json"):
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
    assert sorted(recall_all(tmp_path, MACHINE)) == ["model_3", "model_4", "model_5"]


def test_one_measures_at_a_time_and_others_do_not_wait_for_ever(tmp_path) -> None:
    with alone(tmp_path) as is_first:
        assert is_first
        with alone(tmp_path, timeout_s=0.1) as is_second:
            assert not is_second
        entered = threading.Event()

        def wait() -> None:
            with alone(tmp_path) as is_third:
                assert is_third
                entered.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join(60)


def test_names_change_with_what_decides_the_speed(tmp_path, monkeypatch) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"1234")
    names = [digest_model(file, 2), digest_model(file, 4)]
    file.write_bytes(b"1235")
    names.append(digest_model(file, 2))
    (tmp_path / "model.onnx.data").write_bytes(b"weights")
    names.append(digest_model(file, 2))
    facts = [{"caps": []}, {"caps": ["ONEDNN_MAX_CPU_ISA", "AVX2"]}, {"name": "x"}]
    names += [digest_machine(each) for each in facts]
    monkeypatch.setattr(runtime_choice, "installed", lambda runtime: "99")
    names.append(digest_machine(facts[0]))
    assert len(set(names)) == len(names)
    assert digest_model(file, 2) == names[3]
    assert all(name.isalnum() and len(name) == 32 for name in names)


@pytest.mark.parametrize("num_bytes", [0, 7, 2**20 + 1, 3 * 2**20])
def test_a_copy_has_the_name_of_its_model_and_another_model_has_not(tmp_path, num_bytes) -> None:
    names = []
    for index, tail in enumerate((b"", b"", b"x", b"y")):
        file = tmp_path / str(index) / "model.onnx"
        file.parent.mkdir()
        file.write_bytes(bytes(num_bytes) + tail)
        os.utime(file, ns=(index, index))
        names.append(digest_model(file))
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_the_folder_is_the_users(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/clip_rt/runtimes")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not allowed by the specification
    monkeypatch.setenv("HOME", "/home/user")
    assert default_folder() == Path("/home/user/.cache/clip_rt/runtimes")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert default_folder() is None


@pytest.mark.parametrize(
    ("files", "free_bytes"),
    [
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n"}, 8192),
        (
            {
                "proc/meminfo": "MemAvailable: 8 kB\n",
                "sys/fs/cgroup/memory.max": "5000\n",
                "sys/fs/cgroup/memory.current": "1000\n",
            },
            4000,
        ),
        (
            {
                "proc/meminfo": "MemAvailable: 8 kB\n",
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/memory.current": "1000\n",
            },
            8192,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "300\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "100\n",
            },
            200,
        ),
        ({}, float("inf")),
    ],
)
def test_memory_of_the_machine_or_of_the_container(files, free_bytes, tmp_path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == free_bytes
