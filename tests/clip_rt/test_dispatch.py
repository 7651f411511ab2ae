"""Passing faults are met with a bounded number of tries, refusals with the rows they are for."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import clip_rt
from clip_rt import testing
from clip_rt.deadline import Cancellation, Deadline, cancellable
from clip_rt.requests.dynamic_batching import MAX_IN_FLIGHT
from clip_rt.requests.retries import RetryBudget, RetryPolicy

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


def holds(*poisons):
    return lambda request: any(
        np.array_equal(row, poison) for row in request.array for poison in poisons
    )


@pytest.mark.parametrize("fault", [testing.Unavailable(), testing.Overloaded()])
def test_a_passing_fault_is_not_felt(fake, client, fault):
    expected = client.encode_images(squares(3))
    fake.fail_next(fault, times=2)
    np.testing.assert_array_equal(client.encode_images(squares(3)), expected)


@pytest.mark.parametrize("fault", [testing.Unavailable(), testing.Overloaded()])
def test_a_fault_that_stays_is_raised_after_a_few_tries(fake, client, fault):
    fake.fail_next(fault, times=99)
    with pytest.raises(clip_rt.ServerError) as caught:
        client.encode_images(squares(1))
    assert caught.value.retryable
    assert fake.num_calls["ModelInfer"] == 1 + RetryPolicy().max_retries


def test_bad_requests_are_never_tried_again(fake, client):
    fake.fail_next(testing.Status(code="FAILED_PRECONDITION"), times=1)
    with pytest.raises(clip_rt.InferenceError, match="on purpose"):
        client.encode_images(squares(8))
    assert fake.num_calls["ModelInfer"] == 1


def test_retries_are_a_tenth_of_the_load_and_a_few(fake, client):
    for index in range(100):
        client.encode_images(squares(1, index))
    fake.fail_when(lambda request: True, testing.Overloaded())
    before = fake.num_calls["ModelInfer"]

    def work(index):
        with pytest.raises(clip_rt.ServerOverloadedError):
            client.encode_images(squares(1, index), timeout_s=3)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    # Without a budget each of the 50 would be sent six times.
    assert 50 / 32 <= fake.num_calls["ModelInfer"] - before <= 50 + 10 + 5


def test_no_retry_goes_past_the_deadline(fake, client):
    fake.fail_when(lambda request: True, testing.Unavailable())
    start_s = time.monotonic()
    with pytest.raises(clip_rt.ServerError):
        client.encode_images(squares(1), timeout_s=0.3)
    assert time.monotonic() - start_s < 1.3


def test_a_server_that_was_there_is_waited_for_until_the_deadline(fake, client):
    client.encode_images(squares(1))
    fake.stop()
    back = threading.Timer(3.0, fake.start)
    back.start()
    assert client.encode_images(squares(2), timeout_s=30).shape == (2, 16)
    back.join(60)
    fake.stop()
    start_s = time.monotonic()
    with pytest.raises(clip_rt.ServerUnavailableError, match=fake.url):
        client.encode_images(squares(1), timeout_s=1)
    assert 0.2 < time.monotonic() - start_s < 2


def test_another_model_that_comes_back_ends_the_call_and_not_the_client(fake, client):
    client.encode_images(squares(1))
    fake.fail_next(testing.Crash(back_after_s=0.2))
    fingerprint = fake.swap_weights()
    with pytest.raises(clip_rt.ContractError, match="replaced during the call") as caught:
        client.encode_images(iter(squares(1)))
    assert caught.value.found == fingerprint
    assert client.encode_images(squares(1)).shape == (1, 16)
    assert client.manifest.fingerprint == fingerprint


def test_a_refused_row_is_found_and_the_others_pass(fake, client):
    images = squares(50)
    expected = client.encode_images(images)
    fake.fail_when(holds(images[3], images[40]), testing.Rejected())
    with pytest.raises(clip_rt.InferenceError, match="item 3 was refused") as caught:
        client.encode_images(images)
    assert caught.value.index == 3
    encoded = client.encode_images(images, on_error="skip")
    others = [index for index in range(50) if index not in (3, 40)]
    np.testing.assert_array_equal(encoded.indices, others)
    np.testing.assert_array_equal(encoded.embeddings, expected[others])
    assert [error.index for error in encoded.failures] == [3, 40]
    assert {type(error) for error in encoded.failures} == {clip_rt.InferenceError}


def test_when_every_row_is_refused_no_row_is_to_blame(fake, client):
    fake.fail_when(lambda request: True, testing.Rejected())
    with pytest.raises(clip_rt.InferenceError, match="refused on purpose") as caught:
        client.encode_images(squares(6))
    assert caught.value.index is None
    assert fake.num_calls["ModelInfer"] == 11
    encoded = client.encode_images(squares(6), on_error="skip")
    assert [error.index for error in encoded.failures] == list(range(6))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_row_that_is_no_direction_is_named_or_left_out(fake, client, value):
    images = squares(5)
    expected = client.encode_images(images)
    fake.fail_when(lambda request: True, testing.NotFinite(value, row=2))
    with pytest.raises(clip_rt.NonFiniteEmbeddingError, match="item 2") as caught:
        client.encode_images(images)
    assert caught.value.index == 2
    encoded = client.encode_images(images, on_error="skip")
    np.testing.assert_array_equal(encoded.embeddings, expected[[0, 1, 3, 4]])
    assert [error.index for error in encoded.failures] == [2]


def test_a_message_that_is_too_long_is_cut_once_and_for_all():
    with (
        testing.FakeServer(embedding_dim=16, side_px=64, max_message_bytes=100_000) as fake,
        clip_rt.Client(fake.url) as client,
    ):
        images = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8)
        assert client.encode_images(images).shape == (64, 16)
        assert max(len(request.array) for request in fake.requests) == 8
        before = len(fake.requests)
        client.encode_images(images)
        assert [len(request.array) for request in fake.requests[before:]] == [8] * 8
    with (
        testing.FakeServer(embedding_dim=16, side_px=64, max_message_bytes=9_000) as fake,
        clip_rt.Client(fake.url) as client,
        pytest.raises(clip_rt.MessageTooLongError),
    ):
        client.encode_images(images[:2])


def test_failures_of_all_kinds_keep_the_order_of_the_items(fake, client):
    images = list(squares(40))
    expected = client.encode_images(images)
    fake.fail_when(holds(images[10]), testing.Rejected())
    mixed = [images[0], b"no image", images[10], images[11], None, images[0], images[39]]
    encoded = client.encode_images(mixed, on_error="skip")
    np.testing.assert_array_equal(encoded.indices, [0, 3, 5, 6])
    np.testing.assert_array_equal(encoded.embeddings, expected[[0, 11, 0, 39]])
    assert [(type(error).__name__, error.index) for error in encoded.failures] == [
        ("ImageError", 1),
        ("InferenceError", 2),
        ("ImageError", 4),
    ]
    texts = client.encode_texts(["red", "", "green " * 99, "red"], on_error="skip")
    np.testing.assert_array_equal(texts.indices, [0, 3])
    np.testing.assert_array_equal(texts.embeddings, client.encode_texts(["red", "red"]))
    assert [error.index for error in texts.failures] == [1, 2]
    nothing = client.encode_images([b"", b"x"], on_error="skip")
    assert (nothing.embeddings.shape, len(nothing.failures)) == ((0, 16), 2)
    scores = client.zero_shot(mixed, ["a", "b"], on_error="skip")
    assert scores.probabilities.shape == (4, 2)
    np.testing.assert_array_equal(scores.indices, encoded.indices)
    assert [error.index for error in scores.failures] == [1, 2, 4]


def test_equal_images_are_sent_once(fake, client):
    images = squares(3)
    many = np.concatenate([images] * 40)
    np.testing.assert_array_equal(client.encode_images(many)[3:6], client.encode_images(images))
    assert [len(request.array) for request in fake.requests] == [3, 3]


def test_a_stream_hands_out_parts_as_they_come_and_reads_no_further_than_it_must(fake, client):
    images, taken = squares(640), []

    def generate():
        for index, image in enumerate(images):
            taken.append(index)
            yield image if index not in (5, 639) else b"broken"

    parts = client.stream_images(generate(), on_error="skip")
    first = next(parts)
    assert len(taken) < (MAX_IN_FLIGHT + 3) * 32
    rest = list(parts)
    everything = [first, *rest]
    indices = np.concatenate([part.indices for part in everything])
    np.testing.assert_array_equal(indices, [i for i in range(640) if i not in (5, 639)])
    failed = [error.index for part in everything for error in part.failures]
    assert failed == [5, 639]
    embeddings = np.concatenate([part.embeddings for part in everything])
    np.testing.assert_array_equal(embeddings[:32], client.encode_images(images[indices[:32]]))
    with pytest.raises(clip_rt.ImageError, match="image 3"):
        list(client.stream_images([*images[:3], b"broken"]))


def test_an_abandoned_stream_gives_up_what_is_under_way(fake, client):
    parts = client.stream_images(iter(squares(640)))
    next(parts)
    parts.close()
    (endpoint,) = client._session.connection.pool.replicas
    end_s = time.monotonic() + 10
    while endpoint.num_in_flight and time.monotonic() < end_s:
        time.sleep(0.01)
    assert endpoint.num_in_flight == 0
    assert client.encode_images(squares(1)).shape == (1, 16)


def test_on_error_is_one_of_two(client):
    with pytest.raises(clip_rt.InputError, match="'raise' or 'skip'"):
        client.encode_images([], on_error="ignore")


def test_a_budget_refills_with_what_is_sent():
    budget = RetryBudget(share=0.1, reserve=2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(11):
        budget.earn()
    assert [budget.spend() for _ in range(2)] == [True, False]
    for _ in range(1000):
        budget.earn()
    assert [budget.spend() for _ in range(3)] == [True, True, False]


def test_a_pause_that_ends_too_late_leaves_the_failure_before_it(monkeypatch):
    """A busy machine wakes a thread late; then there is no time for another try."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda pause_s: sleep(pause_s + 0.4))
    tries = []

    def attempt():
        tries.append(time.monotonic())
        raise clip_rt.ServerUnavailableError("nobody is there")

    with pytest.raises(clip_rt.ServerUnavailableError, match="nobody"):
        RetryPolicy(first_pause_s=0.01).call(attempt, Deadline.after(0.3))
    assert len(tries) == 1


