"""Embeddings in a shared folder: whatever happens to it, the results are those without it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from owners import wait_until

from clip_rt.cache import disk as disk_cache
from clip_rt.cache.disk import DiskCache
from clip_rt.cache.memory import Key, PromptCache, _index
from clip_rt.deadline import Deadline

KEY = Key("weights", "tokenizer", 77, ("a {}.",), "cat")
NAMESPACE = _index([KEY])[0][0]
DIM = 8
LABELS = ("red", "green", "blue")
HERE = str(Path(__file__).parent)
HEAD_BYTES = 16 + 2 * 32
"""Of a segment with one embedding."""


def embed(label):
    digest = hashlib.sha256(label.encode("utf-8", "surrogatepass")).digest()
    vector = np.frombuffer(digest, np.uint32)[:DIM].astype(np.float64) + 1
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def stack(labels):
    return np.stack([embed(label) for label in labels])


def ask(cache, labels=LABELS, *, key=KEY):
    """Check the embeddings of labels, and return those that had to be made."""
    made = []

    def make(positions):
        made.extend(labels[position] for position in positions)
        return stack(made)

    keys = [key._replace(label=label) for label in labels]
    found = cache.get_or_make(keys, make, dim=DIM, deadline=Deadline.after(30))
    assert found.dtype == np.float32
    assert found.tolist() == stack(labels).tolist()
    return made


def open_new(folder, **bounds):
    """A cache as a new process has it: nothing in memory yet."""
    return PromptCache(10**6, folder, **bounds)


def segments_of(folder):
    return sorted(folder.glob("*.embeddings"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "some" / "cache"


@pytest.fixture
def filled(folder):
    assert ask(open_new(folder)) == list(LABELS)
    return folder


@pytest.fixture
def segment(filled):
    (segment,) = segments_of(filled)
    return segment


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "clip_rt")
    return lambda: [each.getMessage() for each in caplog.records if each.name == "clip_rt.cache"]


# ---- what is kept


def test_a_new_process_finds_what_another_made(filled, warnings):
    cache = open_new(filled)
    assert ask(cache) == []
    assert (cache.hits, cache.disk_hits, cache.misses) == (0, 3, 0)
    assert ask(cache) == []
    assert (cache.hits, cache.disk_hits, cache.misses) == (3, 3, 0)
    assert warnings() == []


def test_without_memory_the_folder_serves_every_call(filled):
    cache = PromptCache(0, filled)
    assert [ask(cache), ask(cache)] == [[], []]
    assert (cache.hits, cache.disk_hits) == (0, 6)


def test_ten_new_labels_among_a_thousand_make_ten(folder):
    labels = [f"label {index}" for index in range(1000)]
    ask(open_new(folder), labels[:990])
    assert ask(open_new(folder), labels[::-1]) == labels[:989:-1]
    assert ask(open_new(folder), labels) == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.text(max_size=4), min_size=1, max_size=12), max_size=6))
def test_any_labels_come_back_and_only_new_ones_are_made(calls):
    with tempfile.TemporaryDirectory() as folder:
        known = set()
        for labels in calls:
            made = ask(open_new(Path(folder)), labels)
            assert made == [label for label in dict.fromkeys(labels) if label not in known]
            known |= set(labels)


def test_labels_that_no_encoding_has_are_kept_too(folder):
    labels = ["\ud83d", "a\0", "a", "", "\U0001f600", "ﬁ", "fi"]
    assert ask(open_new(folder), labels) == labels
    assert ask(open_new(folder), labels) == []


@pytest.mark.parametrize("field", ["weights", "tokenizer", "context_length", "templates"])
def test_nothing_is_found_under_another_key(filled, field):
    value = ("b {}.",) if field == "templates" else getattr(KEY, field) * 2
    other = KEY._replace(**{field: value})
    assert ask(open_new(filled), key=other) == list(LABELS)
    assert ask(open_new(filled), key=other) == ask(open_new(filled)) == []


def test_the_folder_is_private_and_tells_no_label(folder):
    umask = os.umask(0)
    try:
        ask(open_new(folder))
    finally:
        os.umask(umask)
    (segment,) = segments_of(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert segment.stat().st_mode & 0o777 == 0o600
    written = segment.name.encode() + segment.read_bytes()
    assert not any(text.encode() in written for text in (*LABELS, *KEY.templates, KEY.weights))


def test_equal_content_has_one_name(folder):
    for _ in range(3):
        DiskCache(folder, 10**6).write(NAMESPACE, LABELS, stack(LABELS))
    DiskCache(folder, 10**6).write(NAMESPACE, LABELS[::-1], stack(LABELS[::-1]))
    assert len(segments_of(folder)) == 1


def test_many_small_segments_are_merged_and_nothing_is_lost(folder, warnings):
    labels = [f"label {index}" for index in range(3 * disk_cache.MAX_SMALL_SEGMENTS)]
    cache = open_new(folder)
    for label in labels:
        assert ask(cache, [label]) == [label]
        assert len(segments_of(folder)) <= disk_cache.MAX_SMALL_SEGMENTS + 1
    assert ask(open_new(folder), labels) == []
    assert warnings() == []


def test_large_segments_are_not_rewritten(folder, monkeypatch):
    monkeypatch.setattr(disk_cache, "SMALL_BYTES", HEAD_BYTES)
    labels = [f"label {index}" for index in range(2 * disk_cache.MAX_SMALL_SEGMENTS)]
    cache = open_new(folder)
    for label in labels:
        ask(cache, [label])
    assert len(segments_of(folder)) == len(labels)


def test_what_is_merged_while_it_is_looked_for_is_found(filled, monkeypatch):
    """Another process lists the folder, and then its segments are merged."""
    ask(open_new(filled), ["new"])
    cache = open_new(filled)
    list_now = DiskCache._list
    stale = list_now(cache._disk, NAMESPACE)
    monkeypatch.setattr(disk_cache, "MAX_SMALL_SEGMENTS", 1)
    ask(open_new(filled), ["newer"])
    assert not any(segment.path.exists() for segment in stale)
    listings = [stale]
    monkeypatch.setattr(
        DiskCache,
        "_list",
        lambda self, namespace="": listings.pop() if listings else list_now(self, namespace),
    )
    assert ask(cache, [*LABELS, "new"]) == []


# ---- bounds


def size_of(num_labels):
    return 16 + num_labels * (2 * 32 + 4 * DIM)


def test_the_size_is_bounded_and_the_least_recently_used_go_first(folder):
    cache = open_new(folder, max_disk_bytes=3 * size_of(1))
    paths = {}
    for age_s, label in ((300, "a"), (200, "b"), (100, "c")):
        before = set(segments_of(folder))
        ask(cache, [label])
        (paths[label],) = set(segments_of(folder)) - before
        os.utime(paths[label], (time.time() - age_s,) * 2)
    assert cache.num_disk_bytes == 3 * size_of(1)
    assert ask(open_new(folder), ["a"]) == []
    ask(cache, ["d"], key=KEY._replace(weights="others"))
    assert (
        cache.num_disk_bytes
        == 3 * size_of(1)
        == sum(path.stat().st_size for path in folder.iterdir())
    )
    assert not paths["b"].exists()
    assert ask(open_new(folder), ["a", "c"]) == []


@pytest.mark.parametrize("max_disk_bytes", [0, size_of(3) - 1])
def test_more_than_the_bound_is_not_written(folder, max_disk_bytes, warnings):
    cache = open_new(folder, max_disk_bytes=max_disk_bytes)
    assert ask(cache) == list(LABELS)
    assert cache.num_disk_bytes == 0
    assert ask(open_new(folder)) == list(LABELS)
    assert warnings() == []


def test_clear_empties_the_folder_of_its_own_files_only(filled):
    foreign = [filled / "notes.txt", filled / f"{'0' * 32}-{'0' * 64}.embeddings.bak"]
    for path in foreign:
        path.write_text("mine")
    cache = open_new(filled)
    cache.clear()
    assert cache.num_disk_bytes == 0
    assert sorted(filled.iterdir()) == sorted(foreign)
    assert ask(cache) == list(LABELS)


@pytest.mark.slow
def test_what_a_killed_writer_left_goes_after_an_hour(folder, start_owner):
    writer = start_owner(WRITER_THAT_HANGS, folder)
    assert writer.read_line() == "written"
    writer.end()
    (left,) = folder.iterdir()
    assert segments_of(folder) == []
    assert ask(open_new(folder)) == list(LABELS)
    assert left.exists()
    os.utime(left, (time.time() - disk_cache.MAX_WRITING_S - 60,) * 2)
    ask(open_new(folder), ["new"])
    assert set(folder.iterdir()) == set(segments_of(folder))


WRITER_THAT_HANGS = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {HERE!r})
import test_disk_cache

def hang(*paths):
    print("written", flush=True)
    time.sleep(600)

os.replace = hang
test_disk_cache.ask(test_disk_cache.open_new(Path(sys.argv[1])))
"""


