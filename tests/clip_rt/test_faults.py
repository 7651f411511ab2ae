"""The faults of production, through the public client: each ends as promised, none is felt twice.

| fault | where it is tested |
|---|---|
| F01 server killed with requests in flight | here, test_client (one long call), test_server |
| F02 the only replica away for a while | here |
| F03 a server that dies at every start | test_server |
| F04 refused, unresolved, not a Triton | here, test_client, test_transport |
| F05 a server that hangs | test_client, test_transport |
| F06 a storm of calls given up | test_transport (real), here (what is left behind) |
| F07 the queue is full | here, test_transport |
| F08 waited too long in the queue | here |
| F09 a connection that is dead and does not know it | here |
| F10 the server is told to end | here |
| F11 replicas are replaced one by one | here |
| F12 the Python process of a model is killed | here, test_client |
| F13 several servers and clients | here, test_server |
| F14 the port is taken meanwhile | test_server |
| F15 started from a thread that ends | test_server |
| F16 the owner ends, however it does | test_server |
| F17 Ctrl-C | test_client |
| F18 SIGTERM to the owner | test_server |
| F19 fork | test_client, test_server |
| F20 pickle | test_client |
| F21 many threads, one client | here |
| F22, F23, F24 the cache | test_cache and its neighbours |
| F25 other weights under the same name | here, test_client |
| F26 nothing grows | here; over hours in benchmarks |
| F27 answers that are cut, damaged or wrong | here, test_testing, test_transport |
| F28 little shared memory | test_server |
| F29 the clock jumps, the laptop sleeps | here |
| F30 a machine that cannot run the server | test_server |
| F31 proxies in the environment | test_transport |
| F32 a message over the server's limit | here |
| F33 a replica that answers NaN | here |
"""

from __future__ import annotations

import http.server
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny_repository
from fault_proxy import Corrupt, CutAfter, Delay, Drip, FaultProxy, Stall
from owners import find_server, list_pids, read_command, wait_until
from PIL import Image
from stopping import stopped

import clip_rt
from clip_rt import testing
from clip_rt.embedded.server import EmbeddedServer
from clip_rt.requests.replica import HEALTH_CHECK_AFTER_S
from clip_rt.requests.retries import RetryBudget


