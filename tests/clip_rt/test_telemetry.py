"""What a call reports of itself: where, how much, and never what it was about."""

from __future__ import annotations

import contextlib
import contextvars
import re
import subprocess
import sys
import threading
import timeit
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import prometheus_client
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from clip_rt import telemetry
from clip_rt.errors import ImageError, InputError, TextError, TextTooLongError

SECRET = "a label of the user's"


@pytest.fixture
def registry(monkeypatch):
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(telemetry, "_instruments", ())
    telemetry.enable_prometheus(registry)
    return registry


@pytest.fixture
def metrics(monkeypatch):
    """What an application with a meter provider of its own is told."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    monkeypatch.setattr(telemetry, "_instruments", ())
    monkeypatch.setattr(telemetry, "_find_meter", lambda: provider.get_meter("clip_rt"))
    yield reader
    provider.shutdown()


@pytest.fixture
def spans(monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_find_tracer", lambda: provider.get_tracer("clip_rt"))
    yield exporter
    provider.shutdown()


class TestMeasure:
    def test_says_what_was_spent_and_counted(self):
        with telemetry.measure() as timings:
            with telemetry.stage("resize", count=3):
                pass
            telemetry.add("network", 0.25)
            telemetry.add("network", 0.5, count=2)
            telemetry.count("retries", 2)
            telemetry.add("decode", 1.0)
        assert list(timings.seconds) == ["decode", "resize", "network", "total"]
        assert timings.seconds["network"] == 0.75
        assert timings.counts == {"resize": 3, "network": 3, "retries": 2, "decode": 1}
        total_s = timings.seconds["total"]
        assert 0 < timings.seconds["resize"] <= total_s
        assert timings.seconds["total"] == total_s, "it stopped at the end of the block"

    def test_prints_a_table(self):
        with telemetry.measure() as timings:
            telemetry.add("decode", 1.5, count=7)
            telemetry.add("server_queue", 0.5, count=0)
            telemetry.count("cache_hits", 12)
            telemetry.count("failures", 0)
        rows = [line.split() for line in str(timings).splitlines()]
        assert rows[:2] == [["stage", "seconds", "count"], ["decode", "1.5000", "7"]]
        assert rows[2] == ["server_queue", "0.5000"]
        assert rows[3][0] == "total"
        assert rows[4:] == [["cache_hits", "12"]]

    def test_the_inner_of_two_hears_its_part_only(self):
        with telemetry.measure() as outer:
            telemetry.count("images")
            with telemetry.measure() as inner:
                telemetry.count("images", 2)
            telemetry.count("images", 4)
        assert (outer.counts, inner.counts) == ({"images": 7}, {"images": 2})

    def test_time_is_noted_although_the_work_failed(self):
        with (
            telemetry.measure() as timings,
            contextlib.suppress(KeyError),
            telemetry.stage("decode"),
        ):
            raise KeyError
        assert timings.counts == {"decode": 1}

    def test_the_server_is_asked_before_and_after(self):
        class Asked:
            answers = iter([{"server_compute": 10.0}, {"server_compute": 12.5, "server_queue": 1}])

            def server_seconds(self):
                return next(self.answers)

        with telemetry.measure(server=Asked()) as timings:
            assert "server_compute" not in timings.seconds
        assert timings.seconds["server_compute"] == 2.5
        assert timings.seconds["server_queue"] == 1

    def test_hears_nothing_of_another_thread_until_it_is_carried_there(self):
        with telemetry.measure() as timings, ThreadPoolExecutor(1) as pool:
            listeners = telemetry.current()
            pool.submit(telemetry.count, "images").result(60)
            assert timings.counts == {}

            def work():
                with telemetry.within(listeners):
                    telemetry.count("images")

            pool.submit(work).result(60)
            pool.submit(telemetry.count, "images").result(60)
        assert timings.counts == {"images": 1}

    def test_a_shared_batch_is_work_for_all_who_share_it_once_each(self):
        with telemetry.measure() as outer:
            with telemetry.measure() as a:
                of_a = telemetry.current()
            with telemetry.measure() as b:
                of_b = telemetry.current()
        with telemetry.within(of_a, of_b):
            telemetry.add("network", 1.0)
        assert [each.seconds["network"] for each in (outer, a, b)] == [1.0] * 3

    def test_many_threads_lose_nothing(self):
        with telemetry.measure() as timings:
            listeners = telemetry.current()

            def work():
                with telemetry.within(listeners):
                    for _ in range(2000):
                        telemetry.count("images")
                        telemetry.add("decode", 0.5)

            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert timings.counts == {"images": 16_000, "decode": 16_000}
        assert timings.seconds["decode"] == 8_000

    def test_a_generator_may_end_in_another_context(self):
        def work():
            with telemetry.measure():
                yield

        generator = work()
        contextvars.copy_context().run(next, generator)
        generator.close()
        assert telemetry.current() == ()


def test_costs_next_to_nothing_while_nobody_listens(monkeypatch):
    monkeypatch.setattr(telemetry, "_instruments", ())

    def work():
        with telemetry.stage("decode"):
            pass

    # The best of many: what is asked is the code's cost, not the machine's load.
    assert min(timeit.repeat(work, number=1000, repeat=50)) / 1000 < 1e-6
    assert min(timeit.repeat(lambda: telemetry.count("x"), number=1000, repeat=50)) / 1000 < 1e-6


def test_needs_neither_library_and_loads_neither():
    program = """