# ---- damaged files


def truncate(path, num_bytes):
    path.write_bytes(path.read_bytes()[:num_bytes])


def replace_by_folder(path):
    path.unlink()
    (path / "within").mkdir(parents=True)


def replace_by_link(path, target):
    path.unlink()
    path.symlink_to(target)


def move_and_link(path):
    aside = path.with_name("aside")
    path.rename(aside)
    path.symlink_to(aside)


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def write_anew(path, content):
    """Put content under a name that its head makes right."""
    head = content[: 16 + 3 * 2 * 32]
    name = f"{path.name[:32]}-{hashlib.sha256(head).hexdigest()}.embeddings"
    path.unlink()
    path.with_name(name).write_bytes(content)


def write_rows(path, rows):
    """Put rows into a segment with all the right hashes."""
    content = path.read_bytes()
    hashes = b"".join(hashlib.sha256(row.tobytes()).digest() for row in rows)
    write_anew(path, content[: 16 + 3 * 32] + hashes + rows.tobytes())


DAMAGE = {
    "empty": lambda path: truncate(path, 0),
    "cut in its first words": lambda path: truncate(path, 9),
    "cut after its first words": lambda path: truncate(path, 16),
    "cut in its head": lambda path: truncate(path, 100),
    "cut in its rows": lambda path: truncate(path, -1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "of another version": lambda path: write_anew(path, b"clip_rt9" + path.read_bytes()[8:]),
    "says it holds nothing": lambda path: write_anew(path, path.read_bytes()[:8] + bytes(8)),
    "of another dimension": lambda path: write_rows(path, np.eye(3, 2 * DIM, dtype=np.float32)),
    "text": lambda path: path.write_text("not what it should be" * 20),
    "not a number": lambda path: write_rows(path, np.full((3, DIM), np.nan, np.float32)),
    "infinite": lambda path: write_rows(path, np.full((3, DIM), np.inf, np.float32)),
    "not of length one": lambda path: write_rows(path, np.full((3, DIM), 1, np.float32)),
    "a folder": replace_by_folder,
    "a link to nothing": lambda path: replace_by_link(path, "nowhere"),
    "a link to itself": lambda path: replace_by_link(path, path.name),
    "a link to what it was": move_and_link,
    "a pipe": replace_by_pipe,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_as_none_and_is_replaced_after_one_warning(
    segment, filled, damage, warnings
):
    damage(segment)
    cache = open_new(filled)
    assert ask(cache) == list(LABELS)
    assert len(warnings()) == 1
    assert "is damaged" in warnings()[0]
    assert segments_of(filled) == [segment]
    assert segment.is_file()
    assert not segment.is_symlink()
    assert ask(open_new(filled)) == []
    assert len(warnings()) == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, size_of(3) - 1), st.integers(0, 7))
