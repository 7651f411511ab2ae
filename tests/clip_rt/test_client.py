"""The public client against the real Triton: what it answers, and what it survives."""

from __future__ import annotations

import io
import math
import os
import pickle
import signal
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_repository
from owners import (
    find_processes,
    find_remains,
    find_server,
    is_listening,
    read_command,
    wait_until,
)
from PIL import Image
from stopping import stopped

import clip_rt
from clip_rt import client as client_module
from clip_rt.embedded.server import EmbeddedServer
from clip_rt.requests.dynamic_batching import MAX_IN_FLIGHT
from clip_rt.requests.replica import HEALTH_CHECK_AFTER_S

COLOURS = {"red": (250, 5, 5), "green": (5, 250, 5), "blue": (5, 5, 250)}


def solid(colour, size=(80, 70)):
    return Image.new("RGB", size, colour)


def encode(image, kind="PNG"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def shade(index):
    """Make an image of its own for each index below 16 million."""
    return solid((index % 256, index // 256 % 256, index // 65536), (64, 64))


def list_own(server: EmbeddedServer, pattern: str) -> list[int]:
    own = server.server_id.removeprefix("clip_rt-")
    return [pid for pid in find_processes(pattern, os.getpid()) if own in read_command(pid)]


def test_zero_shot_tells_colours_apart_whatever_the_image_comes_as(client, tmp_path):
    path = tmp_path / "blue.png"
    solid(COLOURS["blue"]).save(path)
    images = [
        solid(COLOURS["red"]),
        path,
        encode(solid(COLOURS["green"]), "JPEG"),
        np.full((70, 90, 3), COLOURS["red"], np.uint8),
        str(path),
    ]
    scores = client.zero_shot(images, list(COLOURS))
    assert scores.best == ["red", "blue", "green", "red", "blue"]
    assert scores.labels == ("red", "green", "blue")
    np.testing.assert_allclose(scores.probabilities.sum(axis=1), 1, atol=1e-6)
    assert [row[0][0] for row in scores.top(1)] == scores.best
    assert scores.probabilities.max(axis=1).min() > 0.99


def test_logits_are_the_scaled_cosines_of_the_embeddings(client):
    images = [shade(index) for index in range(5)]
    scores = client.zero_shot(images, ["red", "a blue thing"], templates=["{}", "the {}"])
    cosine = (
        client.encode_images(images)
        @ client.class_embeddings(["red", "a blue thing"], templates=["{}", "the {}"]).T
    )
    np.testing.assert_allclose(scores.logits, client.manifest.logit_scale * cosine, atol=1e-4)


def test_class_embeddings_are_the_pooled_prompts(client):
    texts = client.encode_texts(["a red.", "one red", "a sea.", "one sea"]).reshape(2, 2, -1)
    mean = texts.mean(axis=1)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    found = client.class_embeddings(["red", "sea"], templates=["a {}.", "one {}"])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_thousand_images_stream_through_a_little_memory(client):
    client.encode_images(shade(0))
    count, ahead, alive = 1000, [], []

    def images():
        for index in range(count):
            ahead.append(index)
            alive.append(1)
            yield shade(index)

    tracemalloc.start()
    embeddings = client.encode_images(images())
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert embeddings.shape == (count, 8)
    # All of them are 12 MB once prepared, and three times that with the copies made to send them.
    in_flight_bytes = (MAX_IN_FLIGHT + 1) * 32 * 64 * 64 * 3
    assert peak_bytes < 3 * in_flight_bytes + 2**20
    some = [0, 31, 32, 500, 999]
    np.testing.assert_allclose(
        embeddings[some], client.encode_images([shade(index) for index in some]), atol=1e-6
    )


def test_texts_keep_their_order_whatever_their_length(client):
    texts = [f"{'so ' * (index * 7 % 40)}number {index}" for index in range(70)]
    texts += texts[:5]
    embeddings = client.encode_texts(iter(texts))
    assert embeddings.shape == (75, 8)
    alone = np.concatenate([client.encode_texts([text]) for text in texts[::10]])
    np.testing.assert_allclose(embeddings[::10], alone, atol=1e-6)
    np.testing.assert_array_equal(embeddings[:5], embeddings[70:])


def test_empty_in_gives_empty_out(client):
    assert client.encode_images([]).shape == client.encode_texts([]).shape == (0, 8)
    assert client.class_embeddings([]).shape == (0, 8)
    scores = client.zero_shot(iter([]), ["red"])
    assert (scores.probabilities.shape, scores.best) == ((0, 1), [])
    with pytest.raises(clip_rt.InputError, match="labels is empty"):
        client.zero_shot([solid((1, 2, 3))], [])


def test_one_image_or_text_is_a_batch_of_one(client):
    assert client.encode_images(solid((1, 2, 3))).shape == (1, 8)
    assert client.encode_texts("a cat").shape == (1, 8)


def test_a_corrupt_image_is_named_by_its_index(client):
    good = encode(solid((1, 2, 3)))
    with pytest.raises(clip_rt.ImageError, match="image 40") as caught:
        client.zero_shot([good] * 40 + [good[: len(good) // 2]] + [good] * 40, ["red"])
    assert caught.value.index == 40
    assert client.encode_images([good]).shape == (1, 8)


def test_bad_labels_are_named_by_their_index(client):
    for labels, index in ((["red", " "], 1), (["red", "blue", 7], 2)):
        with pytest.raises(clip_rt.TextError, match=f"label {index}") as caught:
            client.zero_shot([], labels)
        assert caught.value.index == index
    with pytest.raises(clip_rt.TextTooLongError, match="label 1 ") as caught:
        client.class_embeddings(["red", "so " * 90])
    assert (caught.value.index, caught.value.context_length) == (1, 77)
    with pytest.raises(clip_rt.TextError, match="list of strings"):
        client.zero_shot([], "red")
    with pytest.raises(clip_rt.TemplateError):
        client.zero_shot([], ["red"], templates=["no slot"])


def test_a_long_text_is_refused_or_cut_as_asked(client):
    with pytest.raises(clip_rt.TextTooLongError) as caught:
        client.encode_texts(["red", "so " * 90])
    assert caught.value.index == 1
    assert client.encode_texts(["red", "so " * 90], truncate=True).shape == (2, 8)


def test_known_labels_are_not_encoded_again(server, monkeypatch):
    with clip_rt.Client(server.url, model="tiny") as client:
        first = client.class_embeddings(["red", "sea", "red"])
        sent = []
        encode_text = client_module.tokenizer.encode_text
        monkeypatch.setattr(
            client_module.tokenizer,
            "encode_text",
            lambda text, **o: sent.append(text) or encode_text(text, **o),
        )
        again = client.class_embeddings(["sea", "tree", "red"])
        assert sent == ["a photo of a tree."]
        np.testing.assert_array_equal(again[[2, 0]], first[:2])
        client.class_embeddings(["sea"], templates=["{}"])
        assert sent[1:] == ["sea"]
    with clip_rt.Client(server.url, model="tiny", cache_bytes=0) as client:
        client.class_embeddings(["red"])
        del sent[:]
        np.testing.assert_allclose(client.class_embeddings(["red"]), first[:1], atol=1e-6)
        assert sent == ["a photo of a red."]


def test_making_a_client_does_no_io(tmp_path):
    clip_rt.Client("192.0.2.1:8001")
    clip_rt.Client(repository=tmp_path / "missing")


def test_arguments_that_cannot_be_used_are_refused_at_once(tmp_path):
    for arguments in (
        {"url": "http://localhost:8000"},
        {"url": "localhost:8001", "repository": tmp_path},
        {"timeout_s": 0},
        {"timeout_s": math.nan},
        {"model": "///"},
    ):
        with pytest.raises(clip_rt.InputError):
            clip_rt.Client(**arguments)


def test_the_environment_names_a_server_or_a_repository(server, monkeypatch, tmp_path):
    monkeypatch.setenv("CLIP_RT_URL", server.url)
    with clip_rt.Client(model="tiny") as client:
        assert client.manifest == tiny_repository.MANIFEST
    with (
        clip_rt.Client(repository=tmp_path) as client,
        pytest.raises(clip_rt.ServerStartError, match=str(tmp_path)),
    ):
        client.encode_texts(["red"])
    monkeypatch.delenv("CLIP_RT_URL")
    monkeypatch.setenv("CLIP_RT_REPOSITORY", str(tmp_path / "other"))
    with clip_rt.Client() as client, pytest.raises(clip_rt.ServerStartError, match="other"):
        client.encode_texts(["red"])


def test_an_unreachable_server_is_a_typed_error_in_time():
    with clip_rt.Client("127.0.0.1:9", model="tiny", timeout_s=1.0) as client:
        start_s = time.monotonic()
        with pytest.raises(clip_rt.ServerUnavailableError, match=r"127\.0\.0\.1:9"):
            client.zero_shot([solid((1, 2, 3))], ["red"])
        assert time.monotonic() - start_s < 2.0


def test_a_server_that_does_not_list_its_models_needs_a_name(server):
    with (
        clip_rt.Client(server.url) as client,
        pytest.raises(clip_rt.UnknownModelError, match=r"Name one with model="),
    ):
        client.encode_texts(["red"])
    with (
        clip_rt.Client(server.url, model="ViT-B/32") as client,
        pytest.raises(clip_rt.UnknownModelError, match="vit_b_32_image"),
    ):
        client.encode_texts(["red"])


@pytest.mark.slow
def test_of_several_models_one_must_be_named_and_each_must_keep_the_contract(tmp_path):
    tiny_repository.write(tmp_path, "tiny")
    tiny_repository.write(tmp_path, "Mixed/2", text={"fingerprint": "b" * 64})
    tiny_repository.write(tmp_path, "wide", image={"side_px": 96}, text={"side_px": 96})
    with clip_rt.Client(repository=tmp_path) as client:
        with pytest.raises(clip_rt.UnknownModelError, match="mixed_2, tiny, wide") as unknown:
            client.encode_texts(["red"])
        assert unknown.value.known == ("mixed_2", "tiny", "wide")
        with (
            clip_rt.Client(repository=tmp_path, model="other") as other,
            pytest.raises(clip_rt.UnknownModelError, match="it serves mixed_2, tiny, wide"),
        ):
            other.encode_texts(["red"])
        with clip_rt.Client(repository=tmp_path, model="Mixed/2") as mixed:
            with pytest.raises(clip_rt.ContractError) as contract:
                mixed.encode_texts(["red"])
            assert "a" * 64 in str(contract.value)
            assert "b" * 64 in str(contract.value)
        with (
            clip_rt.Client(repository=tmp_path, model="wide") as wide,
            pytest.raises(clip_rt.ContractError, match=r"96, 96, 3.*64, 64, 3"),
        ):
            wide.encode_texts(["red"])
        with clip_rt.Client(repository=tmp_path, model="tiny") as tiny:
            assert tiny.encode_texts(["red"]).shape == (1, 8)


def test_other_weights_than_asked_for_are_refused_with_both_sides(server):
    with clip_rt.Client(server.url, model="tiny", fingerprint="c" * 64) as client:
        with pytest.raises(clip_rt.ContractError) as caught:
            client.encode_texts(["red"])
        assert (caught.value.expected, caught.value.found) == ("c" * 64, "a" * 64)
    with clip_rt.Client(server.url, model="tiny", fingerprint="a" * 64) as client:
        assert client.encode_texts(["red"]).shape == (1, 8)


@pytest.mark.slow
def test_other_weights_after_a_restart_are_noticed_and_old_vectors_not_used(tmp_path):
    tiny_repository.write(tmp_path)
    with clip_rt.Client(repository=tmp_path) as client:
        client.class_embeddings(["red"])
        held = find_server(client)
        for name in ("tiny_image", "tiny_text"):
            config = tmp_path / name / "config.pbtxt"
            config.write_text(config.read_text().replace("a" * 64, "b" * 64))
        held.stop()
        held.start()
        client.class_embeddings(["red"])
        assert client.manifest == replace(tiny_repository.MANIFEST, fingerprint="b" * 64)
        assert (client.cache.hits, client.cache.misses) == (0, 2)


@pytest.mark.slow
def test_a_stopped_server_times_out_at_the_deadline_and_works_again(tmp_path):
    repository = tiny_repository.write(tmp_path)
    with clip_rt.Client(repository=repository, timeout_s=1.0) as client:
        before = client.encode_images(solid((1, 2, 3)), timeout_s=30)
        server = find_server(client)
        (pid,) = list_own(server, "bin/tritonserver")
        stopped_id = server.server_id
        with stopped(pid):
            start_s = time.monotonic()
            with pytest.raises(clip_rt.ServerTimeoutError):
                client.encode_images(solid((1, 2, 3)))
            assert 0.9 < time.monotonic() - start_s < 2.0
            assert server.server_id == stopped_id
        np.testing.assert_array_equal(client.encode_images(solid((1, 2, 3)), timeout_s=30), before)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["bin/tritonserver", "triton_python_backend_stub"])
def test_a_killed_server_comes_back_within_the_call(tmp_path, victim):
    repository = tiny_repository.write(tmp_path)  # its own: others share the session's server
    with clip_rt.Client(repository=repository, timeout_s=60.0) as client:
        before = client.encode_images([shade(index) for index in range(200)])
        server = find_server(client)

        def images():
            for index in range(200):
                if index == 100:
                    os.kill(list_own(server, victim)[0], signal.SIGKILL)
                yield shade(index)

        np.testing.assert_allclose(client.encode_images(images()), before, atol=1e-6)


@pytest.mark.slow
def test_a_server_killed_between_two_calls_comes_back_before_anyone_noticed(tmp_path):
    repository = tiny_repository.write(tmp_path)
    with clip_rt.Client(repository=repository) as client:
        before = client.encode_images(shade(1))
        (pid,) = list_own(find_server(client), "bin/tritonserver")
        time.sleep(1.1 * HEALTH_CHECK_AFTER_S)  # The next call asks for the model first.
        os.kill(pid, signal.SIGKILL)
        np.testing.assert_array_equal(client.encode_images(shade(1)), before)


def test_sixteen_threads_share_a_client(client):
    images = [shade(index * 1000) for index in range(16)]
    labels = [f"thing {index}" for index in range(16)]
    expected = [client.zero_shot([image], labels).logits for image in images]
    barrier = threading.Barrier(16, timeout=60)

    def work(index):
        barrier.wait()
        for _ in range(5):
            found = client.zero_shot([images[index]], labels).logits
            np.testing.assert_allclose(found, expected[index], atol=1e-4)
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))


def test_a_pickled_client_carries_its_configuration_only(server):
    with clip_rt.Client(server.url, model="tiny", timeout_s=12.0, exif=False) as client:
        before = client.encode_texts(["red"])
        pickled = pickle.dumps(client)
        assert len(pickled) < 1000
    with pickle.loads(pickled) as copy:
        np.testing.assert_allclose(copy.encode_texts(["red"]), before, atol=1e-6)
        assert repr(copy) == repr(client)


def test_a_closed_client_says_so(server):
    client = clip_rt.Client(server.url, model="tiny")
    client.encode_texts(["red"])
    client.close()
    client.close()
    with pytest.raises(clip_rt.ClientClosedError):
        client.encode_texts(["red"])


@pytest.mark.slow
def test_clients_of_one_repository_share_a_server_until_the_last_closes(bare_repository, tmp_path):
    tiny_repository.write(tmp_path)
    first, second = clip_rt.Client(repository=tmp_path), clip_rt.Client(repository=tmp_path)
    first.encode_texts(["red"])
    second.encode_texts(["red"])
    url = find_server(first).url
    first.close()
    assert second.encode_texts(["red"]).shape == (1, 8)
    del second
    assert wait_until(lambda: not is_listening(url))


FORKS = """
import os, sys, threading
import numpy as np
import clip_rt
client = clip_rt.Client(repository=sys.argv[1])
before = client.encode_texts(["red", "blue"])
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        same = np.allclose(client.encode_texts(["red", "blue"]), before)
        same = same and client.class_embeddings(["red"]).shape == (1, 8)
        os._exit(0 if same else 1)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
after = client.encode_texts(["red", "blue"])
print(codes, np.allclose(after, before), flush=True)
client.close()
"""


@pytest.mark.slow
def test_a_forked_child_opens_its_own_connection(start_owner, tmp_path):
    repository = tiny_repository.write(tmp_path)  # its own: others share the session's server
    owner = start_owner(FORKS, repository)
    assert owner.read_line() == "[0, 0, 0] True"
    assert owner.process.wait(timeout=10) == 0
    assert wait_until(lambda: not owner.find_remains())


ENDLESS = """
import itertools, sys
import clip_rt
from PIL import Image
with clip_rt.Client(repository=sys.argv[1], timeout_s=600) as client:
    client.encode_texts(["red"])
    def images():
        for index in itertools.count():
            if index == 200:
                print("running", flush=True)
            yield Image.new("RGB", (64, 64), (index % 256, 0, 0))
    client.zero_shot(images(), ["red", "blue"])
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_call_at_once_and_leaves_nothing(start_owner, tmp_path):
    repository = tiny_repository.write(tmp_path)  # its own: others share the session's server
    owner = start_owner(ENDLESS, repository)
    assert owner.read_line() == "running"
    os.killpg(owner.pid, signal.SIGINT)
    assert owner.process.wait(timeout=5) == -signal.SIGINT
    assert wait_until(lambda: not owner.find_remains())


@pytest.mark.slow
def test_ctrl_c_ends_a_call_that_waits_for_a_stopped_server(start_owner, tmp_path):
    repository = tiny_repository.write(tmp_path)  # its own: others share the session's server
    owner = start_owner(ENDLESS, repository)
    assert owner.read_line() == "running"
    (pid,) = find_processes("bin/tritonserver", owner.pid)
    with stopped(pid):
        time.sleep(0.5)  # Until nothing is under way but what the server will not answer.
        os.killpg(owner.pid, signal.SIGINT)
        assert owner.process.wait(timeout=5) == -signal.SIGINT
        assert wait_until(lambda: not owner.find_remains())


LEAVES = """
import sys
import clip_rt
client = clip_rt.Client(repository=sys.argv[1])
print(client.encode_texts(["red"]).shape, flush=True)
raise RuntimeError("on purpose")
"""


@pytest.mark.slow
def test_a_client_that_is_never_closed_leaves_nothing(start_owner, tmp_path):
    repository = tiny_repository.write(tmp_path)  # its own: others share the session's server
    owner = start_owner(LEAVES, repository)
    assert owner.read_line() == "(1, 8)"
    assert owner.process.wait(timeout=10) == 1
    assert wait_until(lambda: not owner.find_remains())
    assert not find_remains(owner.pid)
    assert Path(repository).is_dir()
