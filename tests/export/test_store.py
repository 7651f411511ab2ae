"""What was made is found again, unless anything it depends on or it itself has changed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time

import pytest

from clip_rt.embedded.runtime_choice import default_folder
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


class TestWithoutAPlaceToKeep:
    """The cache only saves time: whatever is wrong with its folder, files are made."""

    def used(self, store: Store, capsys) -> None:
        made: list[bytes] = []
        one = store.make("m.onnx", {"tower": 1}, writer(b"one", made))
        two = store.make("m.onnx", {"tower": 2}, writer(b"two", made))
        assert (one.path.read_bytes(), two.path.read_bytes()) == (b"one", b"two")
        assert one.path.with_name("beside").read_bytes() == b"too"
        assert store.make("m.onnx", {"tower": 1}, writer(b"new", made)).reused
        assert made == [b"one", b"two"]
        said = capsys.readouterr().out
        assert said.startswith("nothing is kept for the next export (")
        assert (said.count("\n"), said.count("--cache")) == (1, 1)
        assert store.keep("report.json", "{}") is None

    @pytest.mark.parametrize("place", ["file", "file/below", "loop", "x" * 300, "proc"])
    def test_its_folder_cannot_be_made(self, tmp_path, capsys, place):
        (tmp_path / "file").touch()
        (tmp_path / "loop").symlink_to("loop")
        folder = tmp_path / place if place != "proc" else "/proc/none/clip_rt"
        self.used(Store(type(tmp_path)(folder)), capsys)

    def test_its_folder_cannot_be_written(self, store, capsys, monkeypatch):
        store.folder.mkdir()

        # Root may write anywhere: what another user gets is said by hand.
        mkdir = os.mkdir

        def refuse(path, *arguments, **named):
            if str(path).startswith(str(store.folder)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return mkdir(path, *arguments, **named)

        monkeypatch.setattr(os, "mkdir", refuse)
        self.used(store, capsys)

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
    def test_its_disk_is_full(self, store, capsys, number):
        calls = []

        def write(path):
            calls.append(path)
            path.write_bytes(b"x")
            if store.folder in path.parents:
                raise OSError(number, os.strerror(number), str(path))

        assert store.make("m.onnx", {}, write).path.read_bytes() == b"x"
        assert len(calls) == 2
        assert os.strerror(number) in capsys.readouterr().out
        assert os.listdir(store.folder) == []

    def test_what_is_already_there_is_read_all_the_same(self, store, capsys, monkeypatch):
        made: list[bytes] = []
        store.make("m.onnx", {}, writer(b"x", made))
        monkeypatch.setattr(os, "mkdir", None)
        assert store.make("m.onnx", {}, writer(b"y", made)).reused
        assert capsys.readouterr().out == ""

    def test_other_errors_are_not_the_disks(self, store):
        calls = []

        def write(path):
            calls.append(path)
            raise FileNotFoundError(errno.ENOENT, "no such weights")

        with pytest.raises(FileNotFoundError, match="no such weights"):
            store.make("m.onnx", {}, write)
        assert len(calls) == 1

    def test_the_temporary_folder_ends_with_the_store(self, tmp_path, capsys):
        (tmp_path / "file").touch()
        store = Store(tmp_path / "file")
        path = store.make("m.onnx", {}, writer(b"x", [])).path
        del store
        assert not path.parents[1].exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/c/clip_rt/export"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/clip_rt/export"),
        ({"HOME": "/h"}, "/h/.cache/clip_rt/export"),
        ({"XDG_CACHE_HOME": "c", "HOME": "/h"}, "/h/.cache/clip_rt/export"),
        ({}, "None"),
    ],
)
def test_where_the_cache_is_without_a_known_user(variables, expected):
    program = (
        "import pwd\n"
        "def getpwuid(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = getpwuid\n"
        "from export.store import Store\n"
        "print(Store().folder)\n"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME",)}
    kept.pop("XDG_CACHE_HOME", None)
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.stdout.strip() == expected, found.stderr


def test_the_folder_is_looked_for_when_it_is_needed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder("export") == tmp_path / "clip_rt/export"
    assert Store().make("m.onnx", {}, writer(b"x", [])).path.is_relative_to(tmp_path)
    assert Store().keep("report.json", "{}") == tmp_path / "clip_rt/export/report.json"
