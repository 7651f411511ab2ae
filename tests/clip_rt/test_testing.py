"""The fake server: the whole client works against it, and every fault of it arrives as promised."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
from owners import is_listening, wait_until
from PIL import Image

import clip_rt
from clip_rt import testing
from clip_rt.testing import fake_server


def solid(*colour):
    return Image.new("RGB", (40, 30), colour)


@pytest.fixture
def server() -> Iterator[testing.FakeServer]:
    with testing.FakeServer(model="shop-v3", embedding_dim=16, side_px=32) as server:
        yield server


@pytest.fixture
def client(server) -> Iterator[clip_rt.Client]:
    with clip_rt.Client(server.url, timeout_s=10.0) as client:
        yield client


def test_the_client_works_against_it(client):
    images = [solid(index, 0, 0) for index in range(70)]
    embeddings = client.encode_images(images)
    assert embeddings.shape == (70, 16)
    np.testing.assert_array_equal(client.encode_images(images[69]), embeddings[69:])
    scores = client.zero_shot(images[:3], ["cat", "dog"], templates="simple")
    assert scores.probabilities.shape == (3, 2)
    assert client.manifest.model == "shop-v3"


def test_equal_content_has_equal_embeddings_whatever_is_beside_it(client):
    long = "a " * 40
    together = client.encode_texts(["red", long, "blue", "red"])
    np.testing.assert_array_equal(together[[0]], client.encode_texts("red"))
    np.testing.assert_array_equal(together[0], together[3])
    assert abs(together[0] @ together[2]) < 0.9


PROGRAM = """
import clip_rt
from clip_rt import testing
with testing.FakeServer(model="shop-v3", embedding_dim=16, side_px=32) as server:
    print(clip_rt.Client(server.url).encode_texts("red").tobytes().hex())
