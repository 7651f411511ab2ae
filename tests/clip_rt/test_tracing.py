"""One trace from a caller of the gateway to the model in Triton, and nothing of what was asked."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, use_span
from owners import ROOT, wait_until
from processes import running

import clip_rt
from clip_rt import telemetry
from clip_rt.embedded.server import EmbeddedServer
from clip_rt.gateway import tracing
from clip_rt.gateway.application import make_application
from clip_rt.gateway.config import GatewayConfig
from clip_rt.gateway.service import Service

SECRET = "a text of the caller's"
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
"""The example of W3C's recommendation."""


@pytest.fixture
def provider(monkeypatch):
    provider = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(telemetry, "_find_tracer", lambda: provider.get_tracer("clip_rt"))
    monkeypatch.setattr(tracing, "_find_tracer", lambda: provider.get_tracer("clip_rt.gateway"))
    yield provider
    provider.shutdown()


@pytest.fixture
def spans(provider) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


def post(url: str, content: object, **headers: str) -> httpx.Response:
    """Ask a gateway of this process."""

    async def ask() -> httpx.Response:
        service = Service(GatewayConfig(url=(url,)))
        transport = httpx.ASGITransport(app=make_application(service))
        try:
            await service.open()
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
                return await http.post("/v1/embeddings", json={"input": content}, headers=headers)
        finally:
            await service.close()

    return asyncio.run(ask())


def sent_traces(server: clip_rt.testing.FakeServer) -> list[str]:
    return [each.headers.get("traceparent", "") for each in server.requests]


