"""What Prometheus reads of the gateway: its requests, its models, and the clients behind it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from clip_rt import telemetry
from clip_rt.gateway.admission import Admission
from clip_rt.gateway.service import Service


class Metrics:
    """A registry of its own, and what is counted at each request."""

    def __init__(self, admission: Admission, service: Service) -> None:
        self.registry = CollectorRegistry()
        telemetry.enable_prometheus(self.registry)
        self.seconds = Histogram(
            "clip_rt_http_request_seconds",
            "Duration of HTTP requests",
            ("path", "status"),
            buckets=telemetry.CALL_BUCKETS_S,
            registry=self.registry,
        )
        self.rejected = Counter(
            "clip_rt_http_rejected",
            "Requests that were refused because too many were in flight",
            registry=self.registry,
        )
        Gauge(
            "clip_rt_http_requests_in_flight",
            "Requests being answered now",
            registry=self.registry,
        ).set_function(lambda: admission.num_in_flight)
        Gauge(
            "clip_rt_http_max_concurrent_requests",
            "Requests that may be in flight; one more is refused",
            registry=self.registry,
        ).set(service.config.max_concurrent_requests)
        self.registry.register(_Models(service))


class _Models(Collector):
    """What the last health check found; nothing is asked for a scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the metrics as they are now."""
        info = GaugeMetricFamily(
            "clip_rt_model_info",
            "Weights that a model was last seen with, by their fingerprint",
            labels=("model", "fingerprint"),
        )
        ready = GaugeMetricFamily(
            "clip_rt_model_ready",
            "Whether a model embedded its canary as its export did, at the last health check",
            labels=("model",),
        )
        for state in self._service.states():
            info.add_metric((state.name, state.fingerprint), 1.0)
            if state.is_ready is not None:
                ready.add_metric((state.name,), float(state.is_ready))
        yield info
        yield ready
