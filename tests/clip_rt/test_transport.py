"""What goes over the wire: every failure has one of our errors, no answer is taken unchecked."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import tiny_repository
import transport_calls
import trustme
from owners import find_processes, read_command, wait_until
from stopping import stopped
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

import clip_rt
from clip_rt.deadline import Deadline
from clip_rt.embedded.server import EmbeddedServer
from clip_rt.wire import transport as transport_module
from clip_rt.wire.channel import TLS, parse_url
from clip_rt.wire.messages import ServedModel
from clip_rt.wire.status import ERROR_BY_CODE
from clip_rt.wire.transport import Transport

IMAGE = ServedModel(
    name="tiny_image",
    input_name="pixels",
    input_type="UINT8",
    input_dims=(64, 64, 3),
    embedding_dim=8,
    max_batch_size=32,
    manifest=tiny_repository.MANIFEST,
)
TEXT = replace(IMAGE, name="tiny_text", input_name="tokens", input_type="INT32", input_dims=(-1,))
PIXELS = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A server that answers whatever a test puts into it, for what the real one never does."""

    def __init__(self) -> None:
        self.requests: list[object] = []
        self.answers: list[object] = []
        self.answer_by_rows: dict[int, object] = {}
        self.parameters = tiny_repository.MANIFEST.to_parameters()

    def ModelInfer(self, request, context):  # noqa: N802
        self.requests.append(request)
        rows = request.inputs[0].shape[0]
        answer = self.answers.pop(0) if self.answers else unit_rows(rows)
        answer = self.answer_by_rows.get(rows, answer)
        if isinstance(answer, tuple):
            context.abort(*answer)
        return answer

    def ModelReady(self, request, context):  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=True)

    def ModelConfig(self, request, context):  # noqa: N802
        config = model_config_pb2.ModelConfig(name=request.name, max_batch_size=32)
        config.input.add(name="pixels", data_type="TYPE_UINT8", dims=[64, 64, 3])
        config.output.add(name="embeddings", data_type="TYPE_FP32", dims=[8])
        for key, value in self.parameters.items():
            config.parameters[key].string_value = value
        return service_pb2.ModelConfigResponse(config=config)


def answer(array, *, name="embeddings", datatype="FP32", shape=None, raw=None):
    response = service_pb2.ModelInferResponse(model_name="tiny_image")
    response.outputs.add(name=name, datatype=datatype, shape=shape or array.shape)
    response.raw_output_contents.append(array.tobytes() if raw is None else raw)
    return response


def unit_rows(count):
    return answer(np.tile(np.eye(1, 8, dtype=np.float32), (count, 1)))


@pytest.fixture
def fake() -> Iterator[tuple[Servicer, Transport]]:
    servicer = Servicer()
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    transport = Transport(f"127.0.0.1:{port}")
    yield servicer, transport
    transport.close()
    server.stop(None)


@pytest.fixture
def real(server) -> Iterator[Transport]:
    transport = Transport(server.url, headers=server.headers, may_cancel=False)
    yield transport
    transport.close()


def infer(transport, array=PIXELS, model=IMAGE, timeout_s=10.0):
    return transport_calls.infer(transport, model, array, timeout_s=timeout_s)


def find_server(server: EmbeddedServer) -> int:
    pids = find_processes("bin/tritonserver", os.getpid())
    return next(pid for pid in pids if server.server_id in read_command(pid))


def find_stub(server: EmbeddedServer, model: str) -> int:
    own = server.server_id.removeprefix("clip_rt-")
    pids = find_processes("triton_python_backend_stub", os.getpid())
    return next(
        pid for pid in pids if own in (command := read_command(pid)) and f"{model}/" in command
    )


def test_every_status_of_grpc_has_an_error():
    assert set(ERROR_BY_CODE) == set(grpc.StatusCode)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.value[0] != 0])
def test_a_status_arrives_as_its_error(fake, code):
    servicer, transport = fake
    servicer.answers = [(code, "its words")]
    with pytest.raises(ERROR_BY_CODE[code]) as caught:
        infer(transport)
    assert type(caught.value) is ERROR_BY_CODE[code]
    assert caught.value.url == transport.url
    assert isinstance(caught.value.__cause__, grpc.RpcError)


@pytest.mark.parametrize(
    ("code", "words", "kind"),
    [
        ("UNAVAILABLE", "[request id: 1] Exceeds maximum queue size", "ServerOverloadedError"),
        ("UNAVAILABLE", "Request timeout expired", "ServerOverloadedError"),
        ("UNAVAILABLE", "Server is stopping, scheduler refuses", "ServerUnavailableError"),
        ("NOT_FOUND", "unknown model: 'm' has no available versions", "ServerUnavailableError"),
        ("INTERNAL", "Stub process 'm_0_0' is not healthy.", "ServerUnavailableError"),
        ("RESOURCE_EXHAUSTED", "CLIENT: message larger than max (9 vs 8)", "MessageTooLongError"),
    ],
)
def test_one_status_for_unlike_things_is_told_apart(fake, code, words, kind):
    servicer, transport = fake
    servicer.answers = [(grpc.StatusCode[code], words)]
    with pytest.raises(getattr(clip_rt, kind), match=re.escape(words)):
        infer(transport)


