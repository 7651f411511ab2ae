"""Images through the client: in bulk, alone, from many threads, from JPEG files."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import get_args

import numpy as np

from benchmarks import photos
from benchmarks.findings import Bar
from benchmarks.serving.bare_runtime import BATCH_ROWS, BareRuntime, Runtime
from benchmarks.serving.bench import (
    INT8,
    LARGE_PX,
    SMALL_PX,
    Bench,
    check_equal,
    embed_singly,
    pictures,
    preprocessed,
)
from benchmarks.serving.timing import (
    SINGLES_A_TURN,
    Found,
    by_turns,
    describe_latencies,
    one_by_one,
    rates,
    ratio,
    timed,
)
from clip_rt.specs import image_model

NUM_LARGE = 24
NUM_SINGLE = 200
"""Images that are embedded alone, by turns with and without the client."""
NUM_THREADS = 64


def measure_overhead(bench: Bench) -> tuple[Found, list[Bar]]:
    """Embed arrays in bulk and one at a time, through the client and by each runtime without it."""
    with ExitStack() as stack:
        client = stack.enter_context(bench.client())
        arrays = preprocessed(bench, client)
        file, inputs = bench.onnx_file(image_model(bench.model)), np.stack(arrays)
        bare: dict[Runtime, BareRuntime] = {
            runtime: stack.enter_context(BareRuntime(file, inputs, bench.scratch, runtime=runtime))
            for runtime in get_args(Runtime)
        }
        found = client.encode_images(arrays)
        differences = {
            runtime: check_equal(found, each.encode(0, len(arrays))[1], f"the client and {runtime}")
            for runtime, each in bare.items()
        }
        # The same runtime gives the same numbers; the other one sums in another order.
        served_by = min(differences, key=differences.__getitem__)
        in_bulk: dict[str, Callable[[], float]] = {
            runtime: partial(_in_bulk, each, len(arrays)) for runtime, each in bare.items()
        }
        times_s = by_turns(
            {"client": timed(partial(client.encode_images, arrays)), **in_bulk},
            bench.num_rounds,
            "overhead of batches",
        )
        # By turns of ten: each way reads all the weights, and so leaves the caches of the
        # processor to the next cold, which nobody finds who calls one of them all the time.
        singly: dict[str, Callable[[int], float]] = {
            "client": lambda n: timed(partial(client.encode_images, arrays[n]))(),
            "onnxruntime": bare["onnxruntime"].encode_one,
            "openvino": bare["openvino"].encode_one,
        }
        latencies_s: dict[str, list[float]] = {name: [] for name in singly}
        by_turns(
            {
                name: one_by_one(call, len(arrays), latencies_s[name])
                for name, call in singly.items()
            },
            NUM_SINGLE // SINGLES_A_TURN,
            "overhead of one",
        )
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
            Bar(what=f"overhead: bulk, of {what}", value=share, limit=0.95, side="at least"),
            Bar(
                what=f"overhead: one image, ms added to {what}",
                value=added_ms,
                limit=2.0,
                side="at most",
            ),
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
        times_s = by_turns(
            {
                "bulk": timed(partial(encode, arrays)),
                "threads": partial(
                    embed_singly, encode, arrays, expected, NUM_THREADS, latencies_s
                ),
            },
            bench.num_rounds,
            f"{NUM_THREADS} threads",
        )
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
        Bar(what="threads, of bulk", value=share, limit=0.9, side="at least"),
        Bar(what="threads, p99 of median", value=spread, limit=3.0, side="at most"),
    ]


def measure_jpeg(bench: Bench) -> tuple[Found, list[Bar]]:
    """Embed JPEG files, and the arrays that they become."""
    encoded = pictures(SMALL_PX, bench.num_images)
    document: Found = {"pictures": photos.describe() | {"size_px": SMALL_PX, "num": len(encoded)}}
    shares = {}
    for precision, model in ("fp32", bench.model), (INT8, INT8):
        with bench.client(model) as client:
            arrays = preprocessed(bench, client)
            expected = client.encode_images(arrays)
            difference = check_equal(client.encode_images(encoded), expected, "JPEG and arrays")
            times_s = by_turns(
                {
                    "arrays": timed(partial(client.encode_images, arrays)),
                    "jpeg": timed(partial(client.encode_images, encoded)),
                },
                bench.num_rounds,
                f"JPEG, {precision}",
            )
        shares[precision] = ratio(times_s["arrays"], times_s["jpeg"])
        document[precision] = {
            "max_difference": difference,
            "throughput": rates(times_s, len(encoded), "images"),
            "share": round(shares[precision], 4),
        }
    return document, [
        Bar(what="JPEG, of arrays", value=shares["fp32"], limit=0.85, side="at least")
    ]


def measure_large_jpeg(bench: Bench) -> tuple[Found, list[Bar]]:
    """Embed JPEG files of 12 megapixels with INT8, decoded exactly and fast."""
    encoded = pictures(LARGE_PX, min(NUM_LARGE, bench.num_images))
    with bench.client(INT8) as exact, bench.client(INT8, decode="fast") as fast:
        cosines = np.sum(exact.encode_images(encoded) * fast.encode_images(encoded), axis=1)
        times_s = by_turns(
            {
                "exact": timed(partial(exact.encode_images, encoded)),
                "fast": timed(partial(fast.encode_images, encoded)),
            },
            bench.num_rounds,
            "JPEG of 12 megapixels",
        )
    document = {
        "pictures": photos.describe() | {"size_px": LARGE_PX, "num": len(encoded)},
        "min_cosine": round(float(cosines.min()), 6),
        "throughput": rates(times_s, len(encoded), "images"),
    }
    speed = ratio(times_s["exact"], times_s["fast"])
    return document, [Bar(what="fast, times exact", value=speed, limit=3.0, side="at least")]