def shade(index):
    """Make an image of its own for each index below 16 million."""
    return Image.new("RGB", (64, 64), (index % 256, index // 256 % 256, index // 65536))


def shades(*indices):
    return [shade(index) for index in indices]


def timed(call, *args, **options):
    """Return how long a call took and what it ended with, a value or one of our errors."""
    start_s = time.monotonic()
    try:
        outcome = call(*args, **options)
    except clip_rt.ClipRTError as error:
        outcome = error
    return time.monotonic() - start_s, outcome


def find_own(server: EmbeddedServer, pattern: str) -> int:
    own = server.server_id.removeprefix("clip_rt-")
    (pid,) = [
        pid for pid in list_pids() if pattern in (words := read_command(pid)) and own in words
    ]
    return pid


@contextmanager
def doing(work: Callable[[], object], *, num_threads: int = 4) -> Iterator[list[object]]:
    """Repeat `work` in threads during a `with` block; yield what it returned or raised."""
    outcomes: list[object] = []
    is_over = threading.Event()

    def repeat():
        while not is_over.is_set():
            try:
                outcomes.append(work())
            except Exception as error:
                outcomes.append(error)
            time.sleep(0.005)

    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(num_threads):
            pool.submit(repeat)
        try:
            yield outcomes
        finally:
            is_over.set()


@pytest.fixture
def fake() -> Iterator[testing.FakeServer]:
    with testing.FakeServer(model="tiny", embedding_dim=16, side_px=64) as fake:
        yield fake


@pytest.fixture
def proxy(server) -> Iterator[FaultProxy]:
    """To the real server."""
    with FaultProxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def far(proxy) -> Iterator[clip_rt.Client]:
    """A client of the real server behind the proxy, connected."""
    with clip_rt.Client(proxy.url, model="tiny", timeout_s=20.0) as far:
        far.encode_images(shade(0))
        yield far


@pytest.fixture(scope="module")
def truth(client) -> np.ndarray:
    """What the shades 0 to 255 are embedded as."""
    return client.encode_images(shades(*range(256)))


@pytest.mark.slow
def test_f01_a_server_killed_with_32_requests_in_flight_mixes_up_nothing(tmp_path, truth):
    repository = tiny_repository.write(tmp_path)
    with clip_rt.Client(repository=repository, timeout_s=60.0) as client:
        client.encode_images(shade(0))
        server = find_server(client)
        pid = find_own(server, "bin/tritonserver")
        with stopped(pid), ThreadPoolExecutor(32) as pool:
            calls = [pool.submit(client.encode_images, shades(i, i + 32)) for i in range(32)]
            # None is answered before: the server has stopped, all of it.
            assert wait_until(lambda: all(call.running() for call in calls))
            os.kill(pid, signal.SIGKILL)
            outcomes = [call.exception(timeout=60) or call.result(60) for call in calls]
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, Exception):
            assert isinstance(outcome, clip_rt.ServerError), outcome
        else:
            np.testing.assert_allclose(outcome, truth[[index, index + 32]], atol=1e-6)
    assert sum(isinstance(outcome, np.ndarray) for outcome in outcomes) >= 30


def test_f02_while_the_only_replica_is_away_those_who_can_wait_do(proxy, far, truth):
    proxy.refuse()
    proxy.reset()
    with ThreadPoolExecutor(12) as pool:
        patient = [pool.submit(far.encode_images, shade(i), timeout_s=30.0) for i in range(8)]
        hasty = [pool.submit(timed, far.encode_images, shade(i), timeout_s=1.0) for i in range(4)]
        for call in hasty:
            seconds, error = call.result(timeout=10)
            assert isinstance(error, (clip_rt.ServerUnavailableError, clip_rt.ServerTimeoutError))
            # Of 240 such calls, beside up to 8 busy loops on 2 cores, the last ended after 1.11 s.
            # The first after 0.39 s: it is given up when the next pause would outlast the deadline.
            assert 0.3 < seconds < 1.2
        time.sleep(1.5)  # It is away for longer than a few tries take.
        proxy.listen()
        rows = np.concatenate([call.result(timeout=30) for call in patient])
    np.testing.assert_allclose(rows, truth[:8], atol=1e-6)


class Page(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def speaking_http() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{page.server_port}"
        page.shutdown()


@contextmanager
def saying_nothing() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def hanging_up() -> Iterator[str]:
    with FaultProxy("127.0.0.1:9") as proxy:  # Nobody is behind it.
        yield proxy.url


@contextmanager
def being_nobody() -> Iterator[str]:
    yield "nosuch.invalid:8001"


@pytest.mark.parametrize("impostor", [speaking_http, saying_nothing, hanging_up, being_nobody])
def test_f04_what_is_no_triton_is_named_in_time(impostor):
    with impostor() as url, clip_rt.Client(url, model="tiny", timeout_s=1.0) as client:
        seconds, error = timed(client.encode_texts, "red")
    assert isinstance(error, clip_rt.ServerError), error
    assert url in str(error)
    assert seconds < 2.0


def test_f06_calls_given_up_leave_nothing_behind(fake):
    with clip_rt.Client(fake.url, timeout_s=10.0) as client:
        client.encode_texts("red")
        fake.fail_when(lambda request: True, testing.Late(0.02))
        with ThreadPoolExecutor(8) as pool:
            outcomes = list(
                pool.map(
                    lambda i: timed(client.encode_texts, f"t {i}", timeout_s=0.001 + i % 5 / 1000),
                    range(500),
                )
            )
        for seconds, outcome in outcomes:
            assert isinstance(outcome, (clip_rt.ServerTimeoutError, np.ndarray)), outcome
            assert seconds < 2.0
        fake.heal()
        assert client.encode_texts("red").shape == (1, 16)


def test_f07_a_full_queue_is_not_met_with_many_more_requests(fake):
    with clip_rt.Client(fake.url, timeout_s=1.0) as client:
        client.encode_texts("red")
        before = fake.num_calls["ModelInfer"]
        fake.fail_when(lambda request: True, testing.Overloaded())
        with ThreadPoolExecutor(16) as pool:
            calls = [pool.submit(timed, client.encode_images, shade(i)) for i in range(50)]
            outcomes = [call.result(timeout=60) for call in calls]
    assert {type(outcome) for _, outcome in outcomes} <= {
        clip_rt.ServerOverloadedError,
        clip_rt.ServerTimeoutError,
    }
    assert max(seconds for seconds, _ in outcomes) < 2.0
    # A tenth more than was asked for, and the few that are always allowed.
    assert fake.num_calls["ModelInfer"] - before <= 1.1 * 50 + RetryBudget().reserve


@contextmanager
def many_clients(url: str, count: int) -> Iterator[list[clip_rt.Client]]:
    """Connect clients that do not share requests, as those of as many machines would not."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(clip_rt.Client(url, model="tiny", timeout_s=20.0))
            for _ in range(count)
        ]
        for client in clients:
            client.encode_images(shade(0))
        yield clients


@pytest.mark.slow
def test_f07_a_queue_that_empties_is_waited_for(tmp_path, truth):
    queue = "default_queue_policy { max_queue_size: 2 }"
    tiny_repository.write(tmp_path, queue_policy=queue)
    with (
        EmbeddedServer(tmp_path) as server,
        many_clients(server.url, 8) as clients,
        ThreadPoolExecutor(8) as pool,
    ):
        with stopped(find_own(server, "tiny_image/")):
            calls = [
                pool.submit(client.encode_images, shade(i)) for i, client in enumerate(clients)
            ]
            assert not wait_until(lambda: any(call.done() for call in calls), timeout_s=0.3)
        rows = np.concatenate([call.result(timeout=20) for call in calls])
    np.testing.assert_allclose(rows, truth[:8], atol=1e-6)


@pytest.mark.slow
def test_f08_what_waited_too_long_in_the_queue_is_tried_again(tmp_path, truth):
    queue = "timeout_action: REJECT default_timeout_microseconds: 100000"
    tiny_repository.write(tmp_path, queue_policy=f"default_queue_policy {{ {queue} }}")
    with (
        EmbeddedServer(tmp_path) as server,
        FaultProxy(server.url) as proxy,
        many_clients(proxy.url, 12) as clients,
        ThreadPoolExecutor(12) as pool,
    ):
        sent = proxy.num_bytes_to_server
        with stopped(find_own(server, "tiny_image/")):
            calls = [
                pool.submit(client.encode_images, shade(i)) for i, client in enumerate(clients)
            ]
            assert wait_until(lambda: proxy.num_bytes_to_server > sent + 12 * 64 * 64 * 3)
            time.sleep(0.3)  # Triton looks at the clock when the model is free again.
        rows = np.concatenate([call.result(timeout=20) for call in calls])
        # Some were refused and sent once more.
        assert proxy.num_bytes_to_server > sent + 14 * 64 * 64 * 3
    np.testing.assert_allclose(rows, truth[:12], atol=1e-6)


def test_f09_a_dead_connection_ends_calls_at_their_deadline_and_is_replaced(proxy, far, truth):
    proxy.fault = Stall()
    seconds, error = timed(far.encode_images, shade(1), timeout_s=0.5)
    assert isinstance(error, clip_rt.ServerTimeoutError)
    assert 0.4 < seconds < 1.5
    proxy.fault = None
    np.testing.assert_allclose(far.encode_images(shade(1)), truth[[1]], atol=1e-6)

    proxy.freeze()  # As a firewall does that forgot the connection: new ones pass.
    seconds, error = timed(far.encode_images, shade(2), timeout_s=0.5)
    assert seconds < 1.5
    np.testing.assert_allclose(far.encode_images(shade(2)), truth[[2]], atol=1e-6)
    assert proxy.num_open <= 3


SLOW = """
import pathlib, time
_execute = TritonPythonModel.execute
def execute(self, requests):
    pathlib.Path({begun!r}).touch()
    time.sleep(1.0)
    return _execute(self, requests)
TritonPythonModel.execute = execute
"""


@pytest.mark.slow
def test_f10_a_server_told_to_end_finishes_what_it_began(tmp_path, truth):
    begun = tmp_path / "begun"
    model = tiny_repository.write(tmp_path / "models") / "tiny_image" / "1" / "model.py"
    model.write_text(model.read_text() + SLOW.format(begun=str(begun)))
    outcomes = []

    def is_refused():
        outcomes.append(timed(late.encode_texts, "red")[1])
        return isinstance(outcomes[-1], Exception)

    with (
        EmbeddedServer(tmp_path / "models") as server,
        clip_rt.Client(server.url, model="tiny", timeout_s=20.0) as client,
        clip_rt.Client(server.url, model="tiny", timeout_s=0.3) as late,
        ThreadPoolExecutor(1) as pool,
    ):
        call = pool.submit(client.encode_images, shade(7))
        assert wait_until(begun.exists)
        os.kill(find_own(server, "bin/tritonserver"), signal.SIGTERM)
        assert wait_until(is_refused)
        np.testing.assert_allclose(call.result(timeout=20), truth[[7]], atol=1e-6)
    error = outcomes[-1]
    assert isinstance(error, (clip_rt.ServerUnavailableError, clip_rt.ServerTimeoutError)), error


def test_f11_replicas_replaced_one_by_one_lose_no_call():
    numbers = itertools.count()

    def work():
        index = next(numbers) % 200
        rows = client.encode_images(shades(index, index + 1))
        assert rows.shape == (2, 16)
        return True

    with ExitStack() as stack:
        pair = [
            stack.enter_context(testing.FakeServer(model="tiny", embedding_dim=16, side_px=64))
            for _ in range(2)
        ]
        client = clip_rt.Client([each.url for each in pair], timeout_s=10.0)
        stack.enter_context(client)
        work()
        with doing(work) as outcomes:
            for each in (*pair, *pair):
                count = len(outcomes)
                each.stop(grace_s=2.0)
                assert wait_until(lambda count=count: len(outcomes) > count + 20)
                each.start()
                # Taken back, without being asked.
                count = each.num_calls["ModelInfer"]
                assert wait_until(
                    lambda each=each, count=count: each.num_calls["ModelInfer"] > count + 5,
                    timeout_s=15,
                )
    assert set(map(repr, outcomes)) == {"True"}


@pytest.mark.slow
def test_f11_of_two_real_replicas_each_may_go_while_the_other_is_there(tmp_path, server, truth):
    tiny_repository.write(tmp_path)
    numbers = itertools.count()

    def work():
        index = next(numbers) % 256
        rows = client.encode_images(shade(index))
        np.testing.assert_allclose(rows, truth[[index]], atol=1e-6)
        return True

    with (
        EmbeddedServer(tmp_path) as other,
        FaultProxy(other.url) as to_other,
        FaultProxy(server.url) as proxy,
        clip_rt.Client([to_other.url, proxy.url], model="tiny", timeout_s=20.0) as client,
    ):
        work()
        with doing(work) as outcomes:
            os.kill(find_own(other, "bin/tritonserver"), signal.SIGKILL)
            count = len(outcomes)
            assert wait_until(lambda: len(outcomes) > count + 50)
            assert wait_until(lambda: not other.is_running)
            to_other.target = other.start()
            sent = to_other.num_bytes_to_server
            # Taken back, without being asked.
            enough = 10 * 64 * 64 * 3
            assert wait_until(lambda: to_other.num_bytes_to_server > sent + enough, timeout_s=15)
            proxy.refuse()
            proxy.reset()
            count = len(outcomes)
            assert wait_until(lambda: len(outcomes) > count + 50, timeout_s=15)
    assert set(map(repr, outcomes)) == {"True"}


@pytest.mark.slow
def test_f12_a_killed_python_process_leaves_no_shared_memory(tmp_path, truth):
    repository = tiny_repository.write(tmp_path)

    def list_pages(server_id):
        own = server_id.removeprefix("clip_rt-")
        return [path for path in Path("/dev/shm").iterdir() if own in path.name]

    with clip_rt.Client(repository=repository, timeout_s=60.0) as client:
        client.encode_images(shade(0))
        server = find_server(client)
        first = server.server_id
        num_pages = len(list_pages(first))
        assert num_pages > 0
        os.kill(find_own(server, "tiny_image/"), signal.SIGKILL)
        for index in (3, 4):
            np.testing.assert_allclose(
                client.encode_images(shade(index)), truth[[index]], atol=1e-6
            )
        server = find_server(client)
        assert wait_until(lambda: len(list_pages(server.server_id)) == num_pages)
        if server.server_id != first:
            assert wait_until(lambda: not list_pages(first))


def test_f13_clients_of_different_servers_stay_apart(fake, client, server):
    with (
        testing.FakeServer(model="tiny", embedding_dim=24, side_px=32) as second,
        clip_rt.Client(fake.url) as one,
        clip_rt.Client(second.url) as two,
        ThreadPoolExecutor(3) as pool,
    ):

        def work(client):
            return [client.class_embeddings([f"thing {i}"]).shape for i in range(20)]

        found = list(pool.map(work, [one, two, client]))
    assert [set(shapes) for shapes in found] == [{(1, 16)}, {(1, 24)}, {(1, 8)}]


def test_f21_64_threads_get_their_own_rows_over_few_connections(proxy, far, truth):
    barrier = threading.Barrier(64, timeout=60)

    def work(thread):
        barrier.wait()
        for step in range(10):
            index = (thread * 10 + step) % 256
            np.testing.assert_allclose(far.encode_images(shade(index)), truth[[index]], atol=1e-6)
        return True

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(work, range(64)))
    assert proxy.num_accepted <= 8


def test_f25_new_weights_under_the_same_name_are_noticed_and_old_vectors_not_used(fake):
    with clip_rt.Client(fake.url) as client:
        old = client.class_embeddings(["red", "sea"])
        fingerprint = fake.swap_weights()
        time.sleep(1.1 * HEALTH_CHECK_AFTER_S)
        new = client.class_embeddings(["red", "sea"])
        assert client.manifest.fingerprint == fingerprint
        assert (np.abs((old * new).sum(axis=1)) < 0.9).all()
        with clip_rt.Client(fake.url, cache_bytes=0) as fresh:
            np.testing.assert_allclose(new, fresh.class_embeddings(["red", "sea"]), atol=1e-6)


@pytest.mark.parametrize("is_busy", [True, False])
def test_f25_a_server_that_comes_back_as_another_within_a_call_is_refused(fake, is_busy):
    """While requests are under way, and in a lull of the caller's in which nothing fails."""
    with clip_rt.Client(fake.url, timeout_s=20.0) as client:
        client.encode_texts("red")
        before = fake.num_calls["ModelInfer"]
        if is_busy:
            fake.fail_when(lambda request: fake.num_calls["ModelInfer"] > 3, testing.Late(0.5))

        def images():
            for index in range(200):
                if index == 120:
                    assert wait_until(lambda: fake.num_calls["ModelInfer"] >= before + 3)
                    if not is_busy:
                        time.sleep(0.2)  # The last of them has been answered.
                    fake.stop()
                    fake.heal()
                    fake.swap_weights()
                    fake.start()
                    if not is_busy:
                        time.sleep(HEALTH_CHECK_AFTER_S)  # gRPC connects again by itself.
                yield shade(index)

        with pytest.raises(clip_rt.ContractError, match="replaced during the call"):
            client.encode_images(images())


def count_open() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def test_f26_threads_and_files_do_not_grow_with_calls_and_faults(fake):
    faults = [
        testing.Unavailable(),
        testing.Rejected(),
        testing.Malformed("cut short"),
        testing.NotFinite(),
        testing.Late(0.1),
        testing.Crash(back_after_s=0.05),
    ]
    with clip_rt.Client(fake.url, timeout_s=5.0) as client:

        def work(index):
            if index % 5 == 0:
                fake.fail_next(faults[index // 5 % len(faults)])
            options = {"timeout_s": 0.05} if index % 7 == 0 else {}
            return timed(client.encode_images, shades(index, index + 1), **options)[1]

        for index in range(60):
            work(index)
        assert wait_until(lambda: client.encode_texts("red").shape == (1, 16))
        before = count_open()
        outcomes = [work(index) for index in range(120)]
        fake.heal()
        assert client.encode_texts("red").shape == (1, 16)
        after = count_open()
    # What gRPC and the pools of both sides keep ready is bounded, and may not all be up before.
    assert after[0] <= before[0] + 10
    assert after[1] <= before[1] + 10
    assert sum(isinstance(outcome, np.ndarray) for outcome in outcomes) > 50


WIRE_FAULTS = {
    "the request is cut": CutAfter(2000, "to server"),
    "the answer is cut": CutAfter(10, "to client"),
    "the request is damaged": Corrupt("to server"),
    "the answer is damaged": Corrupt("to client"),
    "all is slow": Drip(300),
}


@pytest.mark.parametrize("fault", WIRE_FAULTS.values(), ids=WIRE_FAULTS)
def test_f27_a_message_that_is_cut_or_damaged_ends_in_a_typed_error_in_time(
    proxy, far, truth, fault
):
    proxy.fault = fault
    seconds, outcome = timed(far.encode_images, shades(*range(8)), timeout_s=1.5)
    assert seconds < 2.6
    # A flipped bit of a number need not show; the checksums of TCP are there for that.
    if not isinstance(fault, Corrupt):
        assert isinstance(outcome, clip_rt.ServerError)
    proxy.fault = None
    np.testing.assert_allclose(far.encode_images(shades(*range(8))), truth[:8], atol=1e-6)


def test_f27_a_connection_cut_once_is_not_felt(proxy, far, truth):
    proxy.fault = CutAfter(5000, "to server")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(far.encode_images, shades(*range(8)))
        assert wait_until(lambda: proxy.num_open == 0 or call.done())
        proxy.fault = None
        np.testing.assert_allclose(call.result(timeout=20), truth[:8], atol=1e-6)


def test_f27_a_slow_network_only_takes_longer(proxy, far, truth):
    proxy.fault = Delay(0.1)
    np.testing.assert_allclose(far.encode_images(shade(5)), truth[[5]], atol=1e-6)


@pytest.mark.parametrize("jump_s", [-86400.0, 86400.0])
def test_f29_a_clock_that_jumps_moves_no_deadline(fake, monkeypatch, jump_s):
    now = time.time
    with clip_rt.Client(fake.url, timeout_s=10.0) as client, ThreadPoolExecutor(1) as pool:
        client.encode_texts("red")
        for fault, timeout_s in ((testing.Late(0.5), 10.0), (testing.Hang(), 0.5)):
            fake.fail_next(fault)
            count = fake.num_calls["ModelInfer"]
            call = pool.submit(timed, client.encode_texts, "red", timeout_s=timeout_s)
            assert wait_until(lambda count=count: fake.num_calls["ModelInfer"] > count)
            with monkeypatch.context() as patch:
                patch.setattr(time, "time", lambda: now() + jump_s)
                seconds, outcome = call.result(timeout=5)
            if timeout_s == 0.5:
                assert isinstance(outcome, clip_rt.ServerTimeoutError)
            else:
                assert outcome.shape == (1, 16)
            assert 0.4 < seconds < 1.5


SLEEPER = """
import sys
import clip_rt
client = clip_rt.Client(sys.argv[1], timeout_s=1.0)
client.encode_texts("red")
try:
    client.encode_texts("blue")
except clip_rt.ServerError as error:
    print(type(error).__name__, flush=True)
print(client.encode_texts("red").shape, flush=True)
"""


@pytest.mark.slow
def test_f29_a_client_that_slept_past_its_deadline_ends_when_it_wakes(fake, start_owner):
    fake.fail_when(lambda request: 1746 in request.array, testing.Hang())  # "blue"
    owner = start_owner(SLEEPER, fake.url)
    assert wait_until(lambda: fake.num_calls["ModelInfer"] == 2, timeout_s=15)
    with stopped(owner.pid):
        time.sleep(1.5)
    start_s = time.monotonic()
    assert owner.read_line() in ("ServerTimeoutError", "ServerUnavailableError")
    assert time.monotonic() - start_s < 1.5
    assert owner.read_line() == "(1, 16)"
    assert owner.process.wait(timeout=10) == 0


def test_f32_a_message_over_the_server_s_limit_is_split_or_refused_but_never_repeated():
    with (
        testing.FakeServer(side_px=64, embedding_dim=16, max_message_bytes=100_000) as fake,
        FaultProxy(fake.url) as proxy,
        clip_rt.Client(proxy.url, timeout_s=5.0) as client,
    ):
        client.encode_images(shade(1))
        before = proxy.num_bytes_to_server
        seconds, outcome = timed(client.encode_images, shades(*range(32)))
        assert seconds < 3.0
        if isinstance(outcome, Exception):
            assert isinstance(outcome, clip_rt.InferenceError)
            assert "larger than max" in str(outcome)
        else:
            assert outcome.shape == (32, 16)
        # Split, all of it goes out twice or a little more; repeated, many times.
        assert proxy.num_bytes_to_server - before < 4 * 32 * 64 * 64 * 3
        assert client.encode_images(shade(1)).shape == (1, 16)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_f33_vectors_that_are_none_are_refused_and_not_kept(fake, value):
    with clip_rt.Client(fake.url) as client, clip_rt.Client(fake.url) as fresh:
        fake.fail_when(lambda request: True, testing.NotFinite(value))
        with pytest.raises(clip_rt.NonFiniteEmbeddingError):
            client.zero_shot(shades(1), ["red", "sea"])
        with pytest.raises(clip_rt.NonFiniteEmbeddingError):
            client.encode_images(shades(1, 2, 3))
        fake.heal()
        np.testing.assert_array_equal(
            client.class_embeddings(["red", "sea"]), fresh.class_embeddings(["red", "sea"])
        )


def is_poisoned(request):
    return request.tower == "image" and (request.array[:, 0, 0, 0] == 77).any()


def test_p4_the_item_a_server_refuses_is_found_and_named(fake):
    with clip_rt.Client(fake.url) as client:
        fake.fail_when(is_poisoned, testing.Rejected())
        with pytest.raises(clip_rt.InferenceError) as caught:
            client.encode_images(shades(*range(100)))
        assert caught.value.index == 77


def test_p4_the_other_items_are_embedded_as_if_it_were_not_there(fake):
    with clip_rt.Client(fake.url) as client:
        alone = client.encode_images(shades(*range(100)))
        before = fake.num_calls["ModelInfer"]
        fake.fail_when(is_poisoned, testing.Rejected())
        encoded = client.encode_images(shades(*range(100)), on_error="skip")
        good = [index for index in range(100) if index != 77]
        assert encoded.indices.tolist() == good
        np.testing.assert_array_equal(encoded.embeddings, alone[good])
        (failure,) = encoded.failures
        assert (type(failure), failure.index) == (clip_rt.InferenceError, 77)
        # Four batches, and two halves for each halving of the one it was in.
        assert fake.num_calls["ModelInfer"] - before <= 4 + 2 * 6


def test_p4_a_row_that_is_no_direction_is_skipped_alone(fake):
    class Blank(testing.NotFinite):
        """The poisoned row, wherever it is in its request."""

        def strike(self, answer, call):
            (row,) = np.nonzero(call.server.requests[-1].array[:, 0, 0, 0] == 77)[0]
            return testing.NotFinite(self.value, row=int(row)).strike(answer, call)

    with clip_rt.Client(fake.url) as client:
        alone = client.encode_images(shades(70, 80))
        fake.fail_when(is_poisoned, Blank())
        encoded = client.encode_images(shades(70, 77, 80), on_error="skip")
        assert encoded.indices.tolist() == [0, 2]
        np.testing.assert_array_equal(encoded.embeddings, alone)
        assert [(type(each), each.index) for each in encoded.failures] == [
            (clip_rt.NonFiniteEmbeddingError, 1)
        ]


def test_p11_a_replica_that_is_overloaded_or_away_is_left_to_the_other():
    with ExitStack() as stack:
        bad, good = (
            stack.enter_context(testing.FakeServer(model="tiny", embedding_dim=16, side_px=64))
            for _ in range(2)
        )
        client = stack.enter_context(clip_rt.Client([bad.url, good.url], timeout_s=5.0))
        bad.fail_when(lambda request: True, testing.Overloaded())
        assert client.encode_images(shades(*range(64))).shape == (64, 16)
        bad.heal()
        bad.stop()
        assert client.encode_images(shades(*range(64))).shape == (64, 16)
        good.stop()
        bad.start()
        assert client.encode_images(shades(*range(64))).shape == (64, 16)


def test_p11_replicas_with_other_weights_are_not_mixed():
    with (
        testing.FakeServer(model="tiny", embedding_dim=16, side_px=64) as one,
        testing.FakeServer(model="tiny", embedding_dim=16, side_px=64) as two,
        clip_rt.Client([one.url, two.url], timeout_s=3.0) as client,
        clip_rt.Client(one.url) as of_one,
        clip_rt.Client(two.url) as of_two,
    ):
        two.swap_weights()
        images = shades(*range(128))
        possible = of_one.encode_images(images), of_two.encode_images(images)
        for _ in range(5):
            _, outcome = timed(client.encode_images, images)
            if isinstance(outcome, Exception):
                assert isinstance(outcome, clip_rt.ContractError), outcome
            else:
                assert any(np.array_equal(outcome, rows) for rows in possible)
