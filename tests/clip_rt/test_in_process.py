"""Models that run in the caller's own process: as a server answers, and without one.

The tests that use the fixture `client` ask both; here is what is not the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_repository
from owners import ROOT, find_descendants
from PIL import Image

import clip_rt
from clip_rt.errors import (
    ClientClosedError,
    InferenceError,
    InputError,
    ServerStartError,
    ServerTimeoutError,
    UnknownModelError,
)

IMAGES = [Image.new("RGB", (80, 64), colour) for colour in ("red", "lime", "blue")]
TEXTS = ["red", "a green one", "blue", "red and blue and " * 8]


@pytest.fixture
def local(repository):
    with clip_rt.Client(repository=repository, server="in_process") as client:
        yield client


def test_it_has_the_vectors_of_the_server(local, server, repository):
    with clip_rt.Client(repository=repository, server="embedded") as served:
        assert local.manifest == served.manifest
        assert local.list_models() == served.list_models() == ("tiny",)
        for call, items in (("encode_images", IMAGES), ("encode_texts", TEXTS)):
            found, expected = getattr(local, call)(items), getattr(served, call)(items)
            np.testing.assert_allclose(found, expected, atol=1e-6)
        found, expected = (each.zero_shot(IMAGES, ["red", "blue"]) for each in (local, served))
        np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-5)


def test_no_process_is_started_and_no_runtime_imported_before_the_first_call(repository):
    program = f"""if True:
        import sys, os, clip_rt
        client = clip_rt.Client(repository={str(repository)!r}, server="in_process")
        assert not {{"onnxruntime", "openvino"}} & set(sys.modules)
        client.encode_texts("red")
        assert "onnxruntime" in sys.modules or "openvino" in sys.modules
        print(os.getpid(), flush=True)
        sys.stdin.readline()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert int(process.stdout.readline()) == process.pid
        assert find_descendants(process.pid) == []
    finally:
        process.communicate("\n", timeout=60)
    assert process.returncode == 0


def test_only_the_tower_that_is_asked_is_loaded(tmp_path):
    repository = tiny_repository.write(tmp_path)
    (repository / "tiny_image/1/model.onnx").write_bytes(b"broken")
    with clip_rt.Client(repository=repository, server="in_process") as client:
        assert client.encode_texts("red").shape == (1, 8)
        with pytest.raises(ServerStartError, match="tiny_image cannot be loaded here"):
            client.encode_images(IMAGES)
        # It says so again, and the other tower goes on.
        with pytest.raises(ServerStartError, match=r"clip-rt\[in-process\]"):
            client.encode_images(IMAGES)
        assert client.encode_texts("blue").shape == (1, 8)


def test_an_idle_tower_gives_its_memory_back_until_it_is_asked_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CLIP_RT_IDLE_UNLOAD_S", "0.2")
    caplog.set_level("INFO", "clip_rt")
    repository = tiny_repository.write(tmp_path / "models")

    def count(words: str) -> int:
        return sum(words in message for message in caplog.messages)

    with clip_rt.Client(repository=repository, server="in_process") as client:
        texts, images = client.encode_texts("red"), client.encode_images(IMAGES[0])
        for number in range(1, 3):
            until_s = time.monotonic() + 30
            while count("tiny_text was idle for 0.2 s") < number and time.monotonic() < until_s:
                time.sleep(0.05)
            # Texts only: the other tower stays as it is.
            np.testing.assert_array_equal(client.encode_texts("red"), texts)
        assert count("tiny_text is run by") == 3
        assert count("tiny_image is run by") == count("tiny_image was idle") == 1
        # The other tower would be of other weights.
        model = repository / "tiny_image" / "1" / "model.onnx"
        (tmp_path / "new").write_bytes(model.read_bytes())
        (tmp_path / "new").replace(model)
        with pytest.raises(InferenceError, match="was replaced after tiny_image had been unloaded"):
            client.encode_images(IMAGES[1])
    assert images.shape == (1, 8)


