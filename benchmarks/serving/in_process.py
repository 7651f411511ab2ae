"""Models in this process: what the client adds to the runtime, and how equal a server is."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.contenders.runtimes import load_openvino
from benchmarks.findings import Bar, at_most
from benchmarks.serving.bench import (
    FP16_WEIGHTS,
    INT8,
    SINGLES_A_TURN,
    Bench,
    Found,
    by_turns,
    check_equal,
    describe_latencies,
    one_by_one,
    preprocessed,
)
from benchmarks.serving.images import NUM_SINGLE
from benchmarks.timing import time_once
from clip_rt.specs import image_model

NUM_EQUAL = 64
"""Images that are compared, in bulk and alone."""
MAX_ADDED_MS, MAX_DIFFERENCE = 0.5, 1e-6


def measure_in_process(bench: Bench) -> tuple[Found, list[Bar]]:
    """Embed single arrays by the client and by OpenVINO called directly, both here, by turns."""
    differences = {name: _compare(bench, name) for name in (bench.model, FP16_WEIGHTS, INT8)}
    latencies_s: dict[str, list[float]] = {"in process": [], "openvino": []}
    with bench.client(server="in_process") as client:
        arrays = preprocessed(bench, client)
        encode = load_openvino(bench.onnx_file(image_model(bench.model)))
        check_equal(client.encode_images(arrays[:1]), encode(arrays[0][None]), "in process")
        singly: dict[str, Callable[[int], float]] = {
            "in process": lambda n: time_once(partial(client.encode_images, arrays[n])),
            "openvino": lambda n: time_once(partial(encode, arrays[n][None])),
        }
        turns = {
            name: one_by_one(call, len(arrays), latencies_s[name]) for name, call in singly.items()
        }
        by_turns(turns, NUM_SINGLE // SINGLES_A_TURN, "in process")
    median_s = {name: statistics.median(each) for name, each in latencies_s.items()}
    added_ms = 1e3 * (median_s["in process"] - median_s["openvino"])
    document = {
        "max_differences": differences,
        "single": {name: describe_latencies(each) for name, each in latencies_s.items()},
        "added_ms": round(added_ms, 3),
    }
    bars = [
        at_most(f"in process: difference from the server, {name}", value, MAX_DIFFERENCE)
        for name, value in differences.items()
    ]
    return document, [*bars, at_most("in process: one image, ms added", added_ms, MAX_ADDED_MS)]


def _compare(bench: Bench, model: str) -> float:
    """Return the largest difference of the two ways, in bulk and alone, images and texts."""
    largest = 0.0
    texts = [f"a photo of {number} things" for number in range(NUM_EQUAL)]
    with bench.client(model) as served, bench.client(model, server="in_process") as mine:
        arrays = preprocessed(bench, served)[:NUM_EQUAL]
        for size in (1, NUM_EQUAL):
            for found, expected in (
                (mine.encode_images(arrays[:size]), served.encode_images(arrays[:size])),
                (mine.encode_texts(texts[:size]), served.encode_texts(texts[:size])),
            ):
                largest = max(largest, float(np.abs(found - expected).max()))
    return largest