ROWS = np.tile(np.eye(1, 8, dtype=np.float32), (3, 1))
BAD_ANSWERS = {
    "a missing output": service_pb2.ModelInferResponse(model_name="tiny_image"),
    "another name": answer(ROWS, name="other"),
    "another type": answer(ROWS.astype(np.float16), datatype="FP16"),
    "too few rows": answer(ROWS[:2]),
    "extra rows": answer(np.concatenate([ROWS, ROWS])),
    "another width": answer(ROWS[:, :4].copy()),
    "cut short": answer(ROWS, raw=ROWS.tobytes()[:-1]),
    "no bytes": answer(ROWS, raw=b""),
    "no unit length": answer(ROWS * np.float32(1.01)),
}


@pytest.mark.parametrize("bad", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_malformed_answer_is_an_error(fake, bad):
    servicer, transport = fake
    servicer.answers = [bad]
    with pytest.raises(clip_rt.ProtocolError) as caught:
        infer(transport)
    assert type(caught.value) is clip_rt.ProtocolError
    assert len(servicer.requests) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0])
def test_an_embedding_that_is_no_direction_is_named(fake, bad):
    servicer, transport = fake
    rows = ROWS[:2].copy()
    rows[1] = bad
    servicer.answer_by_rows[2] = answer(rows)
    with pytest.raises(clip_rt.NonFiniteEmbeddingError, match="item 1") as caught:
        infer(transport, PIXELS[:2])
    assert caught.value.index == 1


def test_a_model_without_a_manifest_is_refused(fake):
    servicer, transport = fake
    servicer.parameters = {}
    with pytest.raises(clip_rt.ContractError, match="no clip_rt manifest"):
        transport.describe(["tiny_image"], Deadline.after(5))


def test_a_manifest_that_contradicts_its_model_is_refused(fake):
    servicer, transport = fake
    servicer.parameters = replace(tiny_repository.MANIFEST, embedding_dim=16).to_parameters()
    with pytest.raises(clip_rt.ContractError, match="promises"):
        transport.describe(["tiny_image"], Deadline.after(5))


def test_the_server_counts_what_it_did(real):
    def read():
        return real.read_statistics(["tiny_image"], Deadline.after(5))["tiny_image"]

    before = read()
    infer(real)
    # It counts a request a moment after it has answered it.
    assert wait_until(lambda: read().num_requests > before.num_requests)
    after = read()
    assert (after.num_requests, after.num_rows) == (before.num_requests + 1, before.num_rows + 3)
    assert after.num_batches == before.num_batches + 1
    assert 0 < after.compute_s - before.compute_s < 5
    assert after.queue_s >= before.queue_s


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("localhost:8001", ("localhost:8001", False)),
        ("grpc://10.0.0.1:8001", ("10.0.0.1:8001", False)),
        ("grpcs://triton.example.com:443", ("triton.example.com:443", True)),
        ("dns:///triton.svc:8001", ("dns:///triton.svc:8001", False)),
        ("grpcs://dns://10.0.0.53:53/triton:443", ("dns://10.0.0.53:53/triton:443", True)),
        ("[::1]:8001", ("[::1]:8001", False)),
    ],
)
def test_urls(url, parsed):
    assert parse_url(url) == parsed


@pytest.mark.parametrize("url", ["", "localhost", "http://localhost:8000", "a b:1", "x:y", "u@h:1"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(clip_rt.InputError, match="host:port"):
        parse_url(url)


@pytest.mark.parametrize("url", ["127.0.0.1:9", "nosuch.invalid:8001"])
def test_an_unreachable_server_is_a_typed_error_in_time(url):
    start_s = time.monotonic()
    with pytest.raises(clip_rt.ServerUnavailableError, match=url):
        Transport(url).read_server(timeout_s=5)
    assert time.monotonic() - start_s < 6


def test_the_real_server_describes_its_models(real):
    assert real.list_models(Deadline.after(5)) == ("tiny_image", "tiny_text")
    assert real.describe(["tiny_image", "tiny_text"], Deadline.after(5)) == (IMAGE, TEXT)
    assert real.read_server(timeout_s=5).version == "2.51.0"
    with pytest.raises(clip_rt.UnknownModelError, match="nope"):
        real.describe(["nope"], Deadline.after(5))


def test_it_closes_though_an_interrupted_thread_left_a_lock(fake):
    _, transport = fake
    infer(transport)
    start_s = time.monotonic()
    with transport._lock:
        transport.close()
    assert time.monotonic() - start_s < 5
    with pytest.raises(clip_rt.ClientClosedError):
        infer(transport)


def test_a_stopped_server_times_out_at_the_deadline_and_works_again(server, real):
    with stopped(find_server(server)):
        start_s = time.monotonic()
        with pytest.raises(clip_rt.ServerTimeoutError, match=r"0\.5 s") as caught:
            infer(real, timeout_s=0.5)
        assert 0.4 < time.monotonic() - start_s < 1.5
        assert caught.value.timeout_s == 0.5
    assert infer(real).shape == (3, 8)


def test_many_calls_given_up_at_once_do_no_harm(server, real, monkeypatch):
    monkeypatch.setattr(transport_module, "DEADLINE_GRACE_S", 0.0)
    server_id = server.server_id

    def work(index):
        try:
            return infer(real, timeout_s=0.0005 + index % 10 * 0.001)
        except clip_rt.ServerTimeoutError:
            return None

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(500)))
    assert sum(rows is None for rows in results) > 50
    assert infer(real).shape == (3, 8)
    assert (server.is_running, server.server_id) == (True, server_id)