def test_threads_that_call_while_a_tower_is_unloaded_get_their_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_RT_IDLE_UNLOAD_S", "0.001")
    repository = tiny_repository.write(tmp_path / "models")
    with clip_rt.Client(repository=repository, server="in_process") as client:
        expected = client.encode_images(IMAGES)

        def call(number: int) -> None:
            time.sleep(0.002 * (number % 3))
            found = client.encode_images(IMAGES[number % 3])
            np.testing.assert_allclose(found[0], expected[number % 3], atol=1e-6)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(call, range(20)))


def test_a_time_to_unload_after_that_is_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_RT_IDLE_UNLOAD_S", "soon")
    repository = tiny_repository.write(tmp_path / "models")
    with (
        clip_rt.Client(repository=repository, server="in_process") as client,
        pytest.raises(ServerStartError, match="IDLE_UNLOAD_S is 'soon'"),
    ):
        client.encode_texts("red")


def test_clients_of_one_process_share_what_is_loaded(tmp_path, caplog):
    repository = tiny_repository.write(tmp_path)
    caplog.set_level("INFO", "clip_rt.in_process")
    with (
        clip_rt.Client(repository=repository, server="in_process") as first,
        clip_rt.Client(repository=str(repository), server="in_process") as second,
    ):
        for client in (first, second, first):
            client.encode_texts("red")
    names = [each.getMessage().split()[0] for each in caplog.records]
    assert names.count("tiny_text") == 1


def test_a_tower_that_was_replaced_meanwhile_is_not_mixed_with_the_other(tmp_path):
    repository = tiny_repository.write(tmp_path)
    with clip_rt.Client(repository=repository, server="in_process") as client:
        client.encode_images(IMAGES)
        for tower in ("image", "text"):
            config = repository / f"tiny_{tower}/config.pbtxt"
            config.write_text(config.read_text().replace("a" * 64, "b" * 64))
        with pytest.raises(ServerStartError, match="tiny_text was replaced in its repository"):
            client.encode_texts("red")
    with clip_rt.Client(repository=repository, server="in_process") as client:
        assert client.encode_texts("red").shape == (1, 8)
        assert client.manifest.fingerprint == "b" * 64


def test_what_the_environment_names_is_not_asked_where_models_are_to_run_here(
    repository, monkeypatch
):
    monkeypatch.setenv("CLIP_RT_URL", "127.0.0.1:1")
    monkeypatch.setenv("CLIP_RT_REPOSITORY", str(repository))
    with clip_rt.Client(server="in_process") as client:
        assert client.encode_texts("red").shape == (1, 8)
    with pytest.raises(InputError, match="url and server='in_process' exclude each other"):
        clip_rt.Client("127.0.0.1:1", server="in_process")


def test_a_machine_without_file_locks_or_users_runs_models(tmp_path, monkeypatch):
    """As Windows is, whose module os lacks these."""
    for name in ("getuid", "O_NONBLOCK", "O_CLOEXEC", "O_NOFOLLOW", "sched_getaffinity"):
        monkeypatch.delattr(os, name)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    repository = tiny_repository.write(tmp_path)
    with clip_rt.Client(repository=repository, server="in_process") as client:
        assert client.encode_texts("red").shape == (1, 8)


def test_many_threads_get_what_each_asked_for(local):
    expected = {text: local.encode_texts(text)[0] for text in TEXTS}
    failures = []

    def ask(number):
        for turn in range(20):
            text = TEXTS[(number + turn) % len(TEXTS)]
            if not np.allclose(local.encode_texts(text)[0], expected[text], atol=1e-6):
                failures.append(text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert local.server_seconds()["server_compute"] > 0


def test_a_call_that_is_late_ends_in_time(tmp_path):
    """The model is held up: its thread waits for what it is to load."""
    repository = tiny_repository.write(tmp_path)
    model = repository / "tiny_text/1/model.onnx"
    content = model.read_bytes()
    model.unlink()
    os.mkfifo(model)
    with clip_rt.Client(repository=repository, server="in_process") as client:
        with pytest.raises(ServerTimeoutError):
            client.encode_texts("red", timeout_s=0.5)
        with open(model, "wb") as pipe:
            pipe.write(content[:10])


def test_a_child_of_a_process_in_which_models_ran_says_what_to_do(local):
    local.encode_texts("red")
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            local.encode_texts("red", timeout_s=20)
            said = b"it answered"
        except BaseException as error:
            said = f"{type(error).__name__} {error}".encode()
        os.write(writing, said)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    assert said.startswith("ServerStartError")
    assert "spawn" in said
    assert local.encode_texts("red").shape == (1, 8)


def test_a_closed_client_says_so(local):
    local.encode_texts("red")
    local.close()
    with pytest.raises(ClientClosedError):
        local.encode_texts("red")


def test_a_call_under_way_ends_when_its_client_is_closed(tmp_path):
    repository = tiny_repository.write(tmp_path)
    model = repository / "tiny_text/1/model.onnx"
    model.unlink()
    os.mkfifo(model)
    with clip_rt.Client(repository=repository, server="in_process") as client:
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.encode_texts, "red")
            time.sleep(0.5)
            client.close()
            assert isinstance(call.exception(timeout=5), ClientClosedError)
        with open(model, "wb") as pipe:
            pipe.write(b"none")


