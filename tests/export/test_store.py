"""What was made is found again, unless anything it depends on or it itself has changed."""

from __future__ import annotations

import os
import threading
import time

import pytest

from export.store import RECORD, Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def writer(content: bytes, made: list[bytes]):
    def write(path):
        made.append(content)
        path.write_bytes(content)
        path.with_name("beside").write_bytes(b"too")

    return write


def test_the_same_key_is_made_once(store):
    made: list[bytes] = []
    first = store.make("m.onnx", {"a": 1, "b": 2}, writer(b"x", made))
    again = store.make("m.onnx", {"b": 2, "a": 1}, writer(b"y", made))
    assert (first.reused, again.reused) == (False, True)
    assert again.path.read_bytes() == b"x"
    assert again.path.with_name("beside").read_bytes() == b"too"
    other = store.make("m.onnx", {"a": 1, "b": 3}, writer(b"z", made))
    assert other.path.read_bytes() == b"z"
    assert made == [b"x", b"z"]


@pytest.mark.parametrize("damage", ["content", "missing", "record", "no record"])
def test_what_is_damaged_is_made_again(store, damage):
    made: list[bytes] = []
    path = store.make("m.onnx", {}, writer(b"x", made)).path
    if damage == "content":
        path.write_bytes(b"X")
    elif damage == "missing":
        path.with_name("beside").unlink()
    elif damage == "record":
        path.with_name(RECORD).write_text("{")
    else:
        path.with_name(RECORD).unlink()
    again = store.make("m.onnx", {}, writer(b"x", made))
    assert not again.reused
    assert again.path.read_bytes() == b"x"
    assert len(made) == 2


def test_what_fails_leaves_nothing(store):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        store.make("m.onnx", {}, fail)
    assert not list(store.folder.iterdir())


def test_what_a_killed_export_left_is_removed_after_a_day(store):
    for name, age_s in (("old", 90_000), ("running", 60)):
        left = store.folder / f".making-{name}"
        (left / "made").mkdir(parents=True)
        then = time.time() - age_s
        os.utime(left, (then, then))
    store.make("m.onnx", {}, writer(b"x", []))
    assert [path.name for path in store.folder.glob(".making-*")] == [".making-running"]


def test_two_at_once_agree_on_one(store):
    def slow(path):
        time.sleep(0.2)
        path.write_bytes(b"x")

    found = []
    threads = [
        threading.Thread(target=lambda: found.append(store.make("m", {}, slow).path))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(found)) == 1
    assert found[0].read_bytes() == b"x"
    assert len(list(store.folder.iterdir())) == 1