def test_no_flipped_bit_is_ever_taken_for_an_embedding(offset, bit):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ask(open_new(folder))
        (segment,) = segments_of(folder)
        content = bytearray(segment.read_bytes())
        content[offset] ^= 1 << bit
        segment.write_bytes(content)
        assert ask(open_new(folder)) == list(LABELS)
        assert ask(open_new(folder)) == []


def test_a_file_under_anothers_name_is_damaged(segment, filled, warnings):
    ask(open_new(filled), ["new"])
    (other,) = set(segments_of(filled)) - {segment}
    shutil.copy(other, segment)
    assert ask(open_new(filled)) == list(LABELS)
    assert len(warnings()) == 1


def test_a_file_under_the_name_of_other_weights_holds_nothing_of_theirs(segment, filled):
    other = KEY._replace(weights="others")
    ask(open_new(filled), ["new"], key=other)
    (theirs,) = set(segments_of(filled)) - {segment}
    segment.rename(filled / (theirs.name[:32] + segment.name[32:]))
    assert ask(open_new(filled), key=other) == list(LABELS)


def test_a_damaged_file_is_not_merged(filled, segment, monkeypatch, warnings):
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1
    segment.write_bytes(content)
    monkeypatch.setattr(disk_cache, "MAX_SMALL_SEGMENTS", 1)
    DiskCache(filled, 10**6).write(NAMESPACE, ["new"], stack(["new"]))
    assert len(warnings()) == 1
    assert ask(open_new(filled), ["new"]) == []
    assert ask(open_new(filled)) == list(LABELS)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_opened(segment, filled, tmp_path):
    content = pickle.dumps(Bomb(tmp_path / "exploded"))
    segment.write_bytes(content)
    segment.with_name("x.pkl").write_bytes(content)
    assert ask(open_new(filled)) == list(LABELS)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(content)
    assert (tmp_path / "exploded").exists()


