"""Processes of one user share one embedded server, and the last one out leaves nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import tempfile
import time
from pathlib import Path

import pytest
import tiny_repository
from owners import (
    Owner,
    find_processes,
    find_remains,
    is_listening,
    is_running,
    read_command,
    wait_until,
)

import clip_rt
from clip_rt.embedded import server as server_module
from clip_rt.embedded import sharing
from clip_rt.embedded.installation import find_home, find_models
from clip_rt.embedded.server import EmbeddedServer, acquire_server

pytestmark = pytest.mark.slow

SHARER = """
import sys
from clip_rt.embedded.server import acquire_server
server = acquire_server(sys.argv[1])
print(server.server_id, server.url, flush=True)
for line in sys.stdin:
    if line == "start again\\n":
        server.wait()
        server.start()
        print(server.server_id, server.url, flush=True)
    elif line == "leave\\n":
        server.stop()
        print("left", flush=True)
"""


@pytest.fixture
def own_repository(tmp_path: Path) -> Path:
    """One that no other test has a server over."""
    return tiny_repository.write_bare(tmp_path / "models")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have servers lie below a temporary folder of their own."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"clip_rt-{os.getuid()}"


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def find_supervisor(owner_pid: int) -> int:
    (pid,) = find_processes("supervisor.py", owner_pid)
    return pid


def find_keys(folder: Path) -> set[str]:
    return {each.name.split("-")[3] for each in folder.glob("clip_rt-*-*-*")}


def test_eight_processes_at_once_share_one_server_until_the_last_has_left(
    start_owner, own_repository
):
    owners = [start_owner(SHARER, own_repository) for _ in range(8)]
    told = {owner.read_line() for owner in owners}
    assert len(told) == 1
    url = told.pop().split()[1]
    (starter,) = [owner for owner in owners if find_processes("bin/tritonserver", owner.pid)]
    helpers = find_processes("", starter.pid)
    assert len(helpers) == 3  # Supervisor, server, stub.
    others = [owner for owner in owners if owner is not starter]
    # The one that started it has no say in when it ends.
    kill(starter.pid)
    starter.process.wait(timeout=60)
    assert others[0].ask("leave") == "left"
    for owner in others[1:4]:
        kill(owner.pid)
    assert not wait_until(lambda: not is_listening(url), timeout_s=0.5)
    for owner in others[4:-1]:
        owner.hang_up()
        assert owner.process.wait(timeout=10) == 0
    assert is_listening(url)
    kill(others[-1].pid)
    assert wait_until(lambda: not is_listening(url))
    assert wait_until(lambda: not any(map(is_running, helpers)))
    assert wait_until(lambda: not find_remains(starter.pid))


def test_after_the_server_died_all_meet_at_one_again(start_owner, own_repository):
    first, second = (start_owner(SHARER, own_repository) for _ in range(2))
    before = {first.read_line(), second.read_line()}
    assert len(before) == 1
    (pid,) = [pid for owner in (first, second) for pid in find_server(owner)]
    for owner in (first, second):
        owner.say("start again")
    kill(pid)
    after = {first.read_line(), second.read_line()}
    assert len(after) == 1
    assert after.isdisjoint(before)
    assert {line.split()[1] for line in after} == {line.split()[1] for line in before}


def find_server(owner: Owner) -> list[int]:
    return find_processes("bin/tritonserver", owner.pid)


def test_after_an_export_new_processes_get_a_new_server_and_others_keep_theirs(
    start_owner, own_repository
):
    old = acquire_server(own_repository)
    try:
        with (own_repository / "bare" / "1" / "model.py").open("a") as file:
            file.write("# exported again\n")
        other = start_owner(SHARER, own_repository)
        new = acquire_server(own_repository)
        try:
            assert new is not old
            assert new.url != old.url
            assert other.read_line() == f"{new.server_id} {new.url}"
            assert old.is_running
        finally:
            new.stop()
    finally:
        old.stop()
    assert other.ask("leave") == "left"


def test_what_changes_results_or_reach_is_part_of_the_key(own_repository, monkeypatch):
    home, models = find_home(), find_models(own_repository)
    keys = [sharing.make_key(home, models)]
    assert sharing.make_key(home, models) == keys[0]
    monkeypatch.setenv("AN_UNRELATED_VARIABLE", "1")
    assert sharing.make_key(home, models) == keys[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    keys.append(sharing.make_key(home, models))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    keys.append(sharing.make_key(home, models))
    monkeypatch.setattr(sharing, "__version__", "0.0.0")
    keys.append(sharing.make_key(home, models))
    config = own_repository / "bare" / "config.pbtxt"
    found = config.stat()
    config.write_text(config.read_text().replace("max_batch_size: 1", "max_batch_size: 2"))
    os.utime(config, ns=(found.st_atime_ns, found.st_mtime_ns))
    keys.append(sharing.make_key(home, models))
    assert len(set(keys)) == len(keys)


def test_a_killed_supervisor_is_cleaned_up_after_by_whoever_comes_next(
    start_owner, own_repository, bare_repository, place, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(place.parent))
    owner = start_owner(SHARER, own_repository)
    owner.read_line()
    folder = next(place.glob(f"clip_rt-{owner.pid}-*"))
    pids = find_processes("", owner.pid)
    os.kill(owner.pid, signal.SIGSTOP)  # Or it would clean up.
    kill(find_supervisor(owner.pid))
    kill(owner.pid)
    assert wait_until(lambda: not any(map(is_running, pids)))
    assert folder.exists()
    with EmbeddedServer(bare_repository):
        assert not folder.exists()
    assert not find_remains(owner.pid)


def test_servers_lie_where_only_their_user_can_enter(own_repository, place):
    server = acquire_server(own_repository)
    try:
        (folder,) = place.iterdir()
        assert stat.S_IMODE(place.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert server.server_id.removeprefix("clip_rt-") in folder.name
    finally:
        server.stop()
    assert not place.exists()


def test_a_runtime_folder_of_the_user_comes_before_the_temporary_one(place, tmp_path, monkeypatch):
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    with sharing.open_folder(time.monotonic() + 5) as folder:
        assert folder == runtime / "clip_rt"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    with sharing.open_folder(time.monotonic() + 5) as folder:
        assert folder == place


def plant_link(place: Path) -> None:
    (place.parent / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(place.parent / "elsewhere")


def plant_open(place: Path) -> None:
    place.mkdir()
    place.chmod(0o755)


def plant_file(place: Path) -> None:
    place.touch()


def open_parent(place: Path) -> None:
    place.parent.chmod(0o777)


@pytest.mark.parametrize("plant", [plant_link, plant_open, plant_file, open_parent])
def test_what_others_may_have_planted_is_not_used(place, monkeypatch, plant):
    plant(place)
    with sharing.open_folder(time.monotonic() + 5) as folder:
        assert folder == Path("/dev/shm") / place.name
    monkeypatch.setattr(sharing.supervisor, "SHARED_MEMORY", place / "none")
    with (
        pytest.raises(clip_rt.ServerStartError, match=r"no folder can be used.*TMPDIR"),
        sharing.open_folder(time.monotonic() + 5),
    ):
        pass


def test_a_folder_of_another_user_is_not_used(place, monkeypatch):
    place.mkdir(mode=0o700)
    own = os.getuid()
    monkeypatch.setattr(sharing.os, "getuid", lambda: own + 1)
    (place.parent / f"clip_rt-{own + 1}").mkdir(mode=0o700)
    monkeypatch.setattr(sharing.supervisor, "SHARED_MEMORY", place / "none")
    with (
        pytest.raises(clip_rt.ServerStartError, match=f"user with the id {own}"),
        sharing.open_folder(time.monotonic() + 5),
    ):
        pass


def test_a_stopped_process_that_holds_the_lock_is_not_waited_for_for_ever(own_repository, place):
    place.mkdir(mode=0o700)
    descriptor = os.open(place, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(clip_rt.ServerStartError, match=r"holds .* too long"):
            acquire_server(own_repository, start_timeout_s=0.3)
    finally:
        os.close(descriptor)
    server = acquire_server(own_repository)
    server.stop()


def test_a_path_longer_than_a_socket_may_have_will_do(own_repository, tmp_path, monkeypatch):
    deep = tmp_path / ("a" * 100) / ("b" * 100)
    deep.mkdir(parents=True)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    server = acquire_server(own_repository)
    server.stop()
    assert not list(deep.iterdir())


FORKING = """
import os, sys
from clip_rt.embedded.server import EmbeddedServer, acquire_server
server = EmbeddedServer(sys.argv[1]) if sys.argv[2] == "own" else acquire_server(sys.argv[1])
server.start()
if os.fork() == 0:
    os.setsid()
    server.start()  # A use; from here on it is an owner, too.
    print(server.server_id, server.url, flush=True)
    for line in sys.stdin:
        pass
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_a_forked_child_that_uses_it_owns_it_too(start_owner, own_repository, kind):
    owner = start_owner(FORKING, own_repository, kind)
    _, url = owner.read_line().split()
    helpers = find_processes("", owner.pid)
    kill(owner.pid)
    assert not wait_until(lambda: not is_listening(url), timeout_s=0.5)
    owner.hang_up()  # The child ends.
    assert wait_until(lambda: not is_listening(url))
    assert wait_until(lambda: not any(map(is_running, helpers)))
    assert wait_until(lambda: not find_remains(owner.pid))


