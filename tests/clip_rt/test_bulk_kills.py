"""`clip-rt embed` by the bundled model, killed and interrupted: every file once, all the same."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from bulk_pictures import BROKEN, assert_same, write_broken, write_pictures
from processes import running

import clip_rt
from clip_rt import bulk
from clip_rt.commands.exit_codes import SOME_BAD

ROOT = Path(__file__).parents[2]
NUM = 600
KILLS = 5
SEED = int(os.environ.get("CLIP_RT_KILL_SEED", "0"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, NUM)
    write_broken(folder)
    return folder


def command(pictures: Path | str, out: Path, *options: object) -> list[str]:
    arguments = [pictures, "--out", out, "--server", "in_process", *options]
    return [sys.executable, "-m", "clip_rt", "embed", *map(str, arguments)]


@contextlib.contextmanager
def started(*arguments: object, **options: object) -> Iterator[subprocess.Popen[str]]:
    with running(
        command(*arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True, **options
    ) as process:
        yield process


def finish(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300, **options
    )


def num_partitions(out: Path) -> int:
    return sum(1 for _ in out.glob("embeddings/part*"))


def wait_for_partitions(out: Path, num: int, process: subprocess.Popen[str]) -> None:
    until_s = time.monotonic() + 120
    while num_partitions(out) < num and process.poll() is None:
        assert time.monotonic() < until_s
        time.sleep(0.005)


def assert_every_file_once(out: Path, pictures: Path, broken: Iterable[str] = BROKEN) -> None:
    result = bulk.Result(out)
    assert result.is_complete
    names, rows = result.load()
    bad = [row["path"] for row in result.errors()]
    expected = Counter(str(path) for path in pictures.rglob("*.jpg"))
    assert Counter([*names, *bad]) == expected
    assert {Path(name).relative_to(pictures).as_posix() for name in bad} == set(broken)
    with clip_rt.Client(server="in_process") as client:
        assert_same(client, names, rows)
    assert not list(out.rglob(".writing-*"))


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_kills_at_any_moment_lose_and_repeat_nothing(pictures, tmp_path, format):
    rng = random.Random(SEED)
    options = ("--partition-items", 16, "--format", format)
    num_killed = 0
    for number in range(KILLS):
        with started(pictures, tmp_path, *options) as process:
            # While it starts, lists or embeds: in the first a job of seconds may not be yet.
            wait_for_partitions(tmp_path, num_partitions(tmp_path) + number % 3, process)
            time.sleep(rng.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            num_killed += process.wait(60) == -signal.SIGKILL
        before = num_partitions(tmp_path)
        assert before < (NUM + len(BROKEN)) / 16
    assert num_killed == KILLS
    done = finish(pictures, tmp_path, *options)
    assert done.returncode == SOME_BAD, done.stderr
    assert f"600 of 603 are in {tmp_path}; 3 could not be embedded" in done.stderr
    assert_every_file_once(tmp_path, pictures)


KILLED_AT_A_STEP = """if True:
    import itertools, os, signal, sys
    from clip_rt.__main__ import main

    steps = itertools.count(1)
    def dying(call):
        def step(*arguments):
            if next(steps) == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)
        return step
    for name in ("fsync", "replace"):
        setattr(os, name, dying(getattr(os, name)))
    sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_a_kill_before_each_step_on_the_disk(tmp_path, format):
    """Before each write-through and each rename: of the job, the listing, and partitions."""
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    # Each partition has one that cannot be embedded.
    broken = write_pictures(pictures, 40)[1::4]
    for path in broken:
        path.write_bytes(b"no image at all")
    arguments = command(pictures, out, "--partition-items", 4, "--format", format)[3:]
    for step in range(1, 30):
        done = subprocess.run(
            [sys.executable, "-c", KILLED_AT_A_STEP, str(step), *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode == SOME_BAD:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert step > 8
    assert done.returncode == SOME_BAD
    names = [path.relative_to(pictures).as_posix() for path in broken]
    assert_every_file_once(out, pictures, names)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_at_a_partition(pictures, tmp_path, number, status):
    with started(pictures, tmp_path, "--partition-items", 50) as process:
        wait_for_partitions(tmp_path, 1, process)
        process.send_signal(number)
        _, words = process.communicate(timeout=60)
        assert process.returncode == status, words
    assert "ending after what is under way" in words
    assert "stopped, the same command goes on" in words
    assert not list(tmp_path.rglob(".writing-*"))
    kept = num_partitions(tmp_path)
    assert 1 <= kept < NUM / 50
    done = finish(pictures, tmp_path, "--partition-items", 50)
    assert done.returncode == SOME_BAD, done.stderr
    assert_every_file_once(tmp_path, pictures)


def test_a_second_process_is_refused_and_the_first_goes_on(pictures, tmp_path):
    with started(pictures, tmp_path, "--partition-items", 16) as process:
        wait_for_partitions(tmp_path, 1, process)
        process.send_signal(signal.SIGSTOP)
        second = finish(pictures, tmp_path, "--partition-items", 16)
        process.send_signal(signal.SIGCONT)
        assert second.returncode == 2
        assert second.stderr.startswith(f"error: process {process.pid} is at work on {tmp_path}")
        assert process.wait(120) == SOME_BAD
    assert_every_file_once(tmp_path, pictures)


def test_shards_in_processes_of_their_own_are_the_whole(pictures, tmp_path):
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(started(pictures, tmp_path, "--shard", f"{number}/2"))
            for number in range(2)
        ]
        for process in processes:
            _, words = process.communicate(timeout=200)
            assert process.returncode in (0, SOME_BAD), words
    assert_every_file_once(tmp_path, pictures)


def test_names_are_piped_in_and_progress_is_told(pictures, tmp_path):
    names = "".join(f"{path}\n" for path in sorted(pictures.rglob("*.jpg")))
    done = finish("-", tmp_path, "--dtype", "float16", input=names)
    assert (done.returncode, done.stdout) == (SOME_BAD, ""), done.stderr
    (partition,) = bulk.Result(tmp_path)
    assert partition.embeddings.dtype == np.float16
    assert_every_file_once(tmp_path, pictures)
    again = finish("-", tmp_path, input="")
    assert again.returncode == 2
    assert 'whose dtype is "float16", and that of this one is "float32"' in again.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("a.jpg", "--texts", "b.txt"), "name images, or texts with --texts, and not both."),
        ((), "name images, or texts with --texts, and not both."),
        (("a.jpg", "--shard", "4/4"), "--shard is '4/4'; it must be i/n"),
        (("gone",), "there is no file or folder 'gone'."),
    ],
)
def test_options_that_cannot_be_used(tmp_path, options, words):
    arguments = ["embed", *options, "--out", str(tmp_path / "out"), "--server", "in_process"]
    done = subprocess.run(
        [sys.executable, "-m", "clip_rt", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())
