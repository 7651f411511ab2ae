"""A model is updated, and rolled back, under callers who notice nothing but other vectors."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from owners import ROOT, find_processes, find_remains, wait_until
from test_serve import read_url, start_serve  # noqa: F401
from updating import TEXTS, Callers, make_images, make_versions, publish, read_expected

import clip_rt
from clip_rt.__main__ import main

pytestmark = pytest.mark.slow

OTHER_PROCESS = f"""
import sys, pathlib
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import updating, clip_rt
source, versions = sys.argv[1:]
options = dict(repository=source) if "/" in source else dict(url=source)
import numpy as np
loaded = np.load(versions)
names = ("images", "texts", "logits")
expected = [
    updating.Expected(*(loaded[f"{{name}}{{index}}"] for name in names)) for index in (0, 1)
]
with clip_rt.Client(**options) as client:
    callers = updating.Callers(client, expected).start()
    callers.wait_until_seen(0)
    print("begun", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        if line.strip() == "reload":
            print(client.reload(), flush=True)
        if line.strip().startswith("see"):
            callers.wait_until_seen(int(line.split()[1])); print("seen", flush=True)
    callers.stop()
    callers.check()
"""


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    folders = make_versions(tmp_path_factory.mktemp("versions"))
    expected = []
    for folder in folders:
        with clip_rt.Client(repository=folder) as client:
            expected.append(read_expected(client))
    for name in ("images", "texts", "logits"):
        ours, theirs = (getattr(each, name) for each in expected)
        assert np.abs(ours - theirs).max() > 1e-3
    return folders, expected


@pytest.fixture
def saved(versions, tmp_path):
    _, expected = versions
    path = tmp_path / "expected.npz"
    np.savez(path, **{
        f"{name}{index}": getattr(each, name)
        for index, each in enumerate(expected)
        for name in ("images", "texts", "logits")
    })  # fmt: skip
    return path


def count_servers() -> int:
    """Count those of this process, tests before have left one that others share."""
    return len(find_processes("bin/tritonserver", os.getpid()))


@pytest.fixture
def start_caller(start_owner):
    return lambda source, saved: start_owner(OTHER_PROCESS, source, saved)


def test_the_embedded_server_is_updated_and_rolled_back(versions, tmp_path, saved, start_caller):
    (first, second), expected = versions
    before = count_servers()
    repository = tmp_path / "models"
    publish(first, repository)
    with clip_rt.Client(repository=repository) as client:
        callers = Callers(client, expected).start()
        other = start_caller(repository, saved)
        try:
            assert other.read_line() == "begun"
            callers.wait_until_seen(0)
            assert client.reload() is False
            for version, folder in ((1, second), (0, first)):
                publish(folder, repository)
                assert client.reload() is True
                assert other.ask("reload") == "True"
                callers.wait_until_seen(version)
                assert other.ask(f"see {version}") == "seen"
                # The server before has ended: one is left.
                assert wait_until(lambda: count_servers() == before + 1)
        finally:
            callers.stop()
        callers.check()
        other.say("end")
        assert other.process.wait(timeout=30) == 0
    assert wait_until(lambda: not [each for each in find_remains(os.getpid()) if "models" in each])


def test_the_server_of_serve_is_updated_and_rolled_back(
    versions, tmp_path, saved, start_caller, start_serve, capsys  # noqa: F811
):  # fmt: skip
    (first, second), expected = versions
    repository = tmp_path / "models"
    publish(first, repository)
    process = start_serve(repository)
    url = read_url(process)
    port = url.rpartition(":")[2]
    with clip_rt.Client(url) as client:
        callers = Callers(client, expected).start()
        other = start_caller(url, saved)
        try:
            assert other.read_line() == "begun"
            callers.wait_until_seen(0)
            assert main(["reload", "--port", port]) == 0
            assert "nothing new" in capsys.readouterr().out
            for version, folder in ((1, second), (0, first)):
                publish(folder, repository)
                assert main(["reload", "--port", port]) == 0
                assert "serves what its repository holds now" in capsys.readouterr().out
                callers.wait_until_seen(version)
                assert other.ask(f"see {version}") == "seen"
                assert wait_until(lambda: len(find_processes("bin/tritonserver", process.pid)) == 1)
        finally:
            callers.stop()
        callers.check()
        other.say("end")
        assert other.process.wait(timeout=30) == 0
        with pytest.raises(clip_rt.InputError, match="clip_rt reload"):
            client.reload()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert wait_until(lambda: not find_remains(process.pid))
    with pytest.raises(SystemExit, match="1"):
        main(["reload", "--port", port])
    assert re.search("^error: .*serve", capsys.readouterr().err, re.MULTILINE)


def test_what_does_not_load_changes_nothing(versions, tmp_path, start_serve, capsys):  # noqa: F811
    (first, second), expected = versions
    repository = tmp_path / "models"
    publish(first, repository)
    process = start_serve(repository)
    port = read_url(process).rpartition(":")[2]
    with clip_rt.Client(f"127.0.0.1:{port}") as client, clip_rt.Client(
        repository=repository
    ) as own:  # fmt: skip
        np.testing.assert_allclose(own.encode_texts(TEXTS), expected[0].texts, atol=1e-6)
        broken = tmp_path / "broken"
        shutil.copytree(second, broken)
        (broken / "tiny_text" / "2" / "model.onnx").write_bytes(b"no model")
        publish(broken, repository)
        with pytest.raises(SystemExit, match="1"):
            main(["reload", "--port", port])
        said = capsys.readouterr().err
        assert "goes on with what it had" in said
        assert "tiny_text" in said
        with pytest.raises(clip_rt.ServerStartError, match="tiny_text"):
            own.reload()
        for each in (client, own):
            np.testing.assert_allclose(each.encode_texts(TEXTS), expected[0].texts, atol=1e-6)
        # The new server is killed while it loads.
        publish(second, repository)
        told = subprocess.Popen(
            [sys.executable, "-m", "clip_rt", "reload", "--port", port],
            stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        (old,) = find_processes("bin/tritonserver", process.pid)
        assert wait_until(lambda: len(find_processes("bin/tritonserver", process.pid)) == 2, 20.0)
        for pid in find_processes("bin/tritonserver", process.pid):
            if pid != old:
                os.kill(pid, signal.SIGKILL)
        assert "goes on with what it had" in told.communicate(timeout=90)[1]
        assert told.returncode == 1
        np.testing.assert_allclose(client.encode_texts(TEXTS), expected[0].texts, atol=1e-6)
        # Two at once: one takes it, the other finds nothing new.
        outcomes: list[bool] = []
        threads = [threading.Thread(target=lambda: outcomes.append(own.reload())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert sorted(outcomes) == [False, True]
        assert main(["reload", "--port", port]) == 0
        for each in (client, own):
            np.testing.assert_allclose(each.encode_texts(TEXTS), expected[1].texts, atol=1e-6)
    process.kill()
    assert wait_until(lambda: not find_remains(process.pid))


def test_a_call_begun_before_a_reload_ends_on_the_model_it_began_with(versions, tmp_path):
    (first, second), expected = versions
    before = count_servers()
    repository = tmp_path / "models"
    publish(first, repository)
    with clip_rt.Client(repository=repository) as client:
        stream = client.stream_images(image for image in make_images() * 40)
        parts = [next(stream)]
        publish(second, repository)
        assert client.reload()
        np.testing.assert_allclose(client.encode_texts(TEXTS), expected[1].texts, atol=1e-6)
        parts += list(stream)
        rows = np.concatenate([part.embeddings for part in parts])
        np.testing.assert_allclose(rows, np.tile(expected[0].images, (40, 1)), atol=1e-6)
        assert wait_until(lambda: count_servers() == before + 1)


def test_a_client_that_insists_on_weights_takes_no_others(versions, tmp_path):
    (first, second), expected = versions
    repository = tmp_path / "models"
    publish(first, repository)
    with clip_rt.Client(repository=repository, fingerprint="a" * 64) as client:
        client.encode_texts(TEXTS)
        publish(second, repository)
        with pytest.raises(clip_rt.ContractError, match="asked for"):
            client.reload()
        np.testing.assert_allclose(client.encode_texts(TEXTS), expected[0].texts, atol=1e-6)
