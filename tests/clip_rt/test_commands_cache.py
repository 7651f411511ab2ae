"""`clip-rt cache`, on a folder that the client's own cache filled."""

from __future__ import annotations

import numpy as np
import pytest
from asking import ask

from clip_rt.cache.disk import Contents, DiskCache


@pytest.fixture
def folder(tmp_path):
    """Two segments, of 3 and of 5 embeddings."""
    disk = DiskCache(tmp_path / "labels", 1024**2)
    for namespace, number in (("a" * 64, 3), ("b" * 64, 5)):
        rows = np.eye(8, dtype=np.float32)[:number]
        disk.write(namespace, [f"label {each}" for each in range(number)], rows)
    return disk.folder


def size_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("by_variable", [False, True])
def test_shows_what_is_there(capfd, folder, monkeypatch, by_variable):
    option = () if by_variable else ("--cache-dir", folder)
    if by_variable:
        monkeypatch.setenv("CLIP_RT_CACHE_DIR", str(folder))
    done = ask(capfd, "cache", *option)
    assert (done.status, done.err) == (0, "")
    assert done.rows == [
        {
            "folder": str(folder),
            "embeddings": 8,
            "files": 2,
            "bytes": size_of(folder),
            "max_bytes": 1024**3,
        }
    ]


def test_clears_it_and_nothing_else(capfd, folder):
    (folder / "notes.txt").write_text("mine")
    done = ask(capfd, "cache", "--cache-dir", folder, "--clear")
    assert done.status == 0
    assert (done.rows[0]["embeddings"], done.rows[0]["bytes"]) == (0, 0)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_without_a_folder_it_is_empty(capfd, tmp_path):
    row = ask(capfd, "cache", "--cache-dir", tmp_path / "none").rows[0]
    assert (row["embeddings"], row["files"], row["bytes"]) == (0, 0, 0)
    assert not (tmp_path / "none").exists()


def test_without_an_option_it_is_in_the_users_cache(capfd, tmp_path, monkeypatch):
    monkeypatch.delenv("CLIP_RT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ask(capfd, "cache").rows[0]["folder"] == str(tmp_path / "clip_rt/labels")


def test_what_is_damaged_holds_no_embedding(folder):
    disk = DiskCache(folder, 1024**2)
    whole = disk.count()
    assert whole == Contents(8, 2, size_of(folder))
    small = min(folder.iterdir(), key=lambda path: path.stat().st_size)
    small.write_bytes(small.read_bytes()[:-1])
    assert disk.count() == Contents(5, 2, whole.num_bytes - 1)
    small.write_bytes(b"")
    assert disk.count().num_embeddings == 5
