"""Several servers are one to the caller: spread over, left out while away, and never mixed up."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from owners import wait_until

import clip_rt
from clip_rt import testing
from clip_rt.requests.connection import Connection
from clip_rt.requests.replica import HEALTH_CHECK_AFTER_S

SIDE_PX = 8


def make(**options):
    return testing.FakeServer(model="shop", embedding_dim=16, side_px=SIDE_PX, **options)


@pytest.fixture
def pair():
    with make() as one, make() as two:
        yield one, two


@pytest.fixture
def client(pair):
    with clip_rt.Client([server.url for server in pair]) as client:
        yield client


def squares(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE_PX, SIDE_PX, 3), np.uint8)


def served(servers):
    return [server.num_calls["ModelInfer"] for server in servers]


def test_calls_are_spread_over_the_servers(pair, client):
    for index in range(20):
        client.encode_images(squares(1, index))
    assert served(pair) == [10, 10]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda index: client.encode_images(squares(40, index)), range(16)))
    one, two = served(pair)
    assert min(one, two) > 12


def test_addresses_may_come_from_the_environment(pair, monkeypatch):
    monkeypatch.setenv("CLIP_RT_URL", ", ".join(server.url for server in pair))
    with clip_rt.Client() as client:
        for index in range(4):
            client.encode_images(squares(1, index))
    assert served(pair) == [2, 2]


@pytest.mark.parametrize("urls", [[], "a:1,a:1", ["a:1", "nonsense"], ","])
def test_addresses_that_cannot_be_used_are_refused_at_once(urls):
    with pytest.raises(clip_rt.InputError):
        clip_rt.Client(urls)


def test_nothing_is_lost_when_one_dies_under_load_and_comes_back(pair, client):
    one, two = pair
    images = squares(8)
    expected = client.encode_images(images)
    ended, wrong, errors = threading.Event(), [], []

    def work():
        while not ended.is_set():
            try:
                if not np.array_equal(client.encode_images(images, timeout_s=10), expected):
                    wrong.append(1)
            except clip_rt.ClipRTError as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for server in (one, two, one):
        before = served(pair)
        assert wait_until(lambda before=before: served(pair) > [n + 20 for n in before])
        server.stop()
        time.sleep(0.2)
        server.start()
        again = server.num_calls["ModelInfer"]
        assert wait_until(
            lambda again=again, server=server: server.num_calls["ModelInfer"] > again + 20
        )
    ended.set()
    for thread in threads:
        thread.join(20)
    assert (wrong, errors) == ([], [])


def test_a_silent_server_is_given_up_for_another_within_the_call(pair, client):
    client.encode_images(squares(1))
    one, _ = pair
    one.fail_when(lambda request: True, testing.Hang())
    start_s = time.monotonic()
    for index in range(2):
        assert client.encode_images(squares(1, index), timeout_s=2).shape == (1, 16)
    assert time.monotonic() - start_s < 3


def test_a_server_that_is_away_at_the_start_is_taken_in_later(pair):
    _, two = pair
    two.stop()
    with clip_rt.Client([server.url for server in pair]) as client:
        client.encode_images(squares(1))
        two.start()
        assert wait_until(lambda: client.encode_images(squares(1)).size and served(pair)[1] > 0)


def test_servers_of_other_weights_are_never_mixed(pair, client, caplog):
    one, two = pair
    two.swap_weights()
    with pytest.raises(clip_rt.ContractError, match="different models") as caught:
        client.encode_images(squares(1))
    assert caught.value.expected["fingerprint"] == one.manifest.fingerprint
    assert caught.value.found["fingerprint"] == two.manifest.fingerprint
    one.swap_weights()
    client.encode_images(squares(1))
    one.swap_weights()
    # A fleet in the middle of an upgrade: those with the weights in use go on alone.
    time.sleep(HEALTH_CHECK_AFTER_S + 0.1)
    before = served(pair)
    for index in range(6):
        client.encode_images(squares(1, index))
    assert served(pair) == [before[0], before[1] + 6]
    assert "left out" in caplog.text
    two.stop()
    with contextlib.suppress(clip_rt.ContractError):
        client.encode_images(squares(1))
    assert client.encode_images(squares(1)).shape == (1, 16)
    assert client.manifest.fingerprint == one.manifest.fingerprint


def test_a_broken_replica_is_made_up_for_by_another(pair, client):
    one, _ = pair
    expected = client.encode_images(squares(4))
    one.fail_when(lambda request: True, testing.NotFinite(row=1))
    for _ in range(6):
        np.testing.assert_array_equal(client.encode_images(squares(4)), expected)


def test_when_all_are_away_the_error_names_each(pair):
    for server in pair:
        server.stop()
    with (
        clip_rt.Client([server.url for server in pair], model="shop") as client,
        pytest.raises(clip_rt.ServerUnavailableError) as caught,
    ):
        client.encode_images(squares(1), timeout_s=5)
    assert all(server.url in str(caught.value) for server in pair)


def test_headers_go_to_every_server_and_are_shown_nowhere(pair):
    headers = {"authorization": "Bearer s3cret"}
    with clip_rt.Client([server.url for server in pair], headers=headers) as client:
        for index in range(4):
            client.encode_images(squares(1, index))
        assert "s3cret" not in repr(client)
    for server in pair:
        assert {each.headers["authorization"] for each in server.requests} == {"Bearer s3cret"}
    with pytest.raises(clip_rt.InputError, match="lower-case") as caught:
        clip_rt.Client(headers={"Bad Name": "s3cret"})
    assert "s3cret" not in str(caught.value)


def test_what_the_servers_spent_is_summed(server, repository):
    with clip_rt.Client(repository=repository) as client:
        before = client.server_seconds()
        with clip_rt.measure(server=client) as timings:
            client.encode_images(np.zeros((4, 64, 64, 3), np.uint8))
            # It counts a request a moment after it has answered it.
            assert wait_until(
                lambda: client.server_seconds()["server_compute"] > before["server_compute"]
            )
    assert 0 < timings.seconds["server_compute"] < timings.seconds["total"]
    assert {"queue", "network"} <= timings.seconds.keys()


def test_weights_one_insists_on_are_never_others_not_even_after_a_swap(pair):
    one, _ = pair
    pinned = one.manifest.fingerprint
    with clip_rt.Client(one.url, fingerprint=pinned) as client:
        client.encode_images(squares(1))
        one.fail_next(testing.Crash(back_after_s=0.2))
        one.swap_weights()
        for _ in range(3):
            with pytest.raises(clip_rt.ContractError):
                client.encode_images(squares(1))


def test_a_server_that_is_replaced_in_a_moment_is_noticed_within_a_call(pair):
    one, _ = pair
    with clip_rt.Client(one.url) as client:
        client.encode_images(squares(1))
        (endpoint,) = client._session.connection.pool.replicas

        def images():
            for index in range(400):
                if index == 320:
                    assert wait_until(lambda: endpoint.num_in_flight == 0)
                    one.stop()
                    one.swap_weights()
                    one.start()
                yield squares(1, index)[0]

        with pytest.raises(clip_rt.ContractError, match="replaced during the call"):
            client.encode_images(images())


def test_a_silent_first_server_leaves_time_for_the_others_to_name_the_model(pair):
    one, _ = pair
    one.fail_next(testing.Hang(), method="RepositoryIndex")
    one.fail_next(testing.Hang(), method="ModelConfig", times=4)
    with clip_rt.Client([server.url for server in pair], timeout_s=4) as client:
        assert client.encode_images(squares(1)).shape == (1, 16)


def test_of_a_burst_of_callers_one_asks_for_all(pair):
    one, _ = pair
    with clip_rt.Client(one.url, model="shop") as client, ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda index: client.encode_images(squares(1, index)), range(32)))
    assert one.num_calls["ModelConfig"] == 2


def test_a_cancelled_or_hurried_caller_makes_no_healthy_server_suspect(pair, client):
    client.encode_images(squares(1))
    for server in pair:
        server.fail_when(lambda request: True, testing.Late(0.2))
    for index in range(4):
        with pytest.raises(clip_rt.ServerTimeoutError):
            client.encode_images(squares(1, index), timeout_s=0.05)
    assert all(replica.is_healthy for replica in client._session.connection.pool.replicas)


def test_a_long_call_takes_a_server_back_that_was_away(pair, client):
    one, two = pair
    client.encode_images(squares(1))
    two.stop()

    def images():
        for index in range(32 * 40):
            if index == 32 * 10:
                two.start()
            if index % 32 == 0:
                time.sleep(0.02)
            yield squares(1, index)[0]

    before = two.num_calls["ModelInfer"]
    for server in (one, two):
        server.fail_when(lambda request: True, testing.Late(0.05))
    client.encode_images(images())
    assert two.num_calls["ModelInfer"] > before + 3


def test_closing_ends_calls_on_a_connection_that_was_given_up(pair):
    one, _ = pair
    with clip_rt.Client(one.url) as client, ThreadPoolExecutor(1) as pool:
        client.encode_images(squares(1))
        one.fail_when(lambda request: True, testing.Hang())
        call = pool.submit(client.encode_images, squares(1, 1), timeout_s=20)
        assert wait_until(lambda: one.num_calls["ModelInfer"] == 2)
        with pytest.raises(clip_rt.ServerTimeoutError):
            client.encode_images(squares(1, 2), timeout_s=0.2)
        client.close()
        with pytest.raises(clip_rt.ClientClosedError):
            call.result(timeout=5)


@pytest.mark.parametrize(
    "options",
    [
        {"headers": {"a": 1}},
        {"headers": {1: "a"}},
        {"headers": [("a", "b")]},
        {"headers": {"a-bin": "x"}},
        {"tls": "x"},
        {"cache_dir": 3},
        {"exif": "no"},
        {"url": "localhost:99999"},
        {"url": [["a"]]},
    ],
    ids=str,
)
def test_options_of_a_wrong_kind_are_refused_at_once(options):
    with pytest.raises(clip_rt.InputError):
        clip_rt.Client(**options)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_forked_child_the_call_that_forked_goes_on_and_no_other():
    connection = Connection([])
    has_begun, may_end = threading.Event(), threading.Event()

    def call():
        with connection.used():
            has_begun.set()
            may_end.wait(60)

    other = threading.Thread(target=call)
    other.start()
    assert has_begun.wait(30)
    with connection.used():
        child = os.fork()
        if child == 0:
            status = 1
            try:
                connection.retire()
                was_open = not connection._is_closed
                with connection.used():
                    pass
                was_open = was_open and not connection._is_closed
            finally:
                status = 0 if was_open else 2
    if child == 0:  # The call has ended, and the other thread's is not here.
        os._exit(status if connection._is_closed else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    connection.retire()
    assert not connection._is_closed
    may_end.set()
    other.join(60)
    assert connection._is_closed


class NotReady:
    """What a Triton that drains says of its models, whose configuration it goes on telling."""

    def strike(self, answer, call):
        answer.ready = False
        return answer


def test_a_server_that_drains_is_left_for_one_that_has_other_weights():
    with (
        testing.FakeServer(model="m") as old,
        testing.FakeServer(model="m") as new,
        clip_rt.Client([old.url, new.url], timeout_s=10) as client,
    ):
        before = client.manifest.fingerprint
        new.swap_weights()
        time.sleep(HEALTH_CHECK_AFTER_S + 0.1)
        client.encode_texts("a red shoe")
        assert client.manifest.fingerprint == before, "it keeps to what it began with"
        num_before = new.num_calls["ModelInfer"]
        old.fail_next(NotReady(), method="ModelReady", times=1000)
        old.fail_next(testing.Unavailable(), times=1000)
        client.encode_texts("a red shoe")
        assert client.manifest.fingerprint != before
        assert new.num_calls["ModelInfer"] == num_before + 1
