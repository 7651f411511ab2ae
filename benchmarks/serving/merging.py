"""Single items from many threads: joined by the client, or left to Triton's dynamic batching."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

import clip_rt
from benchmarks.findings import Bar
from benchmarks.serving.bench import Bench, embed_singly, preprocessed
from benchmarks.serving.timing import Found, by_turns, describe_latencies, rates, ratio
from clip_rt.embedded.bundled import find_model_repository
from clip_rt.requests import dynamic_batching

SMALL = "drawings"
"""The bundled model."""
NUM_CALLERS = (1, 4, 16, 64)
NUM_MERGED_IMAGES, NUM_MERGED_TEXTS = 256, 512


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