import sys
from clip_rt import telemetry
assert not {"opentelemetry", "prometheus_client"} & sys.modules.keys()
for name in ("opentelemetry", "prometheus_client"):
    sys.modules[name] = None
with telemetry.measure() as timings, telemetry.call("encode_images"), telemetry.stage("decode"):
    pass
assert timings.counts == {"decode": 1}
try:
    telemetry.enable_prometheus()
except telemetry.InputError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert "pip install 'clip-rt[telemetry]'" in done.stdout


class TestPrometheus:
    def test_counts_calls_errors_stages_and_events(self, registry):
        with telemetry.call("zero_shot", images=2):
            telemetry.add("decode", 0.5)
            telemetry.count("cache_hits", 3)
        with pytest.raises(TextError), telemetry.call("zero_shot"):
            raise TextError(SECRET)
        value = registry.get_sample_value
        assert value("clip_rt_call_seconds_count", {"method": "zero_shot"}) == 2
        assert value("clip_rt_errors_total", {"method": "zero_shot", "error": "TextError"}) == 1
        assert value("clip_rt_stage_seconds_total", {"stage": "decode"}) == 0.5
        assert value("clip_rt_events_total", {"event": "cache_hits"}) == 3
        assert SECRET not in prometheus_client.generate_latest(registry).decode()

    def test_stages_are_timed_though_nobody_measures(self, registry):
        with telemetry.stage("tokenize"):
            pass
        assert registry.get_sample_value("clip_rt_stage_seconds_total", {"stage": "tokenize"}) > 0

    def test_enabling_it_twice_counts_once(self, registry):
        telemetry.enable_prometheus(registry)
        telemetry.count("images")
        assert registry.get_sample_value("clip_rt_events_total", {"event": "images"}) == 1

    def test_its_labels_are_those_that_are_documented(self, registry):
        with telemetry.call("zero_shot"):
            telemetry.add("decode", 0.5)
        assert {
            (sample.name, *sample.labels)
            for family in registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_bucket")
        } == {
            ("clip_rt_call_seconds_count", "method"),
            ("clip_rt_call_seconds_sum", "method"),
            ("clip_rt_stage_seconds_total", "stage"),
        }
        for edge in (*map(str, telemetry.CALL_BUCKETS_S), "+Inf"):
            labels = {"method": "zero_shot", "le": edge}
            assert registry.get_sample_value("clip_rt_call_seconds_bucket", labels) == 1

    def test_refuses_a_registry_that_has_such_metrics(self, registry, monkeypatch):
        monkeypatch.setattr(telemetry, "_instruments", ())
        other = prometheus_client.CollectorRegistry()
        prometheus_client.Histogram("clip_rt_call_seconds", "of others", registry=other)
        with pytest.raises(InputError, match="clip_rt_call_seconds"):
            telemetry.enable_prometheus(other)


APPLICATION = """
import sys
from clip_rt import telemetry
with telemetry.call("before"):
    pass
import opentelemetry.metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
with telemetry.call("unconfigured"):
    pass
reader = InMemoryMetricReader()
opentelemetry.metrics.set_meter_provider(MeterProvider([reader]))
with telemetry.call("encode_texts"):
    telemetry.count("texts", 3)
((scope,),) = [each.scope_metrics for each in reader.get_metrics_data().resource_metrics]
points = [point for each in scope.metrics for point in each.data.data_points]
print(scope.scope.name, *sorted(str(dict(point.attributes)) for point in points), sep=chr(10))
"""


