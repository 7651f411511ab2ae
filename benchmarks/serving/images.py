"""Images through the client: in bulk, alone, from many threads, from JPEG files."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

import clip_rt
from benchmarks import photos
from benchmarks.findings import Bar, at_least, at_most
from benchmarks.photos import LARGE_PX, SMALL_PX
from benchmarks.serving.bench import (
    BATCH_ROWS,
    INT8,
    SINGLES_A_TURN,
    BareRuntime,
    Bench,
    Found,
    Runtime,
    by_turns,
    check_equal,
    describe_latencies,
    embed_singly,
    one_by_one,
    preprocessed,
    rates,
)
from benchmarks.timing import ratio, time_once
from clip_rt.embedded.bundled import find_model_repository
from clip_rt.requests import dynamic_batching
from clip_rt.specs import image_model

NUM_LARGE = 24
NUM_SINGLE = 200
"""Images that are embedded alone, by turns with and without the client."""
NUM_THREADS = 64
SMALL = "drawings"
"""The bundled model."""
NUM_CALLERS = (1, 4, 16, 64)
NUM_MERGED_IMAGES, NUM_MERGED_TEXTS = 256, 512


def measure_overhead(bench: Bench) -> tuple[Found, list[Bar]]:
    """Embed arrays in bulk and one at a time, through the client and by each runtime without it."""
    with ExitStack() as stack:
        client = stack.enter_context(bench.client())
        arrays = preprocessed(bench, client)
        file, inputs = bench.onnx_file(image_model(bench.model)), np.stack(arrays)
        bare: dict[Runtime, BareRuntime] = {
            runtime: stack.enter_context(BareRuntime(file, inputs, runtime=runtime))
            for runtime in get_args(Runtime)
        }
        found = client.encode_images(arrays)
        differences = {
            runtime: check_equal(found, each.encode(0, len(arrays))[1], f"the client and {runtime}")
            for runtime, each in bare.items()
        }
        # The same runtime gives the same numbers; the other one sums in another order.
        served_by = min(differences, key=differences.__getitem__)
        ways: dict[str, Callable[[], float]] = {
            "client": partial(time_once, partial(client.encode_images, arrays))
        }
        ways |= {name: partial(_in_bulk, each, len(arrays)) for name, each in bare.items()}
        times_s = by_turns(ways, bench.num_rounds, "overhead of batches")
        # By turns of ten: each way reads all the weights, and so leaves the caches of the
        # processor to the next cold, which nobody finds who calls one of them all the time.
        singly: dict[str, Callable[[int], float]] = {
            "client": lambda n: time_once(partial(client.encode_images, arrays[n])),
            "onnxruntime": bare["onnxruntime"].encode_one,
            "openvino": bare["openvino"].encode_one,
        }
        latencies_s: dict[str, list[float]] = {name: [] for name in singly}
        turns = {
            name: one_by_one(call, len(arrays), latencies_s[name]) for name, call in singly.items()
        }
        by_turns(turns, NUM_SINGLE // SINGLES_A_TURN, "overhead of one")
    document = {
        "num_images": len(arrays),
        "batch_rows": BATCH_ROWS,
        "max_differences": differences,
        "served_by": served_by,
        "bulk": rates(times_s, len(arrays), "images"),
        "share_of_default": round(ratio(times_s["onnxruntime, its default"], times_s["client"]), 4),
        "single": {name: describe_latencies(each) for name, each in latencies_s.items()},
    }
    median_s = {name: statistics.median(each) for name, each in latencies_s.items()}
    bars = []
    names: dict[Runtime, str] = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    for runtime, name in names.items():
        what = f"{name}, which serves it" if runtime == served_by else name
        share = ratio(times_s[runtime], times_s["client"])
        added_ms = 1e3 * (median_s["client"] - median_s[runtime])
        bars += [
            at_least(f"overhead: bulk, of {what}", share, 0.95),
            at_most(f"overhead: one image, ms added to {what}", added_ms, 2.0),
        ]
    return document, bars


def _in_bulk(bare: BareRuntime, num_rows: int) -> float:
    """Embed all rows and return the seconds of it all."""
    return sum(bare.encode(0, num_rows)[0])


def measure_threads(bench: Bench) -> tuple[Found, list[Bar]]:
    """Embed every image alone, from many threads, and all of them in one call."""
    latencies_s: list[float] = []
    with bench.client() as client:
        arrays = preprocessed(bench, client)
        expected = client.encode_images(arrays)
        encode = client.encode_images
        embed_singly(encode, arrays, expected, NUM_THREADS, [])
        ways = {
            "bulk": partial(time_once, partial(encode, arrays)),
            "threads": partial(embed_singly, encode, arrays, expected, NUM_THREADS, latencies_s),
        }
        times_s = by_turns(ways, bench.num_rounds, f"{NUM_THREADS} threads")
    latency = describe_latencies(latencies_s)
    document = {
        "num_threads": NUM_THREADS,
        "num_images": len(arrays),
        "throughput": rates(times_s, len(arrays), "images"),
        "latency": latency,
    }
    share = ratio(times_s["bulk"], times_s["threads"])
    spread = latency["p99_ms"] / latency["p50_ms"]
    return document, [
        at_least("threads, of bulk", share, 0.9),
        at_most("threads, p99 of median", spread, 3.0),
    ]


def measure_jpeg(bench: Bench) -> tuple[Found, list[Bar]]:
    """Embed JPEG files, and the arrays that they become."""
    encoded = photos.jpegs(SMALL_PX, bench.num_images)
    document: Found = {"pictures": photos.describe() | {"size_px": SMALL_PX, "num": len(encoded)}}
    shares = {}
    for precision, model in ("fp32", bench.model), (INT8, INT8):
        with bench.client(model) as client:
            arrays = preprocessed(bench, client)
            expected = client.encode_images(arrays)
            difference = check_equal(client.encode_images(encoded), expected, "JPEG and arrays")
            ways = {
                name: partial(time_once, partial(client.encode_images, items))
                for name, items in (("arrays", arrays), ("jpeg", encoded))
            }
            times_s = by_turns(ways, bench.num_rounds, f"JPEG, {precision}")
        shares[precision] = ratio(times_s["arrays"], times_s["jpeg"])
        document[precision] = {
            "max_difference": difference,
            "throughput": rates(times_s, len(encoded), "images"),
            "share": round(shares[precision], 4),
        }
    return document, [at_least("JPEG, of arrays", shares["fp32"], 0.85)]


def measure_large_jpeg(bench: Bench) -> tuple[Found, list[Bar]]:
    """Embed JPEG files of 12 megapixels with INT8, decoded exactly and fast."""
    encoded = photos.jpegs(LARGE_PX, min(NUM_LARGE, bench.num_images))
    with bench.client(INT8) as exact, bench.client(INT8, decode="fast") as fast:
        cosines = np.sum(exact.encode_images(encoded) * fast.encode_images(encoded), axis=1)
        ways = {
            name: partial(time_once, partial(client.encode_images, encoded))
            for name, client in (("exact", exact), ("fast", fast))
        }
        times_s = by_turns(ways, bench.num_rounds, "JPEG of 12 megapixels")
    document = {
        "pictures": photos.describe() | {"size_px": LARGE_PX, "num": len(encoded)},
        "min_cosine": round(float(cosines.min()), 6),
        "throughput": rates(times_s, len(encoded), "images"),
    }
    speed = ratio(times_s["exact"], times_s["fast"])
    return document, [at_least("fast, times exact", speed, 3.0)]


def measure_merging(bench: Bench) -> tuple[Found, list[Bar]]:
    """Embed single images and single short texts from more and more threads.

    With the client joining what waits into full requests, and with every item sent at once, alone,
    for Triton's dynamic batching to join. On a large model and on a small one: where a batch costs
    little, what is around it counts.
    """
    document: Found = {}
    for model, repository in (bench.model, bench.repository), (SMALL, find_model_repository()):
        with replace(bench, model=model, repository=repository).client() as client:
            document[model] = _compare_merging(bench, client, model)
    return document, []


def _compare_merging(bench: Bench, client: clip_rt.Client, model: str) -> list[Found]:
    towers: dict[str, tuple[Callable[[Any], NDArray[np.float32]], list[Any]]] = {
        "image": (client.encode_images, preprocessed(bench, client)[:NUM_MERGED_IMAGES]),
        "text": (
            client.encode_texts,
            [f"a photo of the number {n}." for n in range(NUM_MERGED_TEXTS)],
        ),
    }
    rows = []
    for (tower, (encode, items)), num_threads in itertools.product(towers.items(), NUM_CALLERS):
        latencies_s: dict[str, list[float]] = {"client": [], "triton": []}
        run = partial(embed_singly, encode, items, encode(items), num_threads)
        ways: dict[str, Callable[[], float]] = {
            "client": partial(run, latencies_s["client"]),
            "triton": merging_left_to_triton(partial(run, latencies_s["triton"])),
        }
        times_s = by_turns(ways, bench.num_rounds, f"{model}, {tower}s, {num_threads} threads")
        throughput = rates(times_s, len(items), f"{tower}s")
        found = {name: throughput[name] | describe_latencies(latencies_s[name]) for name in ways}
        speed = round(ratio(times_s["triton"], times_s["client"]), 4)
        rows.append({"tower": tower, "num_threads": num_threads, "speed": speed, "ways": found})
    return rows


def merging_left_to_triton(call: Callable[[], float]) -> Callable[[], float]:
    """Make of a call one during which clients send every batch at once and alone.

    Not an option of theirs: nobody needs it.
    """

    def changed() -> float:
        with (
            patch.object(dynamic_batching, "MAX_IN_FLIGHT", 1024),
            patch.object(dynamic_batching.DynamicBatcher, "_take_joinable", lambda self, first: []),
        ):
            return call()

    return changed