def test_one_that_dies_again_and_again_is_left_alone_for_a_while(own_repository, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_CRASHES", 2)
    server = acquire_server(own_repository)
    try:
        for _ in range(2):
            server.start()
            own = server.server_id.removeprefix("clip_rt-")
            (pid,) = (
                pid
                for pid in find_processes("bin/tritonserver", os.getpid())
                if own in read_command(pid)
            )
            kill(pid)
            assert wait_until(lambda: not server.is_running)
        for _ in range(2):
            start_s = time.monotonic()
            with pytest.raises(
                clip_rt.ServerStartError, match=r"2 times in a row.*killed"
            ) as caught:
                server.start()
            assert time.monotonic() - start_s < 0.5
            assert "successfully loaded 'bare'" in caught.value.log_tail
        monkeypatch.setattr(server_module, "COOL_DOWN_S", 0.0)
        server.start()
    finally:
        server.stop()


def test_one_that_never_starts_is_not_tried_each_time(own_repository, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_CRASHES", 2)
    model = own_repository / "bare" / "1" / "model.py"
    model.write_text("raise RuntimeError('on purpose')\n")
    for _ in range(2):
        with pytest.raises(clip_rt.ServerStartError, match=r"did not start.*on purpose"):
            acquire_server(own_repository)
    start_s = time.monotonic()
    with pytest.raises(clip_rt.ServerStartError, match=r"2 times in a row.*on purpose"):
        acquire_server(own_repository)
    assert time.monotonic() - start_s < 0.5
    # What is repaired is tried at once.
    model.write_text("class TritonPythonModel:\n    pass\n")
    acquire_server(own_repository).stop()