class TestMeter:
    def test_an_application_that_configures_one_hears_of_calls(self, metrics):
        with contextlib.suppress(TextError), telemetry.call("encode_texts"):
            telemetry.add("tokenize", 0.5)
            telemetry.count("retries", 2)
            raise TextError(SECRET)
        data = metrics.get_metrics_data()
        (scope,) = data.resource_metrics[0].scope_metrics
        found = {each.name: (each.unit, each.data.data_points[0]) for each in scope.metrics}
        assert {name: unit for name, (unit, _) in found.items()} == {
            "clip_rt.call": "s",
            "clip_rt.errors": "{error}",
            "clip_rt.stage": "s",
            "clip_rt.events": "{event}",
        }
        call = found["clip_rt.call"][1]
        assert (call.count, dict(call.attributes)) == (1, {"method": "encode_texts"})
        assert call.explicit_bounds == telemetry.CALL_BUCKETS_S
        assert found["clip_rt.errors"][1].attributes["error"] == "TextError"
        assert found["clip_rt.stage"][1].value == 0.5
        assert found["clip_rt.events"][1].value == 2
        assert SECRET not in data.to_json()

    def test_it_may_be_configured_after_the_first_call(self):
        done = subprocess.run(
            [sys.executable, "-c", APPLICATION],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        assert done.stdout.splitlines() == [
            "clip_rt",
            "{'event': 'texts'}",
            "{'method': 'encode_texts'}",
        ]

    def test_prometheus_hears_of_the_same_calls_beside_it(self, metrics):
        registry = prometheus_client.CollectorRegistry()
        telemetry.enable_prometheus(registry)
        with telemetry.call("encode_texts"):
            pass
        labels = {"method": "encode_texts"}
        assert registry.get_sample_value("clip_rt_call_seconds_count", labels) == 1
        assert '"count": 1' in metrics.get_metrics_data().to_json()


class TestSpans:
    def test_a_call_is_a_span_with_what_it_spent(self, spans):
        with telemetry.call("encode_texts", texts=2) as call:
            call.attributes["model"] = "drawings"
            telemetry.add("tokenize", 0.5, count=2)
        (span,) = spans.get_finished_spans()
        assert span.name == "clip_rt.encode_texts"
        assert dict(span.attributes) == {
            "clip_rt.texts": 2,
            "clip_rt.model": "drawings",
            "clip_rt.seconds.tokenize": 0.5,
            "clip_rt.count.tokenize": 2,
        }
        assert telemetry.current() == ()

    def test_an_error_is_named_and_not_quoted(self, spans):
        with pytest.raises(TextError), telemetry.call("encode_texts"):
            raise TextError(SECRET)
        (span,) = spans.get_finished_spans()
        assert span.attributes["error.type"] == "TextError"
        assert span.status.status_code is StatusCode.ERROR
        assert SECRET not in span.to_json()

    def test_what_other_libraries_trace_lies_within(self, spans):
        with telemetry.call("zero_shot"), telemetry.call("class_embeddings"):
            pass
        inner, outer = spans.get_finished_spans()
        assert inner.parent.span_id == outer.context.span_id


class TestStream:
    def test_is_one_call_and_its_consumer_is_not_part_of_it(self, spans, registry):
        def work():
            for number in range(3):
                telemetry.count("images")
                yield number

        items = []
        for item in telemetry.stream("stream_images", work()):
            items.append(item)
            telemetry.count("images", 100)
        assert items == [0, 1, 2]
        (span,) = spans.get_finished_spans()
        assert span.attributes["clip_rt.count.images"] == 3
        labels = {"method": "stream_images"}
        assert registry.get_sample_value("clip_rt_call_seconds_count", labels) == 1

    def test_reports_the_error_it_ends_with(self, registry):
        def work():
            yield 1
            raise TextError(SECRET)

        with pytest.raises(TextError):
            list(telemetry.stream("stream_images", work()))
        labels = {"method": "stream_images", "error": "TextError"}
        assert registry.get_sample_value("clip_rt_errors_total", labels) == 1

    def test_dropped_half_way_it_ends_what_it_reads_and_is_no_error(self, registry):
        is_closed = []

        def work():
            try:
                yield 1
                yield 2
            finally:
                is_closed.append(True)

        stream = telemetry.stream("stream_images", work())
        assert next(stream) == 1
        stream.close()
        assert is_closed == [True]
        assert registry.get_sample_value(
            "clip_rt_call_seconds_count", {"method": "stream_images"}
        ) == 1  # fmt: skip
        assert registry.get_sample_value(
            "clip_rt_errors_total", {"method": "stream_images", "error": "GeneratorExit"}
        ) is None  # fmt: skip


class TestRealCalls:
    def test_their_stages_are_measured_wherever_they_run(self, client):
        images = [np.full((90, 70, 3), shade, np.uint8) for shade in range(100)]
        with telemetry.measure(server=client) as timings:
            client.zero_shot(images, [SECRET, "another"])
        spent = timings.seconds
        assert spent.keys() >= {"resize", "tokenize", "network", "classify", "total"}
        assert spent.keys() >= {"server_queue", "server_compute"}
        assert timings.counts["resize"] == 100
        assert spent["server_compute"] > 0
        assert 0 < spent["classify"] < spent["total"]
        assert SECRET not in str(timings)

    def test_tell_neither_texts_nor_paths_nor_the_words_of_errors(
        self, client, spans, metrics, tmp_path
    ):
        registry = prometheus_client.CollectorRegistry()
        telemetry.enable_prometheus(registry)
        path = tmp_path / "secret-file.png"
        client.zero_shot([np.zeros((64, 64, 3), np.uint8)], [SECRET, "another"])
        with pytest.raises(TextTooLongError):
            client.encode_texts([SECRET * 50])
        with pytest.raises(ImageError):
            client.encode_images([path])
        told = "".join(span.to_json() for span in spans.get_finished_spans())
        told += prometheus_client.generate_latest(registry).decode()
        told += metrics.get_metrics_data().to_json()
        assert {"clip_rt.zero_shot", "TextTooLongError", "ImageError"} <= set(
            re.findall(r"clip_rt\.\w+|\w+Error", told)
        )
        assert SECRET[:9] not in told
        assert "secret-file" not in told
