"""Where the time of a call goes, and how many calls fail: what others may see of this package.

Library code reports stages and events here, and pays next to nothing while nobody listens. In this
process `measure` does; an application that configures OpenTelemetry's SDK has a span of each call
and the metrics of `_Instruments`, which `enable_prometheus` also hands to Prometheus.

Numbers and names of our own leave this file; texts, labels, paths, tokens, headers and the messages
of errors never do.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from clip_rt import fork
from clip_rt._version import __version__
from clip_rt.errors import InputError

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter
    from opentelemetry.trace import Span, Tracer
    from prometheus_client import CollectorRegistry

STAGES: Mapping[str, str] = {
    "decode": "image files read and decoded",
    "resize": "images turned upright, resized and cropped",
    "tokenize": "texts made tokens",
    "cache": "class embeddings looked up and kept",
    "prepare": "batches laid out and requests built",
    "queue": "waiting in this process for room on the way to the server",
    "network": "from a request sent to its answer, the server's work included",
    "server_queue": "waiting inside the server, of all its clients",
    "server_compute": "the model itself, of all the server's clients",
    "classify": "embeddings made scores",
}
"""What time is spent on, in the order of a call. Stages run side by side in threads, and `network`
holds both of the server's, so together they may be more than the wall clock's `total`."""
TOTAL = "total"
CALL_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Edges of the latency histogram: one image on a GPU takes 2 ms, a call may take 30 s."""

Item = TypeVar("Item")


class Timings:
    """What was spent on each stage and counted of each event. Thread-safe."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._total_s: float | None = None
        self._seconds: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def __str__(self) -> str:
        seconds, counts = self.seconds, self.counts
        lines = [f"{'stage':<16}{'seconds':>10}{'count':>8}"]
        for name, spent_s in seconds.items():
            lines.append(f"{name:<16}{spent_s:>10.4f}{counts.pop(name, 0) or '':>8}".rstrip())
        lines += [f"{name:<16}{'':>10}{number:>8}" for name, number in counts.items() if number]
        return "\n".join(lines)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, in the order of `STAGES`, then `total` by the wall clock."""
        with _lock:
            found = dict(self._seconds)
        total_s = time.perf_counter() - self._start_s if self._total_s is None else self._total_s
        ordered = {name: found.pop(name) for name in STAGES if name in found}
        return ordered | found | {TOTAL: total_s}

    @property
    def counts(self) -> dict[str, int]:
        """How often: items by stage, and events such as `retries` and `cache_hits`."""
        with _lock:
            return dict(self._counts)

    def _spend(self, stage: str, seconds: float, count: int) -> None:
        with _lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
            self._counts[stage] = self._counts.get(stage, 0) + count

    def _count(self, event: str, number: int) -> None:
        with _lock:
            self._counts[event] = self._counts.get(event, 0) + number

    def _end(self) -> None:
        self._total_s = time.perf_counter() - self._start_s


Listeners: TypeAlias = tuple[Timings, ...]
"""Who hears of the work of a thread or task; see `current`."""

_listeners: ContextVar[Listeners] = ContextVar("clip_rt.telemetry", default=())
# Reentrant, since a finalizer or a signal handler may report while its thread is reporting.
_lock = threading.RLock()
_SILENT: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class HasServer(Protocol):
    """What can ask a server how it spends its time; a `Client` can."""

    def server_seconds(self) -> Mapping[str, float]:
        """Return `server_queue` and `server_compute` since the server was started, in seconds."""
        ...


@contextlib.contextmanager
def measure(*, server: HasServer | None = None) -> Iterator[Timings]:
    """Note where the time goes in the calls of a `with` block, in whatever thread it is spent.

    Args:
        server: A client whose server's own statistics are read before and after. They are those of
            all its clients in that time.

    Yields:
        The timings, to be read during the block or after it.

    Raises:
        ServerError: the server does not tell its statistics.
    """
    before = {} if server is None else server.server_seconds()
    timings = Timings()
    with within((*_listeners.get(), timings)):
        try:
            yield timings
        finally:
            timings._end()
    if server is not None:
        for name, seconds in server.server_seconds().items():
            timings._spend(name, seconds - before.get(name, 0.0), 0)


def stage(name: str, count: int = 1) -> contextlib.AbstractContextManager[None]:
    """Time a `with` block as work on `count` items in a stage, one of `STAGES`."""
    return _Stage(name, count) if _listeners.get() or _instruments else _SILENT


