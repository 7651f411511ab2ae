"""What HTTP adds: JPEG files through the gateway and through the client, one caller and sixteen."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import httpx
import numpy as np
from numpy.typing import NDArray

import clip_rt
from benchmarks import photos
from benchmarks.findings import Bar, at_least, at_most
from benchmarks.photos import SMALL_PX
from benchmarks.serving.bench import (
    INT8,
    Bench,
    Found,
    by_turns,
    check_equal,
    describe_latencies,
    embed_singly,
    one_by_one,
    rates,
)
from benchmarks.timing import ratio, time_once

NUM_CALLERS = 16
NUM_IMAGES = 256
MIN_SHARE, MAX_ADDED_MS = 0.9, 3.0


@contextmanager
def started(bench: Bench) -> Iterator[str]:
    """Run the gateway over the repository in a process of its own; yield its address."""
    command = [sys.executable, "-m", "clip_rt", "gateway", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--repository", str(bench.repository)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().partition(" on ")[2].strip()
    finally:
        process.terminate()
        process.communicate(timeout=60)


def measure_gateway(bench: Bench) -> tuple[Found, list[Bar]]:
    """Embed JPEG files over HTTP, as OpenAI's library sends them, and by the client."""
    encoded = photos.jpegs(SMALL_PX, min(bench.num_images, NUM_IMAGES))
    document: Found = {"pictures": photos.describe() | {"size_px": SMALL_PX, "num": len(encoded)}}
    bars: list[Bar] = []
    with started(bench) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        for precision, model in ("fp32", bench.model), (INT8, INT8):
            with bench.client(model) as client:
                document[precision], found = _compare(bench, client, http, model, encoded)
            bars += [replace(each, what=f"{each.what}, {precision}") for each in found]
    return document, bars


def _compare(
    bench: Bench, client: clip_rt.Client, http: httpx.Client, model: str, encoded: list[bytes]
) -> tuple[Found, list[Bar]]:
    expected = client.encode_images(encoded)
    by_http = partial(_embed, http, model)
    ways: dict[str, Callable[[bytes], NDArray[np.float32]]] = {
        "client": client.encode_images,
        "gateway": by_http,
    }
    difference = check_equal(
        np.concatenate([by_http(each) for each in encoded]), expected, "gateway and client"
    )
    alone_s: dict[str, list[float]] = {name: [] for name in ways}
    singles = {
        name: one_by_one(_timed(encode, encoded), len(encoded), alone_s[name])
        for name, encode in ways.items()
    }
    by_turns(singles, bench.num_rounds, f"{model}, 1 caller")
    together_s: dict[str, list[float]] = {name: [] for name in ways}
    many = {
        name: partial(embed_singly, encode, encoded, expected, NUM_CALLERS, together_s[name])
        for name, encode in ways.items()
    }
    times_s = by_turns(many, bench.num_rounds, f"{model}, {NUM_CALLERS} callers")
    share = ratio(times_s["client"], times_s["gateway"])
    medians_ms = {name: 1e3 * float(np.median(each)) for name, each in alone_s.items()}
    added_ms = medians_ms["gateway"] - medians_ms["client"]
    found = {
        "max_difference": difference,
        "alone": {name: describe_latencies(each) for name, each in alone_s.items()},
        "added_ms": round(added_ms, 3),
        "together": {name: describe_latencies(each) for name, each in together_s.items()},
        "throughput": rates(times_s, len(encoded), "images"),
        "share": round(share, 4),
    }
    return found, [
        at_least(f"gateway, {NUM_CALLERS} callers, of the client", share, MIN_SHARE),
        at_most("gateway, 1 caller, ms added", added_ms, MAX_ADDED_MS),
    ]


def _timed(
    encode: Callable[[bytes], NDArray[np.float32]], encoded: list[bytes]
) -> Callable[[int], float]:
    return lambda number: time_once(partial(encode, encoded[number]))


def _embed(http: httpx.Client, model: str, jpeg: bytes) -> NDArray[np.float32]:
    """Ask for the embedding of an image, float32 (1, D)."""
    uri = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    body = {"model": model, "input": [uri], "encoding_format": "base64"}
    answer = http.post("/v1/embeddings", content=json.dumps(body))
    answer.raise_for_status()
    (row,) = answer.json()["data"]
    return np.frombuffer(base64.b64decode(row["embedding"]), "<f4")[None]