def test_a_request_is_in_its_callers_trace_down_to_the_server(spans):
    with clip_rt.testing.FakeServer() as server:
        assert post(server.url, SECRET, **TRACEPARENT).status_code == 200
        (*_, sent) = sent_traces(server)
    asked, call = (
        next(each for each in spans.get_finished_spans() if each.name == name and each.parent)
        for name in ("POST /v1/embeddings", "clip_rt.encode_texts")
    )
    assert (asked.kind, call.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    assert {each.context.trace_id for each in (asked, call)} == {int(TRACE_ID, 16)}
    assert asked.parent.span_id == int(SPAN_ID, 16)
    assert call.parent.span_id == asked.context.span_id
    assert sent == f"00-{TRACE_ID}-{call.context.span_id:016x}-01"
    assert dict(asked.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/embeddings",
        "http.response.status_code": 200,
    }
    assert SECRET not in "".join(each.to_json() for each in spans.get_finished_spans())


def test_a_request_that_fails_is_marked_and_one_that_is_refused_is_not(spans):
    with clip_rt.testing.FakeServer() as server:
        assert post(server.url, "", **TRACEPARENT).status_code == 400
        refused = next(each for each in spans.get_finished_spans() if each.name.startswith("POST"))
        assert refused.attributes["http.response.status_code"] == 400
        assert refused.status.status_code is StatusCode.UNSET
        spans.clear()
        server.fail_when(
            lambda request: TRACE_ID in request.headers.get("traceparent", ""),
            clip_rt.testing.Rejected(),
        )
        assert post(server.url, SECRET, **TRACEPARENT).status_code == 502
    failed = next(each for each in spans.get_finished_spans() if each.name.startswith("POST"))
    assert failed.attributes["error.type"] == "502"
    assert failed.status.status_code is StatusCode.ERROR
    assert SECRET not in "".join(each.to_json() for each in spans.get_finished_spans())


def test_what_is_not_sampled_is_carried_on_and_not_recorded(spans):
    unsampled = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-00"}
    with clip_rt.testing.FakeServer() as server:
        assert post(server.url, "red", **unsampled).status_code == 200
        (*_, sent) = sent_traces(server)
    # The id is of the gateway's span, which nobody keeps.
    assert sent.startswith(f"00-{TRACE_ID}-")
    assert sent.endswith("-00")
    assert not [each for each in spans.get_finished_spans() if each.parent]


@pytest.mark.parametrize(
    "given", [None, "", "00-zz-1-01", f"00-{'0' * 32}-{SPAN_ID}-01", "x" * 9000]
)
def test_a_trace_that_cannot_be_read_is_begun_anew(spans, given):
    headers = {} if given is None else {"traceparent": given}
    with clip_rt.testing.FakeServer() as server:
        assert post(server.url, "red", **headers).status_code == 200
        (*_, sent) = sent_traces(server)
    asked = next(each for each in spans.get_finished_spans() if each.name.startswith("POST"))
    assert asked.parent is None
    assert sent.split("-")[1] == f"{asked.context.trace_id:032x}"


def test_without_traces_nothing_is_sent():
    with clip_rt.testing.FakeServer() as server, clip_rt.Client(server.url) as client:
        client.encode_texts("red")
        assert sent_traces(server) == [""]


def test_a_request_shared_by_callers_is_in_one_trace_and_linked_from_the_others(provider, spans):
    tracer = provider.get_tracer("test")
    first, other = tracer.start_span("first"), tracer.start_span("other")
    headers = dict(telemetry.trace_headers([None, first, other, first]))
    context = first.get_span_context()
    flags = f"{context.trace_flags:02x}"
    assert headers == {"traceparent": f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags}"}
    for each in (first, other):
        each.end()
    assert [len(each.links) for each in spans.get_finished_spans()] == [0, 1]
    (link,) = spans.get_finished_spans()[1].links
    assert link.context.span_id == context.span_id
    assert telemetry.trace_headers([None]) == ()


def test_baggage_of_the_application_stays_here(provider):
    from opentelemetry import baggage, context

    token = context.attach(baggage.set_baggage("user", SECRET))
    try:
        with (
            use_span(provider.get_tracer("test").start_span("application")),
            clip_rt.testing.FakeServer() as server,
            clip_rt.Client(server.url) as client,
        ):
            client.encode_texts("red")
            (asked,) = server.requests
    finally:
        context.detach(token)
    assert "traceparent" in asked.headers
    assert "baggage" not in asked.headers
    assert SECRET not in str(asked.headers)


def test_parts_of_a_stream_are_in_the_trace_of_the_call(provider, spans):
    with clip_rt.testing.FakeServer(side_px=8) as server, clip_rt.Client(server.url) as client:
        from PIL import Image

        list(client.stream_images([Image.new("RGB", (8, 8))] * 3))
        (sent,) = set(sent_traces(server))
    span = next(each for each in spans.get_finished_spans() if "stream" in each.name)
    assert sent.split("-")[1:3] == [f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"]


@dataclass(frozen=True)
class Span:
    """What a collector is told of one."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str


@dataclass
class Collector:
    """What receives spans by OTLP over HTTP, as protobuf or as JSON."""

    spans: list[Span] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    url: str = ""

    def receive(self, content: bytes, content_type: str) -> None:
        self.bodies.append(content)
        if content_type.startswith("application/json"):
            self.spans += self._read_json(json.loads(content))
            return
        request = ExportTraceServiceRequest.FromString(content)
        for of_resource in request.resource_spans:
            attributes = {each.key: each.value for each in of_resource.resource.attributes}
            service = attributes["service.name"].string_value
            self.spans += [
                Span(service, each.name, *(part.hex() for part in _ids(each)))
                for scope in of_resource.scope_spans
                for each in scope.spans
            ]

    def _read_json(self, document: dict) -> Iterator[Span]:
        for of_resource in document["resourceSpans"]:
            attributes = {
                each["key"]: each["value"] for each in of_resource["resource"]["attributes"]
            }
            service = attributes["service.name"]["stringValue"]
            for scope in of_resource["scopeSpans"]:
                for each in scope["spans"]:
                    ids = (each["traceId"], each["spanId"], each.get("parentSpanId", ""))
                    yield Span(service, each["name"], *(part.lower() for part in ids))

    def find(self, name: str, service: str = "") -> list[Span]:
        return [
            each
            for each in self.spans
            if each.trace_id == TRACE_ID and each.name == name and service in each.service
        ]


def _ids(span) -> tuple[bytes, bytes, bytes]:
    return span.trace_id, span.span_id, span.parent_span_id


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                content = gzip.decompress(content)
            found.receive(content, self.headers["Content-Type"])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        found.url = f"http://127.0.0.1:{server.server_port}"
        yield found
        server.shutdown()
        thread.join(timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_collector_finds_gateway_and_triton_in_one_trace(collector, repository: Path):
    """Real parts all of them: the gateway's process, Triton, and what each exports."""
    server = EmbeddedServer(repository, port=free_port(), trace_url=f"{collector.url}/v1/traces")
    command = [sys.executable, "-m", "clip_rt", "gateway", "--port", "0", "--url"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    with (
        server,
        running(
            [*command, server.url], stdout=subprocess.PIPE, text=True, env=environment
        ) as gateway,
    ):
        url = gateway.stdout.readline().partition(" on ")[2].strip()
        answer = httpx.post(
            f"{url}/v1/embeddings", json={"input": SECRET}, headers=TRACEPARENT, trust_env=False
        )
        assert answer.status_code == 200
        gateway.terminate()
        assert gateway.wait(timeout=60) == 0  # What is left is exported before it ends.
        (asked,) = collector.find("POST /v1/embeddings", "clip-rt-gateway")
        (call,) = collector.find("clip_rt.encode_texts", "clip-rt-gateway")
        assert wait_until(lambda: collector.find("InferRequest"), 30), collector.spans
    (infer,) = collector.find("InferRequest")
    assert asked.parent_id == SPAN_ID
    assert call.parent_id == asked.span_id
    assert infer.parent_id == call.span_id
    assert infer.service != asked.service
    assert SECRET.encode() not in b"".join(collector.bodies)


@pytest.mark.slow
def test_a_gateway_that_cannot_export_says_what_to_install(repository: Path, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['opentelemetry.exporter.otlp.proto.http.trace_exporter'] = None\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "clip_rt", "gateway", "--port", "0", "--url", "127.0.0.1:1"],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "$OTEL_EXPORTER_OTLP_ENDPOINT" in done.stderr
    assert "pip install 'clip-rt[otlp]'" in done.stderr
