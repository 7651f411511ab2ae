"""A process that is killed at any moment leaves an index that is whole, and not locked."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_repository
from owners import ROOT
from PIL import Image
from processes import running

import clip_rt
from clip_rt.search import Index, Query

NUM = 300

PROGRAM = """
import sys
import clip_rt, clip_rt.search.update as update, clip_rt.search.store as places
from clip_rt.search import Index
update.COMMIT_ITEMS = update.COMMIT_S = 0
places.MIN_UNUSED = 10
repository, folder, photos, what = sys.argv[1:]
with clip_rt.Client(repository=repository, server="in_process") as client:
    client.encode_texts("red")
    with Index.open(folder, create=True) as index:
        print("begun", flush=True)
        getattr(index, what)(client, *([[photos]] if what == "update" else []))
        print("done", flush=True)
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("repositories")
    changes = {"fingerprint": "b" * 64}
    return {
        "one": tiny_repository.write(folder / "one", "one"),
        "two": tiny_repository.write(folder / "two", "two", image=changes, text=changes),
    }


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(NUM):
        pixels = np.full((64, 64, 3), generator.integers(0, 256, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def kill(after_s: float, repository: Path, index: Path, photos: Path, what: str) -> str:
    """Start a writer, kill it that long after it began, and return what it had said."""
    command = [sys.executable, "-c", PROGRAM, repository, index, photos, what]
    with running(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        said: str = writer.stdout.readline()
        time.sleep(after_s)
        writer.send_signal(signal.SIGKILL)
        return said + str(writer.stdout.read())


def check(index: Index, client: clip_rt.Client) -> int:
    """Each file is found by its own content, with its own vector; return how many there are."""
    counts = index.count()
    if not counts["files"]:
        return 0
    hits = index.query(client, "red", top=NUM)
    by_sha256 = {hit.sha256: hit for hit in hits}
    assert len(by_sha256) == counts["images"]
    # What was removed from the folder may still be in the index.
    gone = Path(hits[0].path).parents[1] / "gone"
    there = map(Path, (hit.path for hit in hits))
    paths = [each if each.exists() else gone / each.name for each in there]
    vectors = client.encode_images(paths)
    red = client.encode_texts("red")[0]
    np.testing.assert_allclose([hit.score for hit in hits], vectors @ red, atol=1e-5)
    return counts["files"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_update_that_is_killed_goes_on(repositories, photos, tmp_path):
    folder, numbers = tmp_path / "index", []
    with clip_rt.Client(repository=repositories["one"], server="in_process") as client:
        for round_ in range(40):
            said = kill(0.04 * (round_ + 1), repositories["one"], folder, photos, "update")
            with Index.open(folder, create=True) as index, index.writing():
                numbers.append(check(index, client))
            if "done" in said:
                break
        else:
            pytest.fail(f"it never came to its end: {numbers}")
        with Index.open(folder) as index:
            assert index.update(client).num_to_read == 0
            assert check(index, client) == NUM
    # It was killed in the middle, and went on from there.
    assert numbers == sorted(numbers)
    assert any(0 < each < NUM for each in numbers)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_migration_that_is_killed_goes_on(repositories, photos, tmp_path):
    folder = tmp_path / "index"
    with (
        clip_rt.Client(repository=repositories["one"], server="in_process") as one,
        clip_rt.Client(repository=repositories["two"], server="in_process") as two,
    ):
        with Index.open(folder, create=True) as index:
            index.update(one, [photos])
        num_old = 0
        for round_ in range(40):
            said = kill(0.04 * (round_ + 1), repositories["two"], folder, photos, "migrate")
            with Index.open(folder) as index, index.writing():
                try:
                    assert check(index, one) == NUM
                    num_old += 1
                except clip_rt.ContractError:
                    assert check(index, two) == NUM
            if "done" in said:
                break
        else:
            pytest.fail("it never came to its end")
        with Index.open(folder) as index:
            assert check(index, two) == NUM
            query = Query(images=[photos / "007.png"])
            assert index.query(two, query)[0].score == pytest.approx(1, abs=1e-4)
    assert num_old >= 1


@pytest.mark.slow
def test_removing_unused_rows_may_be_killed(repositories, photos, tmp_path):
    folder = tmp_path / "index"
    with clip_rt.Client(repository=repositories["one"], server="in_process") as client:
        with Index.open(folder, create=True) as index:
            index.update(client, [photos])
        (tmp_path / "gone").mkdir()
        for number in range(0, NUM, 2):
            (photos / f"{number:03d}.png").rename(tmp_path / "gone" / f"{number:03d}.png")
        for after_s in (0.0, 0.01, 0.02, 0.04, 0.08):
            kill(after_s, repositories["one"], folder, photos, "update")
            with Index.open(folder) as index, index.writing():
                assert check(index, client) in (NUM, NUM // 2)
        with Index.open(folder) as index:
            index.update(client)
            assert check(index, client) == NUM // 2
