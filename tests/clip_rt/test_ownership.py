"""What an owner and a supervisor say to each other, whatever state the other is in."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_repository
from owners import find_processes, find_remains, is_running, wait_until
from stopping import stopped

import clip_rt
from clip_rt.embedded import server as server_module
from clip_rt.embedded import supervisor
from clip_rt.embedded.server import EmbeddedServer

pytestmark = pytest.mark.slow

SHARER = """
import sys
from clip_rt.embedded.server import EmbeddedServer
server = EmbeddedServer(sys.argv[1], is_shared=True)
print(server.start(), flush=True)
sys.stdin.readline()
print(server.is_running, flush=True)
sys.stdin.readline()
"""


def test_a_stopped_supervisor_leaves_time_to_start_another_server(start_owner, tmp_path):
    repository = tiny_repository.write_bare(tmp_path)
    owner = start_owner(SHARER, repository)
    url = owner.read_line()
    (pid,) = find_processes("supervisor.py", owner.pid)
    with EmbeddedServer(repository, is_shared=True) as server:
        assert server.url == url
    with stopped(pid):
        start_s = time.monotonic()
        with EmbeddedServer(repository, is_shared=True, start_timeout_s=8.0) as server:
            assert time.monotonic() - start_s < 8.0
            assert server.url != url
    assert owner.ask("") == "True"  # Nothing happened to the one it was started for.


def test_a_supervisor_that_is_stopped_as_it_starts_is_given_up_in_time(tmp_path, monkeypatch):
    """Its Python is one that never comes to read what it shall do."""
    repository = tiny_repository.write_bare(tmp_path)
    asleep = tmp_path / "asleep.py"
    asleep.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(supervisor, "__file__", str(asleep))
    # More than the buffer of a socket holds.
    for index in range(4):
        monkeypatch.setenv(f"CLIP_RT_LONG_{index}", "x" * 100_000)
    before = set(find_remains(os.getpid()))
    start_s = time.monotonic()
    with pytest.raises(clip_rt.ServerStartError, match=r"not ready after 1 s, .*start_timeout_s="):
        EmbeddedServer(repository).start(timeout_s=1.0)
    assert 0.9 < time.monotonic() - start_s < 3.0
    assert wait_until(lambda: not any(map(is_running, find_processes(str(asleep), os.getpid()))))
    assert set(find_remains(os.getpid())) == before


@pytest.fixture
def link():
    ours, its = socket.socketpair()
    with ours, its:
        yield ours, its


@pytest.mark.parametrize("byte", [b"\0", b"\xff", b"\n", b"a", "\u20ac".encode()])
def test_a_report_reaches_an_owner_that_reads_it_only_later(link, byte):
    ours, its = link
    log = (byte * supervisor.LOG_BYTES)[: supervisor.LOG_BYTES - 5] + b" end."
    report = supervisor.Report(exit_code=1, log_tail=log.decode("utf-8", "replace"), problem="")
    supervisor._shorten(report)
    supervisor.tell(ours, {"server": {"server_id": "x", "port": 1, "token": "y"}})
    supervisor.tell(ours, {"report": report})
    ours.close()
    with its.makefile("rb") as lines:
        _, line = lines
    found = json.loads(line)["report"]
    assert found == report
    assert found["log_tail"].endswith(" end.")
    assert len(found["log_tail"]) >= supervisor.REPORT_BYTES // 8


UNREADABLE = """#!/bin/sh
head -c 60000 /dev/zero; echo
echo 'error: the disk is on fire'
exit 3
"""


def test_the_cause_is_found_at_the_end_of_a_log_that_is_no_text(tmp_path, monkeypatch):
    binary = tmp_path / "tritonserver"
    binary.write_text(UNREADABLE)
    binary.chmod(0o755)
    home = replace(server_module.find_home(), binary=binary)
    monkeypatch.setattr(server_module, "find_home", lambda: home)
    repository = tiny_repository.write_bare(tmp_path / "models")
    with pytest.raises(clip_rt.ServerStartError, match="the disk is on fire") as caught:
        EmbeddedServer(repository).start()
    assert "\0" in caught.value.log_tail


def test_a_start_is_not_waited_for_longer_than_one_has(tmp_path):
    """Another thread's start may take long; it goes on, and a call in a hurry does not."""
    repository = tiny_repository.write_bare(tmp_path)
    with EmbeddedServer(repository) as server:
        server.stop()
        with (repository / "bare" / "1" / "model.py").open("a") as file:
            file.write("import time\ntime.sleep(4)\n")
        thread = threading.Thread(target=server.start)
        thread.start()
        time.sleep(0.5)
        start_s = time.monotonic()
        with pytest.raises(clip_rt.ServerStartError, match=r"after 0\.5 s.*start_timeout_s="):
            server.start(timeout_s=0.5)
        assert time.monotonic() - start_s < 1.5
        thread.join(60)
        assert server.is_running


def test_a_supervisor_keeps_nothing_open_that_its_owner_had(tmp_path):
    repository = tiny_repository.write_bare(tmp_path / "models")
    (tmp_path / "kept").write_text("")
    descriptor = os.open(tmp_path / "kept", os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    try:
        with EmbeddedServer(repository) as server:
            own = server.server_id.removeprefix("clip_rt-")
            for pid in find_processes(own, os.getpid()):
                links = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
                assert str(tmp_path / "kept") not in links
    finally:
        os.close(descriptor)
