"""ImageNet's classifier: cold, and then from what is cached on disk and in memory."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

import clip_rt
from benchmarks.contenders.implementation import TEMPLATES, prompts_of
from benchmarks.findings import Bar, at_least, at_most
from benchmarks.serving.bench import (
    BATCH_ROWS,
    TIMEOUT_S,
    BareRuntime,
    Bench,
    Found,
    acquired,
    check_equal,
    console,
)
from benchmarks.timing import ratio, time_once
from clip_rt.classification import zero_shot
from clip_rt.specs import text_model

NUM_NEW_LABELS = 10
PADDED_SHARE = 0.05
"""Of the classes whose prompts are embedded at 77 tokens; all of them would take half an hour."""


@cache
def class_names() -> tuple[str, ...]:
    """Return ImageNet's 1,000 classes as OpenAI names them."""
    # Here, because of all that comes with it, which the process of `_ask_once` does not need.
    from benchmarks.suites.plan import imagenet_names

    return tuple(imagenet_names())


def measure_classifier(bench: Bench) -> tuple[Found, list[Bar]]:
    """Make the classifier cold, and a random part of it from prompts padded to 77 tokens.

    The padded part is run in halves, before and after. ONNX Runtime runs it directly, so that it
    does not pay for a server.
    """
    labels = class_names()[: bench.num_classes]
    num_padded = max(2, round(PADDED_SHARE * len(labels)))
    chosen = np.random.default_rng(0).permutation(len(labels))[:num_padded]
    tokens = clip_rt.tokenize(prompts_of([labels[n] for n in chosen]))
    middle = len(tokens) // 2
    file = bench.onnx_file(text_model(bench.model))
    with (
        bench.client(cache_dir=bench.scratch / "cache") as client,
        BareRuntime(file, tokens) as bare,
        console.status(f"a classifier of {len(labels)} classes"),
    ):
        # What only the first request pays.
        client.encode_texts("a photo of a cat.")
        bare.encode(0, BATCH_ROWS)
        before_s, first_rows = bare.encode(0, middle)
        start_s = time.perf_counter()
        class_CE = client.class_embeddings(labels, templates=TEMPLATES)
        cold_s = time.perf_counter() - start_s
        after_s, other_rows = bare.encode(middle, len(tokens))
    rows = np.concatenate([first_rows, other_rows]).reshape(num_padded, -1, class_CE.shape[1])
    difference = check_equal(class_CE[chosen], zero_shot.pool(rows), "cold and padded")
    padded_s = (sum(before_s) + sum(after_s)) * len(labels) / num_padded
    document = {
        "num_classes": len(labels),
        "num_prompts": len(labels) * rows.shape[1],
        "max_difference": difference,
        "cold_s": round(cold_s, 2),
        "padded": {
            "what": "ONNX Runtime called directly on random classes, scaled to all",
            "num_classes": num_padded,
            "halves_s": [round(sum(each), 2) for each in (before_s, after_s)],
            "scaled_s": round(padded_s, 1),
        },
    }
    return document, [at_least("classifier, times padded", padded_s / cold_s, 7.0)]


def measure_cache(bench: Bench) -> tuple[Found, list[Bar]]:
    """Ask for the classifier again: in another process, in this one, and with a few new labels."""
    labels = class_names()[: bench.num_classes]
    known = labels[: len(labels) - NUM_NEW_LABELS]
    folder = bench.scratch / "cache"
    with bench.client(cache_dir=folder) as client, bench.client(cache_bytes=0) as forgetful:
        with console.status("fill the cache"):
            expected = client.class_embeddings(labels, templates=TEMPLATES)
        disk_s = []
        for _ in track(range(bench.num_rounds), "from disk", console=console, transient=True):
            each_s, found = _ask_new_process(bench, folder, labels)
            check_equal(found, expected, "from disk")
            disk_s.append(each_s)
        ask = partial(client.class_embeddings, labels, templates=TEMPLATES)
        check_equal(ask(), expected, "from memory")
        memory_s = [time_once(ask) for _ in range(51)]
        partial_s: dict[str, list[float]] = {"new alone": [], "known and new": []}
        rounds = track(range(bench.num_rounds), "new labels", console=console, transient=True)
        for round_ in rounds:
            # New in each round, and of equal cost: the same for both.
            new = tuple(f"{label} {round_}" for label in labels[:NUM_NEW_LABELS])
            for name, asked, asks in (
                ("new alone", forgetful, new),
                ("known and new", client, known + new),
            ):
                call = partial(asked.class_embeddings, asks, templates=TEMPLATES)
                partial_s[name].append(time_once(call))
            again = client.class_embeddings(new, templates=TEMPLATES)
            check_equal(again, forgetful.class_embeddings(new, templates=TEMPLATES), "new labels")
    document = {
        "num_classes": len(labels),
        "disk": {
            "what": "the call in a new process whose client has connected; imports not counted",
            "rounds_ms": [round(1e3 * each, 2) for each in disk_s],
        },
        "memory_ms": round(1e3 * statistics.median(memory_s), 3),
        "new_labels": {
            name: [round(each, 3) for each in times] for name, times in partial_s.items()
        },
    }
    what = f"{len(known)} known and {NUM_NEW_LABELS} new, of {NUM_NEW_LABELS}"
    return document, [
        at_most("from disk, ms", 1e3 * statistics.median(disk_s), 100.0),
        at_most("from memory, ms", 1e3 * statistics.median(memory_s), 2.0),
        at_most(what, ratio(partial_s["known and new"], partial_s["new alone"]), 1.2),
    ]


def _ask_new_process(
    bench: Bench, folder: Path, labels: tuple[str, ...]
) -> tuple[float, NDArray[np.float32]]:
    """Time one call of a client in a process of its own, with the cache in `folder`."""
    with (
        acquired(bench.repository) as server,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        return pool.submit(_ask_once, server.url, bench.model, folder, labels).result()


def _ask_once(
    url: str, model: str, folder: Path, labels: tuple[str, ...]
) -> tuple[float, NDArray[np.float32]]:
    """Be the other process of `_ask_new_process`."""
    with clip_rt.Client(url, model=model, cache_dir=folder, timeout_s=TIMEOUT_S) as client:
        _ = client.manifest
        start_s = time.perf_counter()
        class_CE = client.class_embeddings(labels, templates=TEMPLATES)
        return time.perf_counter() - start_s, class_CE