def add(name: str, seconds: float, count: int = 1) -> None:
    """Note time that was measured elsewhere."""
    for timings in _listeners.get():
        timings._spend(name, seconds, count)
    for instruments in _instruments:
        instruments.stage_seconds.add(max(seconds, 0.0), {"stage": name})


def count(event: str, number: int = 1) -> None:
    """Note that something happened: `retries`, `failovers`, `cache_hits`, `images`, ..."""
    for timings in _listeners.get():
        timings._count(event, number)
    for instruments in _instruments:
        instruments.events.add(number, {"event": event})


def current() -> Listeners:
    """Return who listens here, to be carried into another thread's `within`."""
    return _listeners.get()


@contextlib.contextmanager
def within(*listeners: Listeners) -> Iterator[None]:
    """Report the work of a `with` block to others: of one call, or of all that share a batch."""
    token = _listeners.set(tuple(dict.fromkeys(itertools.chain(*listeners))))
    try:
        yield
    finally:
        # A generator may be closed in another context than the one it was begun in.
        with contextlib.suppress(ValueError):
            _listeners.reset(token)


def current_span() -> Span | None:
    """Return the span that is current here, to be carried to where a request is sent."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry.trace import get_current_span

    span = get_current_span()
    return span if span.get_span_context().is_valid else None


def trace_headers(spans: Iterable[Span | None]) -> tuple[tuple[str, str], ...]:
    """Return the headers, of W3C's Trace Context, by which a server goes on with a trace.

    A request that several calls share can be in one trace only: the first one's. Spans of the
    others are linked to that. What else an application propagates, such as baggage, stays here: it
    may hold content.

    Args:
        spans: Of the calls; None where there is none.
    """
    first, *others = dict.fromkeys(span for span in spans if span is not None) or (None,)
    if first is None:
        return ()
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    for span in others:
        with contextlib.suppress(AttributeError):  # Before OpenTelemetry 1.23.
            span.add_link(first.get_span_context())
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(first))
    return tuple(carrier.items())


class Call:
    """One public call under way: a span and a measurement of OpenTelemetry."""

    def __init__(self, name: str, attributes: Mapping[str, str | int | float]) -> None:
        self.name = name
        self.attributes = dict(attributes)
        """More may be added until the end; numbers and names of models, never content."""
        _find_instruments()
        self.span = _start_span(name)
        self._timings = Timings()
        self.listeners = current() if self.span is None else (*current(), self._timings)

    def end(self, error: BaseException | None = None, *, seconds: float | None = None) -> None:
        """Note how the call ended, and how long it took if not since it began."""
        self._timings._end()
        seconds = self._timings.seconds[TOTAL] if seconds is None else seconds
        error_type = None if error is None else type(error).__name__
        for instruments in _instruments:
            instruments.call_seconds.record(seconds, {"method": self.name})
            if error_type is not None:
                instruments.errors.add(1, {"method": self.name, "error": error_type})
        if self.span is not None:
            _end_span(self.span, self.attributes, self._timings, error_type)


@contextlib.contextmanager
def call(name: str, **attributes: str | int | float) -> Iterator[Call]:
    """Report a `with` block as one public call, and the error that ends it by its type.

    Attributes, for the span, are numbers and names of models, never content.
    """
    begun = Call(name, attributes)
    try:
        with within(begun.listeners), _as_current(begun.span):
            yield begun
    except BaseException as error:
        begun.end(error)
        raise
    begun.end()


def stream(name: str, items: Iterable[Item]) -> Generator[Item, None, None]:
    """Report an iterator as one public call that lasts as long as its items are waited for.

    What its consumer does between two items is neither timed nor reported to it.
    """
    begun = Call(name, {})
    source, waited_s = iter(items), 0.0
    failure: BaseException | None = None
    try:
        while True:
            start_s = time.perf_counter()
            try:
                with within(begun.listeners), _as_current(begun.span):
                    item = next(source)
            except StopIteration:
                return
            except BaseException as error:
                failure = error
                raise
            finally:
                waited_s += time.perf_counter() - start_s
            yield item
    finally:
        if isinstance(source, Iterator) and hasattr(source, "close"):
            source.close()
        begun.end(failure, seconds=waited_s)


def enable_prometheus(registry: CollectorRegistry | None = None) -> None:
    """Export the metrics of this package to Prometheus from now on, by OpenTelemetry's exporter.

    Serving the registry is the application's. Calling this again for the same registry changes
    nothing. An application that exports its own OpenTelemetry metrics has ours among them and need
    not call it. The exporter knows one process: workers are scraped one by one.

    Args:
        registry: prometheus_client's default registry if None.

    Raises:
        InputError: the exporter is not installed, or the registry has metrics of these names.
    """
    global _instruments
    try:
        import prometheus_client
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from opentelemetry.sdk.metrics import MeterProvider
    except ImportError as error:
        raise InputError(
            "OpenTelemetry's Prometheus exporter is not installed. pip install 'clip-rt[telemetry]'"
        ) from error
    registry = prometheus_client.REGISTRY if registry is None else registry
    with _lock:
        if any(each.registry is registry for each in _instruments):
            return
        taken = [each.name for each in registry.collect() if each.name.startswith("clip_rt_")]
        if taken:
            raise InputError(
                f"the registry has {', '.join(taken)} already. Pass another with registry=, or "
                "leave this out where OpenTelemetry exports to it."
            )
        reader = PrometheusMetricReader(
            disable_target_info=True, scope_info_enabled=False, registry=registry
        )
        meter = MeterProvider([reader]).get_meter("clip_rt", __version__)
        _instruments = (*_instruments, _Instruments(meter, registry))


class _Stage:
    """A stage being timed."""

    __slots__ = ("_count", "_name", "_start_s")

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._count = count

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        add(self._name, time.perf_counter() - self._start_s, self._count)


class _Instruments:
    """What our numbers are recorded with: of the application's meter, or for one registry."""

    def __init__(self, meter: Meter, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry
        self.call_seconds = meter.create_histogram(
            "clip_rt.call",
            unit="s",
            description="Duration of the public calls of clip_rt",
            explicit_bucket_boundaries_advisory=CALL_BUCKETS_S,
        )
        self.errors = meter.create_counter(
            "clip_rt.errors",
            unit="{error}",
            description="Public calls of clip_rt that raised, by the type of the error",
        )
        self.stage_seconds = meter.create_counter(
            "clip_rt.stage",
            unit="s",
            description="Time spent in each stage, of all threads together",
        )
        self.events = meter.create_counter(
            "clip_rt.events", unit="{event}", description="What was counted, such as retries"
        )


_instruments: tuple[_Instruments, ...] = ()


def _find_instruments() -> None:
    """Record for the application too, once it has imported the SDK; the API alone keeps nothing."""
    global _instruments
    if "opentelemetry.sdk.metrics" not in sys.modules:
        return
    with _lock:
        if all(each.registry is not None for each in _instruments):
            _instruments = (*_instruments, _Instruments(_find_meter()))


def _find_meter() -> Meter:
    from opentelemetry.metrics import get_meter

    return get_meter("clip_rt", __version__)


def _start_span(name: str) -> Span | None:
    """Begin a span if the application traces; whoever does has imported OpenTelemetry."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry.trace import SpanKind

    span = _find_tracer().start_span(f"clip_rt.{name}", kind=SpanKind.CLIENT)
    return span if span.is_recording() else None


def _end_span(
    span: Span, attributes: Mapping[str, Any], timings: Timings, error_type: str | None
) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attributes({f"clip_rt.{key}": value for key, value in attributes.items()})
    spent = timings.seconds
    spent.pop(TOTAL)
    span.set_attributes({f"clip_rt.seconds.{key}": value for key, value in spent.items()})
    span.set_attributes({f"clip_rt.count.{key}": value for key, value in timings.counts.items()})
    if error_type is not None:
        # Not the exception itself: its message may quote what the user passed.
        span.set_attribute("error.type", error_type)
        span.set_status(StatusCode.ERROR)
    span.end()


def _as_current(span: Span | None) -> contextlib.AbstractContextManager[Any]:
    """Make a span the parent of those that other libraries begin during the call."""
    if span is None:
        return _SILENT
    from opentelemetry.trace import use_span

    return use_span(span, record_exception=False, set_status_on_exception=False)


@cache
def _find_tracer() -> Tracer:
    from opentelemetry.trace import get_tracer

    return get_tracer("clip_rt", __version__)


def _renew_lock() -> None:
    """In a forked child: another thread may have held it, and does not exist here."""
    global _lock
    _lock = threading.RLock()


fork.in_child(_renew_lock)