def test_what_is_not_there_is_said(tmp_path, repository):
    with (
        clip_rt.Client(repository=repository, model="other", server="in_process") as client,
        pytest.raises(UnknownModelError, match="it serves tiny"),
    ):
        client.encode_texts("red")
    with (
        clip_rt.Client(repository=tmp_path, server="in_process") as client,
        pytest.raises(ServerStartError, match="holds no model"),
    ):
        client.encode_texts("red")
    with pytest.raises(InputError, match="'elsewhere'; it must be one of 'auto', 'embedded'"):
        clip_rt.Client(server="elsewhere")


def test_where_there_is_no_triton_it_is_taken_and_said_once(repository):
    program = f"""if True:
        import importlib.util, json, logging, sys
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *args: (
            None if name == "pytriton" else find_spec(name, *args)
        )
        logging.basicConfig(format="%(message)s")
        import clip_rt
        for _ in range(3):
            with clip_rt.Client(repository={str(repository)!r}) as client:
                shape = client.encode_texts("red").shape
        print(json.dumps(shape))
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=ROOT,
    )
    assert json.loads(done.stdout) == [1, 8]
    assert done.stderr.count("there is no embedded Triton here") == 1


def test_a_quota_of_the_container_bounds_the_threads(tmp_path, monkeypatch):
    from clip_rt.embedded import runtimes

    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(runtimes, "CGROUP_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for said, num_cores in (("150000 100000", 2), ("max 100000", 8), ("5000 100000", 1)):
        quota.write_text(said)
        assert runtimes._count_cores() == num_cores
    quota.unlink()
    assert runtimes._count_cores() == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert runtimes._count_cores() == 4


def test_a_model_with_a_tokenizer_of_its_own_hands_it_out(tmp_path):
    from clip_rt.deadline import Deadline
    from clip_rt.in_process import InProcessTransport

    repository = tiny_repository.write(tmp_path)
    folder = repository / "tiny_tokenizer_file"
    (folder / "1").mkdir(parents=True)
    content = os.urandom(2**20 + 17)
    (folder / "1/tokenizer.json").write_bytes(content)
    (folder / "config.pbtxt").write_text(
        'backend: "python"\nmax_batch_size: 0\n'
        'input [ { name: "chunk_index" data_type: TYPE_INT32 dims: [ 1 ] } ]\n'
        'output [ { name: "chunk" data_type: TYPE_UINT8 dims: [ -1 ] } ]\n'
    )
    transport = InProcessTransport(Path(repository))
    parts = [
        transport.read_chunk("tiny_tokenizer_file", index, Deadline.after(10.0)) for index in (0, 1)
    ]
    assert b"".join(parts) == content
    with pytest.raises(clip_rt.InferenceError, match="ends before"):
        transport.read_chunk("tiny_tokenizer_file", 2, Deadline.after(10.0))
    transport.close()


@pytest.mark.slow
def test_a_process_may_end_while_a_model_runs():
    # Many distinct images, so that batches are under way from the first answer on.
    program = f"""if True:
        import sys, clip_rt, numpy as np
        images = np.random.default_rng(0).integers(0, 256, (2048, 64, 64, 3), np.uint8)
        client = clip_rt.Client(repository={str(ROOT / "model_repository")!r}, server="in_process")
        parts = client.stream_images(images)
        assert len(next(parts).embeddings)
        sys.exit(7)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (7, "")
