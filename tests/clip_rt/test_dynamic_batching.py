"""Batches of concurrent callers share requests, and each caller gets its own rows and errors."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from owners import wait_until

import clip_rt
from clip_rt import testing
from clip_rt.requests.dynamic_batching import MAX_IN_FLIGHT

SIDE_PX = 8


@pytest.fixture
def fake():
    with testing.FakeServer(embedding_dim=16, side_px=SIDE_PX) as server:
        yield server


@pytest.fixture
def client(fake):
    with clip_rt.Client(fake.url) as client:
        assert client.manifest
        yield client


def squares(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE_PX, SIDE_PX, 3), np.uint8)


def sent(fake, tower="image", since=0):
    return [len(request.array) for request in fake.requests[since:] if request.tower == tower]


def test_one_caller_does_not_wait_for_company(fake, client):
    client.encode_images(squares(1))
    client.encode_images(squares(33, 1))
    assert sorted(sent(fake)) == [1, 1, 32]


def test_what_gathers_while_others_are_under_way_goes_out_together(fake, client):
    images, texts = squares(60), [f"text {index}" for index in range(60)]
    alone = client.encode_images(images), client.encode_texts(texts)
    before = len(fake.requests)
    fake.fail_next(testing.Late(0.5), times=2 * MAX_IN_FLIGHT)
    with ThreadPoolExecutor(120) as pool:
        shots = [pool.submit(client.encode_images, image) for image in images]
        words = [pool.submit(client.encode_texts, text) for text in texts]
        together = [np.concatenate([call.result(60) for call in calls]) for calls in (shots, words)]
    np.testing.assert_array_equal(together, alone)
    for tower in ("image", "text"):
        assert sum(sent(fake, tower, before)) == 60
        assert len(sent(fake, tower, before)) < 20
        assert max(sent(fake, tower, before)) > 8


def test_texts_of_unlike_length_do_not_travel_together(fake, client):
    short, long = "red", "red " * 60
    client.encode_texts([short, long])
    before = len(fake.requests)
    fake.fail_next(testing.Late(0.3), times=MAX_IN_FLIGHT)
    with ThreadPoolExecutor(40) as pool:
        calls = [pool.submit(client.encode_texts, (short, long)[i % 2]) for i in range(40)]
        for call in calls:
            call.result(60)
    widths = {request.array.shape[1] for request in fake.requests[before:]}
    assert widths == {3, 62}


def test_a_refused_neighbour_harms_nobody(fake, client):
    images = squares(40)
    poison = images[7]
    expected = client.encode_images(images)

    def holds_poison(request):
        return any(np.array_equal(row, poison) for row in request.array)

    fake.fail_next(testing.Late(0.2), times=MAX_IN_FLIGHT)
    fake.fail_when(holds_poison, testing.Rejected())
    with ThreadPoolExecutor(40) as pool:
        calls = [pool.submit(client.encode_images, image) for image in images]
        for index, call in enumerate(calls):
            if index == 7:
                with pytest.raises(clip_rt.InferenceError, match="item 0 was refused") as caught:
                    call.result(60)
                assert caught.value.index == 0
            else:
                np.testing.assert_array_equal(call.result(60)[0], expected[index])


def test_a_caller_in_a_hurry_does_not_hurry_the_others(fake, client):
    fake.fail_next(testing.Late(0.4), times=MAX_IN_FLIGHT)
    with ThreadPoolExecutor(30) as pool:
        patient = [pool.submit(client.encode_images, image) for image in squares(20)]
        hasty = [
            pool.submit(client.encode_images, image, timeout_s=0.1) for image in squares(10, 1)
        ]
        assert all(call.result(60).shape == (1, 16) for call in patient)
        outcomes = [call.exception(60) for call in hasty]
    assert any(isinstance(outcome, clip_rt.ServerTimeoutError) for outcome in outcomes)
    assert all(outcome is None or isinstance(outcome, TimeoutError) for outcome in outcomes)


def test_no_place_is_lost_however_calls_end(fake, client):
    with ThreadPoolExecutor(16) as pool:
        for fault in (testing.Rejected(), testing.Unavailable(), testing.Malformed("no bytes")):
            fake.fail_next(fault, times=8)
            calls = [pool.submit(client.encode_images, image) for image in squares(16)]
            for call in calls:
                error = call.exception(60)
                assert error is None or isinstance(error, clip_rt.ServerError)
    fake.heal()
    assert client.encode_images(squares(5)).shape == (5, 16)
    (endpoint,) = client._session.connection.pool.replicas
    assert wait_until(lambda: endpoint.num_in_flight == 0)


def test_a_call_that_was_given_up_is_called_off(fake, client):
    fake.fail_next(testing.Hang())
    with pytest.raises(clip_rt.ServerTimeoutError):
        client.encode_images(squares(1), timeout_s=0.2)
    (endpoint,) = client._session.connection.pool.replicas
    assert wait_until(lambda: endpoint.num_in_flight == 0)


def test_a_request_frees_its_rows_when_it_is_done(fake, client):
    gc.collect()
    gc.disable()
    try:
        client.encode_images(squares(64))
        alive = [
            each
            for each in gc.get_objects()
            if type(each).__module__ == "clip_rt.requests.dynamic_batching"
        ]
        kinds = {type(each).__name__ for each in alive}
        assert kinds == {"DynamicBatcher"}
    finally:
        gc.enable()


def test_sixty_four_threads_get_what_is_theirs(fake, client):
    images = squares(64)
    expected = client.encode_images(images)
    wrong = []

    def work(index):
        for _ in range(10):
            if not np.array_equal(client.encode_images(images[index])[0], expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(64)]
    for thread in threads:
        thread.start()
    end_s = time.monotonic() + 60
    for thread in threads:
        thread.join(max(0.0, end_s - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