def test_files_of_other_names_are_left_alone(filled, warnings):
    foreign = filled / f"{'0' * 32}-{'0' * 64}.embeddings2"
    foreign.write_text("of a later version")
    ask(open_new(filled), ["new"])
    assert foreign.read_text() == "of a later version"
    assert warnings() == []


def test_what_is_no_embedding_is_not_kept(folder, warnings):
    rows = np.stack([embed("red"), np.full(DIM, np.nan), np.zeros(DIM)]).astype(np.float32)
    DiskCache(folder, 10**6).write(NAMESPACE, LABELS, rows)
    assert list(DiskCache(folder, 10**6).read(NAMESPACE, LABELS, DIM)) == ["red"]
    assert warnings() == []


# ---- folders that cannot be used


@pytest.mark.parametrize("depth", [0, 1])
def test_a_file_where_the_folder_should_be(folder, depth, warnings):
    place = [folder, *folder.parents][depth]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("mine")
    cache = open_new(folder)
    assert ask(cache) == list(LABELS)
    assert ask(cache, [*LABELS, "new"]) == ["new"]
    assert cache.num_disk_bytes == 0
    cache.clear()
    assert len(warnings()) == 1
    assert str(folder) in warnings()[0]
    assert place.read_text() == "mine"


def test_a_user_without_a_home(monkeypatch, warnings):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    cache = open_new(Path("~/cache"))
    assert ask(cache) == list(LABELS)
    assert cache.num_disk_bytes == 0
    cache.clear()
    assert len(warnings()) == 1
    assert "no home" in warnings()[0]


def test_a_tilde_is_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    ask(open_new(Path("~/cache")))
    assert len(segments_of(tmp_path / "cache")) == 1


WRITES = ["clip_rt.cache.disk.tempfile.mkstemp", "clip_rt.cache.disk.os.replace"]
READS = ["clip_rt.cache.disk.os.scandir", "pathlib.Path.open"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", WRITES + READS)
def test_whatever_the_system_refuses_only_costs_time(filled, monkeypatch, call, code, warnings):
    before = segments_of(filled)

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code), "somewhere")

    cache = open_new(filled)
    with monkeypatch.context() as patched:
        patched.setattr(call, refuse)
        made = ask(cache, [*LABELS, "new"])
        assert made == ([*LABELS, "new"] if call in READS else ["new"])
        assert ask(cache, [*LABELS, "new", "newer"]) == ["newer"]
    assert len(warnings()) == 1
    assert os.strerror(code) in warnings()[0]
    assert set(before) <= set(filled.iterdir()) == set(segments_of(filled))
    assert ask(cache, ["at last"]) == ["at last"]
    assert ask(open_new(filled), [*LABELS, "at last"]) == []
    assert len(warnings()) == 1


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_file(tmp_path):
    """A real one where this user can make one; else a limit on the size of files."""
    program = """
        import logging, resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[3])
        import test_disk_cache as t

        folder, is_small = Path(sys.argv[1]), sys.argv[2] == "True"
        if not is_small:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, 64 * 1024))
        logging.basicConfig()
        cache = t.open_new(folder)
        few, many = t.LABELS, [f"label {index}" for index in range(1000)]
        assert t.ask(cache, many) == many
        assert t.ask(cache, few) == list(few)
        assert t.ask(cache, [*many, *few]) == []
        names = sorted(path.name for path in folder.iterdir())
        assert len(names) == 1 and names[0].endswith(".embeddings"), names
        assert t.ask(t.open_new(folder), few) == []
    """
    with contextlib.ExitStack() as after:
        is_small = mount_small(tmp_path)
        if is_small:
            after.callback(subprocess.run, ["umount", tmp_path], check=True)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), tmp_path, str(is_small), HERE],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be used in full") == 1
    assert ("No space left" in done.stderr) or not is_small


def mount_small(folder):
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "clip_rt-test", str(folder)]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    return False