def test_another_server_is_tried_however_short_the_time():
    tries = []

    def attempt():
        tries.append(time.monotonic())
        if len(tries) == 1:
            raise clip_rt.ServerUnavailableError("nobody is there")
        return "answer"

    policy = RetryPolicy(first_pause_s=0.01)
    with pytest.raises(clip_rt.ServerUnavailableError, match="nobody"):
        policy.call(attempt, Deadline.after(0.04))
    tries.clear()
    found = policy.call(attempt, Deadline.after(0.04), is_other_ready=lambda _: True)
    assert found == "answer"


def test_pauses_double_within_a_bound_and_differ():
    policy = RetryPolicy(first_pause_s=0.1, max_pause_s=1.0)
    for num_failures, most_s in ((1, 0.1), (2, 0.2), (3, 0.4), (9, 1.0), (10_000, 1.0)):
        pauses = {policy.pause_s(num_failures) for _ in range(50)}
        assert len(pauses) > 10
        assert all(most_s / 2 <= pause_s <= most_s for pause_s in pauses)


def test_a_deadline_that_is_called_off_has_no_time_left():
    cancellation, woken = Cancellation(), []
    with cancellable(cancellation):
        deadline = Deadline.after(60)
    assert deadline.remaining_s() > 50
    with deadline.waking(lambda: woken.append(1)):
        cancellation.cancel()
    assert (woken, deadline.remaining_s()) == ([1], 0.0)
    assert Deadline.after(60).remaining_s() > 50