def test_a_full_queue_refuses_at_once_what_it_cannot_hold(tmp_path):
    queue = "default_queue_policy { max_queue_size: 2 }"
    tiny_repository.write(tmp_path, queue_policy=queue)
    with EmbeddedServer(tmp_path) as server, ThreadPoolExecutor(12) as pool:
        transport = Transport(server.url)
        with stopped(find_stub(server, "tiny_image")):
            calls = [pool.submit(infer, transport, timeout_s=60.0) for _ in range(12)]
            # Two wait, and a few more are on their way to the model; the others hear it at once.
            assert wait_until(lambda: sum(call.done() for call in calls) >= 6, timeout_s=30)
        errors = [call.exception(timeout=60) for call in calls]
        transport.close()
    refused = [error for error in errors if error is not None]
    assert 6 <= len(refused) <= 10
    assert {type(error) for error in refused} == {clip_rt.ServerOverloadedError}


def test_closing_ends_calls_on_their_way(server, real):
    infer(real)
    with stopped(find_server(server)), ThreadPoolExecutor(1) as pool:
        call = pool.submit(infer, real)
        time.sleep(0.2)
        real.close()
        with pytest.raises(clip_rt.ClientClosedError):
            call.result(timeout=5)
    with pytest.raises(clip_rt.ClientClosedError):
        infer(real)


def test_loopback_is_never_reached_through_a_proxy(server, monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    transport = Transport(server.url)
    assert infer(transport).shape == (3, 8)
    transport.close()


def test_threads_share_one_channel(real, monkeypatch):
    opened = []
    open_channel = transport_module.open_channel
    monkeypatch.setattr(
        transport_module,
        "open_channel",
        lambda *args, **options: opened.append(1) or open_channel(*args, **options),
    )
    barrier = threading.Barrier(8, timeout=60)

    def work(_):
        barrier.wait()
        return infer(real)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert len(opened) == 1
    assert all((rows == results[0]).all() for rows in results)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """Make a certificate for localhost, its authority, and an authority of somebody else."""
    folder = tmp_path_factory.mktemp("certificates")
    ours, theirs = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(folder / "ours.pem")
    theirs.cert_pem.write_to_path(folder / "theirs.pem")
    own = ours.issue_cert("localhost")
    own.cert_chain_pems[0].write_to_path(folder / "own.pem")
    own.private_key_pem.write_to_path(folder / "own.key")
    return folder


@pytest.mark.parametrize("is_mutual", [False, True])
def test_tls_trusts_whom_it_is_told_to_and_nobody_else(certificates, is_mutual):
    ours, theirs = ((certificates / f"{name}.pem") for name in ("ours", "theirs"))
    chain, key = certificates / "own.pem", certificates / "own.key"
    servicer, server = Servicer(), grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), chain.read_bytes())],
        ours.read_bytes() if is_mutual else None,
        is_mutual,
    )
    port = server.add_secure_port("localhost:0", credentials)
    server.start()
    own = {"certificate_chain": chain, "private_key": key} if is_mutual else {}
    try:
        good = Transport(f"grpcs://localhost:{port}", tls=TLS(root_certificates=ours, **own))
        assert infer(good).shape == (3, 8)
        for tls in (TLS(root_certificates=theirs, **own), None):
            with pytest.raises(clip_rt.ServerUnavailableError):
                infer(Transport(f"grpcs://localhost:{port}", tls=tls), timeout_s=5)
        with pytest.raises(clip_rt.ServerUnavailableError):  # Never without, when asked for with.
            infer(Transport(f"localhost:{port}"), timeout_s=5)
    finally:
        server.stop(None)


def test_certificates_that_cannot_be_used_are_refused_at_once(certificates, tmp_path):
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    with pytest.raises(clip_rt.InputError, match=r"root_certificates.*no PEM"):
        TLS(root_certificates=nothing)
    with pytest.raises(clip_rt.InputError, match="cannot be read"):
        TLS(root_certificates=tmp_path / "absent.pem")
    with pytest.raises(clip_rt.InputError, match="belong together"):
        TLS(certificate_chain=certificates / "own.pem")