"""


def test_another_process_gets_the_same_embeddings(client):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == client.encode_texts("red").tobytes().hex()


def test_it_needs_no_test_runner():
    program = "import sys, clip_rt.testing; print('pytest' in sys.modules, 'onnx' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["False", "False"]


def test_what_it_was_taught_wins(server, client):
    server.teach([solid(9, 9, 9), solid(8, 8, 8)], "a photo of a cat.")
    scores = client.zero_shot([solid(8, 8, 8), solid(9, 9, 9)], ["dog", "cat"])
    assert scores.best == ["cat", "cat"]
    assert scores.probabilities[:, 1].min() > 0.99


def test_embeddings_can_be_chosen():
    texts = []

    def embed_text(text):
        texts.append(text)
        return [2.0, 0.0] if "red" in text.split() else [0.0, 2.0]

    server = testing.FakeServer(
        embedding_dim=2,
        side_px=8,
        embed_image=lambda image: [image[..., 0].mean(), image[..., 2].mean()],
        embed_text=embed_text,
    )
    with server, clip_rt.Client(server.url) as client:
        scores = client.zero_shot([solid(200, 0, 0), solid(0, 0, 200)], ["Red", "Blåbär 3"])
    assert scores.best == ["Red", "Blåbär 3"]
    assert sorted(texts) == ["a photo of a blåbär 3 .", "a photo of a red ."]


def test_requests_are_kept_as_they_arrived(server, client):
    client.encode_images([solid(1, 2, 3)] * 40)
    client.encode_texts(["red"])
    images, texts = server.requests[:-1], server.requests[-1]
    assert [(each.tower, each.array.dtype) for each in images] == [("image", np.uint8)] * len(
        images
    )
    assert np.concatenate([each.array for each in images])[0, 0, 0].tolist() == [1, 2, 3]
    assert texts.tower == "text"
    assert texts.array.tolist() == [[49406, 736, 49407]]
    assert "user-agent" in texts.headers
    assert server.num_calls["ModelInfer"] == len(server.requests)


def test_old_requests_are_forgotten_beyond_the_bound(server, client, monkeypatch):
    monkeypatch.setattr(fake_server, "MAX_KEPT_BYTES", 3 * 32 * 32 * 3)
    for index in range(9):
        client.encode_images(solid(index, 0, 0))
    assert [int(each.array[0, 0, 0, 0]) for each in server.requests] == [6, 7, 8]
    assert server.num_calls["ModelInfer"] == 9


STATUSES = {
    clip_rt.ServerUnavailableError: testing.Unavailable(),
    clip_rt.ServerOverloadedError: testing.Overloaded(),
    clip_rt.InferenceError: testing.Rejected(message="not this one"),
    clip_rt.ProtocolError: testing.Status(code="DATA_LOSS", message="its words"),
}


@pytest.mark.parametrize("kind", STATUSES, ids=lambda kind: kind.__name__)
def test_a_status_arrives_as_its_error(server, client, kind):
    fault = STATUSES[kind]
    server.fail_when(lambda request: True, fault)
    with pytest.raises(kind, match=fault.message) as caught:
        client.encode_texts("red", timeout_s=1.0)
    assert type(caught.value) is kind
    server.heal()
    assert client.encode_texts("red").shape == (1, 16)


def test_a_fault_strikes_as_often_as_asked_and_is_overcome(server, client):
    client.encode_texts("red")
    before = server.num_calls["ModelInfer"]
    server.fail_next(testing.Unavailable(), times=2)
    assert client.encode_texts("blue").shape == (1, 16)
    assert server.num_calls["ModelInfer"] == before + 3


def test_a_fault_can_depend_on_the_request(server, client):
    bad = client.encode_images(solid(7, 7, 7))
    server.fail_when(lambda request: (request.array == 7).any(), testing.Rejected())
    with pytest.raises(clip_rt.InferenceError, match="refused on purpose"):
        client.encode_images(solid(7, 7, 7))
    assert client.encode_images(solid(8, 8, 8)).shape == bad.shape


def test_other_methods_fail_too(server, client):
    server.fail_next(testing.Status(code="PERMISSION_DENIED"), method="RepositoryIndex")
    with pytest.raises(clip_rt.ClipRTError, match="on purpose"):
        client.encode_texts("red")
    assert client.encode_texts("red").shape == (1, 16)
    with pytest.raises(clip_rt.InputError, match="ModelInfer"):
        server.fail_next(testing.Hang(), method="Infer")


@pytest.mark.parametrize("damage", get_args(testing.Damage))
def test_a_malformed_answer_is_a_protocol_error(server, client, damage):
    server.fail_next(testing.Malformed(damage))
    with pytest.raises(clip_rt.ProtocolError) as caught:
        client.encode_texts(["red", "blue"])
    assert type(caught.value) is clip_rt.ProtocolError


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_row_that_is_no_direction_is_found(server, client, value):
    # Equal lengths keep the order, so that the second text is the second row.
    server.fail_when(lambda request: len(request.array) > 1, testing.NotFinite(value, row=1))
    with pytest.raises(clip_rt.NonFiniteEmbeddingError) as caught:
        client.encode_images([solid(1, 1, 1), solid(2, 2, 2)])
    assert caught.value.index == 1


def test_late_and_never(server, client):
    client.encode_texts("red")
    server.fail_next(testing.Late(0.3))
    start_s = time.monotonic()
    assert client.encode_texts("red").shape == (1, 16)
    assert 0.3 <= time.monotonic() - start_s < 3.0
    server.fail_next(testing.Hang())
    start_s = time.monotonic()
    with pytest.raises(clip_rt.ServerTimeoutError):
        client.encode_texts("red", timeout_s=0.3)
    assert time.monotonic() - start_s < 1.5
    assert client.encode_texts("red").shape == (1, 16)


def test_a_hanging_call_ends_with_the_server(server, client):
    client.encode_texts("red")
    server.fail_when(lambda request: True, testing.Hang())
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.encode_texts, "red", timeout_s=2.0)
        assert wait_until(lambda: server.num_calls["ModelInfer"] == 2)
        server.close()
        with pytest.raises(clip_rt.ServerError):
            call.result(timeout=5)
    assert wait_until(
        lambda: not [thread for thread in threading.enumerate() if "clip_rt.testing" in thread.name]
    )


def test_it_crashes_and_comes_back_at_the_same_address(server, client):
    url = server.url
    client.encode_texts("red")
    server.fail_next(testing.Crash(back_after_s=0.3))
    assert client.encode_texts("red").shape == (1, 16)
    assert server.url == url
    assert server.num_calls["ModelInfer"] == 3


def test_it_crashes_for_good(server, client):
    client.encode_texts("red")
    server.fail_next(testing.Crash())
    with pytest.raises(clip_rt.ServerUnavailableError):
        client.encode_texts("red", timeout_s=0.5)
    assert wait_until(lambda: not is_listening(server.url))
    server.start()
    assert client.encode_texts("red").shape == (1, 16)


def test_grace_lets_calls_end(server, client):
    client.encode_texts("red")
    server.fail_next(testing.Late(0.3))
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.encode_texts, "red")
        assert wait_until(lambda: server.num_calls["ModelInfer"] == 2)
        server.stop(grace_s=5.0)
        assert call.result(timeout=5).shape == (1, 16)
    assert server.num_calls["ModelInfer"] == 2


def test_other_weights_give_other_embeddings_and_another_fingerprint(server):
    with clip_rt.Client(server.url) as client:
        before, old = client.encode_texts("red"), client.manifest.fingerprint
    new = server.swap_weights()
    assert new != old
    with clip_rt.Client(server.url, fingerprint=new) as client:
        assert abs(before[0] @ client.encode_texts("red")[0]) < 0.9
    with (
        clip_rt.Client(server.url, fingerprint=old) as client,
        pytest.raises(clip_rt.ContractError),
    ):
        client.encode_texts("red")


def test_the_contract_it_shows_is_the_one_it_was_given():
    server = testing.FakeServer(
        embedding_dim=4, side_px=8, max_batch_size=2, text_buckets=(16, 77), logit_scale=7.0
    )
    with server, clip_rt.Client(server.url) as client:
        client.encode_images([solid(index, 0, 0) for index in range(5)])
        client.encode_texts(["red", "so " * 20])
        assert {each.array.shape[1:] for each in server.requests} == {(8, 8, 3), (16,), (77,)}
        assert max(len(each.array) for each in server.requests) == 2
        assert client.manifest.logit_scale == 7.0


@pytest.mark.parametrize(("dim", "side_px"), list(itertools.product((1, 1024), (1, 336))))
def test_any_size_of_model(dim, side_px):
    with (
        testing.FakeServer(embedding_dim=dim, side_px=side_px) as server,
        clip_rt.Client(server.url) as client,
    ):
        assert client.encode_images([solid(1, 2, 3)] * 33).shape == (33, dim)


def test_a_message_over_the_limit_does_not_get_in():
    with (
        testing.FakeServer(side_px=64, embedding_dim=4, max_message_bytes=50_000) as server,
        clip_rt.Client(server.url) as client,
    ):
        assert client.encode_images([solid(1, 2, 3)] * 4).shape == (4, 4)
        # Whether the client splits it is its own affair.
        with contextlib.suppress(clip_rt.InferenceError):
            client.encode_images([solid(index, 2, 3) for index in range(8)])
        assert max(request.array.nbytes for request in server.requests) < 50_000


def test_two_servers_do_not_share_a_port(server):
    with testing.FakeServer() as other:
        assert other.url != server.url
    with pytest.raises(clip_rt.ServerStartError, match="not started"):
        _ = testing.FakeServer().url


def test_a_port_taken_meanwhile_is_an_error(server):
    server.stop()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        taken.listen()
        with pytest.raises(clip_rt.ServerStartError, match="taken"):
            server.start()


def test_it_counts_its_work_as_a_server_does():
    with testing.FakeServer(side_px=8) as server, clip_rt.Client(server.url) as client:
        with clip_rt.measure(server=client) as timings:
            client.encode_images(np.zeros((1, 8, 8, 3), np.uint8))
            client.encode_texts(["red", "green"])
        assert 0 < timings.seconds["server_compute"] < timings.seconds["total"]
