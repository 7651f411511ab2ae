"""`python -m clip_rt serve`: two side by side, a graceful end, and loopback only."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_repository
import tritonclient.grpc as triton
from owners import ROOT, find_processes, find_remains, is_listening, is_running, wait_until
from stopping import stopped

import clip_rt
from clip_rt.__main__ import main
from clip_rt.embedded.foreground import serve
from clip_rt.embedded.server import EmbeddedServer

pytestmark = pytest.mark.slow

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_serve(tmp_path: Path) -> Iterator[Start]:
    """Start the command over a repository; its standard error goes to a file named for it."""
    started: list[subprocess.Popen[str]] = []

    def start(repository: Path, port: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "clip_rt", "serve", "--repository", str(repository)]
        with open(tmp_path / f"log {len(started)}", "w") as log:
            started.append(
                subprocess.Popen(
                    [*command, "--port", str(port)],
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                    start_new_session=True,
                )
            )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=60)


def read_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving "), line
    return line.partition(" on ")[2].partition(",")[0]


NOISE = re.compile(r"terminate called|what\(\)|fts_read|Abort|abort|Signal \(6\)|Traceback|Error")


def assert_ended_cleanly(process: subprocess.Popen[str], log: Path) -> None:
    """Wait for its end: with code 0, and without the words of a crash."""
    assert process.wait(timeout=60) == 0
    assert not NOISE.findall(log.read_text(errors="replace"))
    assert not find_remains(process.pid)


def find_stub(owner_pid: int, model: str) -> int:
    (pid,) = find_processes(f"/models/{model}/", owner_pid)
    return pid


def test_two_serve_side_by_side_and_a_client_needs_an_address_only(
    start_serve, repository, tmp_path
):
    first, second = start_serve(repository), start_serve(repository)
    urls = read_url(first), read_url(second)
    assert urls[0] != urls[1]
    for url in urls:
        with clip_rt.Client(url) as client:
            assert client.encode_texts(["red"]).shape == (1, 8)
    first.send_signal(signal.SIGINT)
    assert_ended_cleanly(first, tmp_path / "log 0")
    assert not is_listening(urls[0])
    assert "Waiting for in-flight requests" in (tmp_path / "log 0").read_text()
    with clip_rt.Client(urls[1]) as client:
        assert client.encode_texts(["red"]).shape == (1, 8)
    # A port that is taken is not exchanged for another: clients know it.
    third = start_serve(repository, port=int(urls[1].rpartition(":")[2]))
    assert third.wait(timeout=30) == 1
    assert "is taken by another process" in (tmp_path / "log 2").read_text()
    pids = find_processes("", second.pid)
    second.kill()
    assert wait_until(lambda: not is_listening(urls[1]))
    assert wait_until(lambda: not any(map(is_running, pids)))
    assert wait_until(lambda: not find_remains(second.pid))


def test_told_to_end_it_answers_what_is_under_way_and_accepts_no_more(
    start_serve, repository, tmp_path
):
    process = start_serve(repository)
    url = read_url(process)
    with triton.InferenceServerClient(url) as client:
        tokens = triton.InferInput("tokens", [1, 3], "INT32")
        tokens.set_data_from_numpy(np.array([[1, tiny_repository.WORDS["red</w>"], 2]], np.int32))
        answers: list[object] = []
        stub = find_stub(process.pid, "tiny_text")
        with stopped(stub):
            client.async_infer("tiny_text", [tokens], lambda result, error: answers.append(error))
            assert client.is_server_ready()  # Heard on the same connection, after the request.
            process.terminate()

            def is_refused() -> bool:
                try:
                    client.infer("tiny_image", [make_pixels()], client_timeout=1.0)
                except triton.InferenceServerException:
                    return True
                return False

            assert wait_until(is_refused)
            assert process.poll() is None
            assert not answers
        assert wait_until(lambda: answers)
        assert answers == [None]
    assert_ended_cleanly(process, tmp_path / "log 0")


def make_pixels() -> triton.InferInput:
    side_px = tiny_repository.SIDE_PX
    pixels = triton.InferInput("pixels", [1, side_px, side_px, 3], "UINT8")
    pixels.set_data_from_numpy(np.zeros((1, side_px, side_px, 3), np.uint8))
    return pixels


def test_started_at_once_and_told_to_end_at_once_each_ends_cleanly(
    start_serve, bare_repository, tmp_path
):
    before = set(Path("/tmp").glob("python_env_*"))
    processes = [start_serve(bare_repository) for _ in range(3)]
    for process in processes:
        read_url(process)
    assert wait_until(lambda: not set(Path("/tmp").glob("python_env_*")) - before)
    with EmbeddedServer(bare_repository):  # Which starts and is killed meanwhile.
        for process, number in zip(
            processes, (signal.SIGTERM, signal.SIGINT, signal.SIGTERM), strict=True
        ):
            process.send_signal(number)
    for index, process in enumerate(processes):
        assert_ended_cleanly(process, tmp_path / f"log {index}")
    assert wait_until(lambda: not set(Path("/tmp").glob("python_env_*")) - before)


def test_it_says_where_it_serves_what_in_any_encoding_and_to_nobody(
    start_serve, tmp_path, monkeypatch
):
    repository = tiny_repository.write_bare(tmp_path / "modèles ✓")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("LC_ALL", "C")
    process = start_serve(repository)
    read_url(process)
    process.terminate()
    assert_ended_cleanly(process, tmp_path / "log 0")
    deaf = start_serve(repository)
    deaf.stdout.close()
    deaf.stdout = None
    assert wait_until(lambda: "listens on" in (tmp_path / "log 1").read_text(), timeout_s=30)
    deaf.terminate()
    assert deaf.wait(timeout=30) == 0


def test_one_that_dies_is_started_again_at_its_address(start_serve, bare_repository):
    process = start_serve(bare_repository)
    url = read_url(process)
    (pid,) = find_processes("bin/tritonserver", process.pid)
    os.kill(pid, signal.SIGKILL)
    assert read_url(process) == url
    assert is_listening(url)


def test_nobody_serves_beyond_this_machine(repository):
    for url in ("0.0.0.0:8001", "192.0.2.1:8001"):
        with pytest.raises(clip_rt.InputError, match=r"loopback.*NVIDIA's container"):
            serve(repository, url=url)
    for url in ("8001", "somewhere:8001", "127.0.0.1:port", "127.0.0.1:99999"):
        with pytest.raises(clip_rt.InputError, match="url"):
            serve(repository, url=url)


def test_the_command_says_what_is_wrong_and_fails(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["serve", "--repository", str(tmp_path / "missing")])
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "does not exist" in said
    for arguments in (["serve"], ["bake"], ["serve", "--repository", ".", "--host", "0.0.0.0"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
