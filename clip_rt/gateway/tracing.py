"""Spans of HTTP requests: within their caller's trace, and exported where the environment says.

The variables are OpenTelemetry's own: `OTEL_EXPORTER_OTLP_ENDPOINT` or
`OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` begins the export, `OTEL_TRACES_SAMPLER` says what is sampled.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from http import HTTPStatus

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.requests import Request
from starlette.responses import Response

from clip_rt._version import __version__
from clip_rt.errors import InputError

SERVICE_NAME = "clip-rt-gateway"
"""What spans are of, unless OTEL_SERVICE_NAME says otherwise."""
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

_propagator = TraceContextTextMapPropagator()


class RequestSpan:
    """The span of one request under way; without an SDK it costs next to nothing."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def end_with(self, response: Response) -> None:
        """Note how the request was answered."""
        self._span.set_attribute("http.response.status_code", response.status_code)
        if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._span.set_attribute("error.type", str(response.status_code))
            self._span.set_status(trace.StatusCode.ERROR)


@contextlib.contextmanager
def request_span(request: Request, path: str) -> Iterator[RequestSpan]:
    """Make a span of a request current in a `with` block, in the trace that its headers name.

    Args:
        request: Nothing of it but its method and its traceparent is reported.
        path: Of the endpoint, which has no parts that callers choose.
    """
    with _find_tracer().start_as_current_span(
        f"{request.method} {path}",
        context=_propagator.extract(request.headers),
        kind=trace.SpanKind.SERVER,
        attributes={"http.request.method": request.method, "http.route": path},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield RequestSpan(span)


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Export spans by OTLP in a `with` block, if the environment names an endpoint.

    Raises:
        InputError: it does, and the exporter is not installed.
    """
    variable = next(filter(os.environ.get, ENDPOINTS), None)
    # One that was set already, as by opentelemetry-instrument, exports in its own way.
    is_set = not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    if variable is None or is_set:
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InputError(
            f"${variable} says where spans go, and OpenTelemetry's exporter is not installed: "
            "pip install 'clip-rt[otlp]'."
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME") or SERVICE_NAME
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()


def _find_tracer() -> trace.Tracer:
    return trace.get_tracer("clip_rt.gateway", __version__)