def as_a_common_user(check):
    """Run in a child, without the rights of root, over a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if os.geteuid() == 0:
                    os.setgid(65534)
                    os.setuid(65534)
                check(Path(name) / "cache")
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_folder_that_can_only_be_read_is_read(warnings):
    def check(folder):
        assert ask(open_new(folder)) == list(LABELS)
        before = segments_of(folder)
        folder.chmod(0o500)
        cache = open_new(folder)
        assert ask(cache) == []
        assert warnings() == []
        assert ask(cache, [*LABELS, "new"]) == ["new"]
        assert ask(cache, ["new", "newer"]) == ["newer"]
        assert len(warnings()) == 1
        assert "Permission denied" in warnings()[0]
        cache.clear()
        assert segments_of(folder) == before
        damaged = before[0]
        damaged.write_text("damaged")
        assert ask(open_new(folder)) == list(LABELS)
        folder.chmod(0o700)
        assert ask(open_new(folder)) == list(LABELS)
        assert ask(open_new(folder)) == []

    as_a_common_user(check)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_permissions_may_change_under_it(warnings):
    def check(folder):
        cache = PromptCache(0, folder)
        assert ask(cache) == list(LABELS)
        for mode in (0o000, 0o300, 0o600):
            folder.chmod(mode)
            assert ask(cache) == list(LABELS)
        folder.chmod(0o700)
        (segment,) = segments_of(folder)
        assert ask(cache) == []
        segment.chmod(0o000)
        assert ask(cache) == list(LABELS)
        assert ask(cache) == []
        assert len(warnings()) == 1

    as_a_common_user(check)


def test_a_folder_that_is_deleted_meanwhile_is_made_again(filled, warnings):
    cache = open_new(filled)
    assert ask(cache) == []
    shutil.rmtree(filled)
    assert ask(cache, [*LABELS, "new"]) == ["new"]
    assert ask(open_new(filled), ["new"]) == []
    assert warnings() == []


def test_a_folder_that_is_deleted_in_the_middle_of_a_write(filled, monkeypatch, warnings):
    replace = os.replace

    def delete_and_replace(written, path):
        shutil.rmtree(filled)
        replace(written, path)

    cache = open_new(filled)
    with monkeypatch.context() as patched:
        patched.setattr("clip_rt.cache.disk.os.replace", delete_and_replace)
        assert ask(cache, ["new"]) == ["new"]
        assert ask(cache, ["newer"]) == ["newer"]
    assert len(warnings()) == 1
    assert ask(cache, ["newest"]) == ["newest"]
    assert ask(open_new(filled), ["newest"]) == []


def test_many_threads_warn_once(tmp_path, warnings):
    (tmp_path / "file").write_text("")
    cache = open_new(tmp_path / "file")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: ask(cache, [f"label {index}"]), range(64)))
    assert len(warnings()) == 1


# ---- processes

CROWD = """
import logging, random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
import test_disk_cache as t

class Refuse(logging.Handler):
    def emit(self, record):
        print("warned:", record.getMessage(), flush=True)

logging.getLogger("clip_rt.cache").addHandler(Refuse())
t.disk_cache.MAX_SMALL_SEGMENTS = 3
folder, worker, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
order = random.Random(worker)
print("started", flush=True)
for number in range(rounds):
    shared = [f"shared {order.randrange(200)}" for _ in range(order.randrange(1, 20))]
    own = [f"{worker}'s {number}"]
    t.ask(t.open_new(folder, max_disk_bytes=60_000), shared + own)
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_crowd_of_processes_some_of_them_killed_never_reads_a_wrong_row(
    folder, start_owner, warnings
):
    lasting = [start_owner(CROWD, folder, worker, 150, HERE) for worker in range(5)]
    doomed = [start_owner(CROWD, folder, worker, 10**6, HERE) for worker in range(5, 8)]
    for worker in lasting + doomed:
        assert worker.read_line() == "started"
    for victim in doomed:
        assert wait_for_more_segments(folder)
        victim.end()
    for worker in lasting:
        assert worker.read_line() == "done"
        assert worker.process.wait(timeout=60) == 0
    everything = [f"shared {number}" for number in range(200)]
    ask(open_new(folder), everything)
    assert warnings() == []
    assert open_new(folder).num_disk_bytes > 0


def wait_for_more_segments(folder):
    before = set(segments_of(folder))
    return wait_until(lambda: set(segments_of(folder)) - before)