def test_reading_the_items_is_part_of_the_call(fake, client):
    def slow():
        for image in squares(1000):
            time.sleep(0.01)
            yield image

    start_s = time.monotonic()
    with pytest.raises(clip_rt.ServerTimeoutError, match="read and prepared"):
        client.encode_images(slow(), timeout_s=0.2)
    with pytest.raises(clip_rt.ServerTimeoutError, match="read and prepared"):
        client.encode_texts((time.sleep(0.01) or "red" for _ in range(1000)), timeout_s=0.2)
    assert time.monotonic() - start_s < 2.4


def test_a_stream_of_equal_or_unusable_images_goes_on_too(fake, client):
    image = squares(1)[0]
    taken = []

    def endless(item):
        while True:
            taken.append(1)
            yield item

    parts = client.stream_images(endless(image), on_error="skip")
    first = next(parts)
    assert len(first.indices) == 1024
    assert (first.embeddings == first.embeddings[0]).all()
    parts.close()
    parts = client.stream_images(endless(b"broken"), on_error="skip")
    assert [len(part.failures) for part in (next(parts), next(parts))] == [1024, 1024]
    parts.close()
    assert len(taken) < 14 * 1024


def test_a_slow_consumer_does_not_use_up_the_time_of_a_retry(fake, client):
    parts = client.stream_images(squares(320), timeout_s=0.5)
    next(parts)
    fake.fail_next(testing.Unavailable(), times=2)
    time.sleep(0.6)
    assert sum(len(part.indices) for part in parts) == 288


def test_a_message_limit_is_held_against_what_was_sent_together():
    with (
        testing.FakeServer(embedding_dim=16, side_px=64, max_message_bytes=250_000) as fake,
        clip_rt.Client(fake.url) as client,
        ThreadPoolExecutor(40) as pool,
    ):
        images = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8)
        client.encode_images(images[:1])
        fake.fail_next(testing.Late(0.3), times=MAX_IN_FLIGHT)
        list(pool.map(client.encode_images, images))
        assert client._session.connection._model.image.max_rows >= 8
