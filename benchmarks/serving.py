r"""What the client adds to the server behind it, held against bars: ViT-B/32, the embedded Triton.

    python -m benchmarks.serving
    python -m benchmarks.serving --only overhead,threads
    python -m benchmarks.serving --only classifier,cache --num-classes 100    # a quick look

Weights are random, since speed does not depend on them; the command of every export writes them
into a repository that is removed at the end. Everything is measured on one machine in one run, the
ways that are compared by turns, and what they answer is compared before anything is timed.

The measure of the client is a runtime called directly: ONNX Runtime, and OpenVINO, which runs the
FP32 models of the server. A process of its own loads the same file with the options that the server
uses, so with the same number of threads, which spin for a moment only. A process of its own,
because its threads must not be counted among the client's; and never at work while the client is,
because they would share the cores. With ONNX Runtime's own default, whose threads spin for long, it
is measured as well: a server that did would take the cores of its client.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from unittest.mock import patch

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

import clip_rt
from benchmarks import photos
from benchmarks.findings import Bar
from benchmarks.record import save
from clip_rt import lane, prompts, zero_shot
from clip_rt.client import CACHE_VARIABLE, CHECKOUT_REPOSITORY
from clip_rt.server import EmbeddedServer, borrow, give_back
from clip_rt.specs import image_model, text_model

ROOT = Path(__file__).parents[1]
MODEL = "ViT-B/32"
INT8 = "int8"
"""Name under which the INT8 form of the model is served."""
BATCH_ROWS = 32
TEMPLATES = "openai_imagenet"
SMALL_PX, LARGE_PX = (640, 480), (4000, 3000)
NUM_LARGE = 24
SINGLES_A_TURN = 10
NUM_SINGLE = 200
"""Images that are embedded alone, by turns with and without the client."""
NUM_THREADS = 64
NUM_NEW_LABELS = 10
PADDED_SHARE = 0.05
"""Of the classes whose prompts are embedded at 77 tokens; all of them would take half an hour."""
SMALL = "drawings"
"""The bundled model."""
NUM_CALLERS = (1, 4, 16, 64)
NUM_MERGED_IMAGES, NUM_MERGED_TEXTS = 256, 512
TIMEOUT_S = 3600.0
START_TIMEOUT_S = 300.0
MAX_DIFFERENCE = 1e-4
"""Between embeddings of the same picture in batches of other sizes: sums in another order."""

console = Console()
Array = NDArray[Any]
Found = dict[str, Any]
Runtime = Literal["onnxruntime", "onnxruntime, its default", "openvino"]
"""What `BareRuntime` can be; the second is ONNX Runtime whose threads spin as it likes best."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, and how much of it."""

    repository: Path
    """Holds `model` in FP32 and `INT8`."""
    scratch: Path
    """For inputs of other processes and for caches."""
    model: str
    num_images: int
    num_rounds: int
    num_classes: int

    def client(self, model: str | None = None, **options: Any) -> clip_rt.Client:
        """Return a client of the embedded server over the repository."""
        return clip_rt.Client(
            repository=self.repository,
            model=model or self.model,
            timeout_s=TIMEOUT_S,
            start_timeout_s=START_TIMEOUT_S,
            **options,
        )

    def onnx_file(self, name: str) -> Path:
        """Return the file of a Triton model."""
        return self.repository / name / "1" / "model.onnx"


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """Make of a call one that returns how long it took, in seconds."""

    def measure() -> float:
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s

    return measure


def by_turns(
    ways: Mapping[str, Callable[[], float]], num_rounds: int, what: str
) -> dict[str, list[float]]:
    """Time every way once in each round, and begin each round with another.

    Args:
        ways: Each returns its time in seconds.
        num_rounds: How often.
        what: Said beside the progress.
    """
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for n in track(range(num_rounds), description=what, console=console, transient=True):
        first = n % len(names)
        for name in names[first:] + names[:first]:
            times_s[name].append(ways[name]())
    return times_s


def one_by_one(
    call: Callable[[int], float], num_items: int, latencies_s: list[float]
) -> Callable[[], float]:
    """Make of a call for one item a turn of `SINGLES_A_TURN`, each going on where the last ended.

    Args:
        call: Gets the number of an item, and returns its time in seconds.
        num_items: After the last comes the first again.
        latencies_s: Gets the seconds of each call.
    """
    numbers = itertools.cycle(range(num_items))

    def turn() -> float:
        each_s = [call(n) for n in itertools.islice(numbers, SINGLES_A_TURN)]
        latencies_s.extend(each_s)
        return sum(each_s)

    return turn


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return the median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def rates(times_s: Mapping[str, Sequence[float]], num_items: int, unit: str) -> Found:
    """Return the median throughput of each way, and all its rounds."""
    return {
        name: {
            f"{unit}_per_s": round(num_items / statistics.median(times), 2),
            "rounds_s": [round(each, 4) for each in times],
        }
        for name, times in times_s.items()
    }


def check_equal(found: Array, expected: Array, what: str) -> float:
    """Return the largest difference of two sets of embeddings.

    Raises:
        ValueError: they are not the same embeddings; then no time of theirs means anything.
    """
    if found.shape != expected.shape:
        raise ValueError(f"{what}: embeddings are {found.shape} and {expected.shape}")
    difference = float(np.abs(found - expected).max())
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(f"{what}: embeddings differ by {difference:.1e}, above {MAX_DIFFERENCE}")
    return difference


class BareRuntime:
    """A runtime on one tower in a process of its own, which works only when it is asked to.

    Args:
        file: The tower, ONNX.
        inputs: Rows it may be asked for; saved to `scratch`.
        scratch: Folder.
        runtime: What runs it.
    """

    def __init__(
        self, file: Path, inputs: Array, scratch: Path, *, runtime: Runtime = "onnxruntime"
    ) -> None:
        rows_file = scratch / f"{file.parents[1].name}_inputs.npy"
        np.save(rows_file, inputs)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_run_bare, args=(theirs, file, rows_file, runtime), daemon=True
        )
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def __enter__(self) -> BareRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def encode(self, start: int, stop: int) -> tuple[list[float], NDArray[np.float32]]:
        """Embed some rows, `BATCH_ROWS` at a time.

        Returns:
            Seconds of each batch, measured over there, and float32 (stop - start, D).
        """
        return self._ask(start, stop, BATCH_ROWS)

    def encode_one(self, row: int) -> float:
        """Embed one row alone, and return the seconds it took over there."""
        (time_s,), _ = self._ask(row, row + 1, 1)
        return time_s

    def _ask(self, *order: int) -> tuple[list[float], NDArray[np.float32]]:
        self._pipe.send(order)
        answer: tuple[list[float], NDArray[np.float32]] = self._pipe.recv()
        return answer


def _run_bare(pipe: Connection, file: Path, rows_file: Path, runtime: Runtime) -> None:
    """Be the other process of `BareRuntime`, until its end of the pipe is closed."""
    # Here, so that each is loaded only where it is run.
    if runtime == "openvino":
        from benchmarks.contenders import openvino

        encode = openvino.load(file)
    else:
        from benchmarks.contenders import onnxruntime

        encode = onnxruntime.load(file, is_default=runtime != "onnxruntime")
    rows = np.load(rows_file)
    pipe.send("ready")
    while True:
        try:
            start, stop, batch_rows = pipe.recv()
        except EOFError:
            return
        parts, times_s = [], []
        for first in range(start, stop, batch_rows):
            batch = rows[first : min(first + batch_rows, stop)]
            start_s = time.perf_counter()
            embeddings = encode(batch)
            times_s.append(time.perf_counter() - start_s)
            parts.append(embeddings)
        pipe.send((times_s, np.concatenate(parts)))


# Both with the options of export/python_model.py, and each imported by its own process only.


def run_threads(
    call: Callable[[int], object], num_calls: int, num_threads: int
) -> tuple[float, list[float]]:
    """Make calls from threads that begin together, each thread one after another.

    Args:
        call: Gets the number of the call, 0 to `num_calls` - 1, each once.
        num_calls: Of all threads.
        num_threads: How many.

    Returns:
        Seconds from the common start to the last end, and the seconds of each call. What a call
        raises is raised.
    """
    barrier = threading.Barrier(num_threads + 1)

    def work(first: int) -> list[float]:
        measures = [timed(partial(call, n)) for n in range(first, num_calls, num_threads)]
        barrier.wait()
        return [measure() for measure in measures]

    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(work, first) for first in range(num_threads)]
        barrier.wait()
        start_s = time.perf_counter()
        latencies_s = [each for future in futures for each in future.result()]
        return time.perf_counter() - start_s, latencies_s


def embed_singly(
    encode: Callable[[Any], NDArray[np.float32]],
    items: Sequence[Any],
    expected_NE: NDArray[np.float32],
    num_threads: int,
    latencies_s: list[float],
) -> float:
    """Embed every item in a call of its own, check all rows, and return the seconds of it all.

    Args:
        encode: A method of a client.
        items: N images or texts.
        expected_NE: What they are embedded to in bulk.
        num_threads: That call at once.
        latencies_s: Gets the seconds of each call.
    """
    found_NE = np.zeros_like(expected_NE)

    def call(n: int) -> None:
        (found_NE[n],) = encode(items[n])

    elapsed_s, each_s = run_threads(call, len(items), num_threads)
    check_equal(found_NE, expected_NE, f"items alone, from {num_threads} threads,")
    latencies_s += each_s
    return elapsed_s


def describe_latencies(latencies_s: Sequence[float]) -> dict[str, float]:
    """Return percentiles in milliseconds."""
    return {
        f"p{percent}_ms": round(1e3 * float(np.percentile(latencies_s, percent)), 2)
        for percent in (50, 90, 99)
    }


@cache
def pictures(size: tuple[int, int], num: int) -> list[bytes]:
    """Return JPEG files of that many pictures."""
    indices = track(range(num), description="draw pictures", console=console, transient=True)
    return [photos.jpeg(size, index) for index in indices]


def preprocessed(bench: Bench, client: clip_rt.Client) -> list[Array]:
    """Return the small pictures as the model reads them, uint8 (S, S, 3) each."""
    encoded = pictures(SMALL_PX, bench.num_images)
    return list(clip_rt.preprocess(encoded, side_px=client.manifest.side_px))


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


@cache
def class_names() -> tuple[str, ...]:
    """Return ImageNet's 1,000 classes as OpenAI names them."""
    # Here, because of all that comes with it, which the processes of `BareRuntime` do not need.
    from benchmarks.suites.plan import imagenet_names

    return tuple(imagenet_names())


def padded_tokens(labels: Sequence[str]) -> NDArray[np.int32]:
    """Return the prompts of the labels, one after another, int32 (N, 77)."""
    templates = prompts.find_templates(TEMPLATES)
    return clip_rt.tokenize([prompts.fill(each, label) for label in labels for each in templates])


def measure_classifier(bench: Bench) -> tuple[Found, list[Bar]]:
    """Make the classifier cold, and a random part of it from prompts padded to 77 tokens.

    The padded part is run in halves, before and after. ONNX Runtime runs it directly, so that it
    does not pay for a server.
    """
    labels = class_names()[: bench.num_classes]
    num_padded = max(2, round(PADDED_SHARE * len(labels)))
    chosen = np.random.default_rng(0).permutation(len(labels))[:num_padded]
    tokens = padded_tokens([labels[n] for n in chosen])
    middle = len(tokens) // 2
    file = bench.onnx_file(text_model(bench.model))
    with (
        bench.client(cache_dir=bench.scratch / "cache") as client,
        BareRuntime(file, tokens, bench.scratch) as bare,
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
    return document, [
        Bar(what="classifier, times padded", value=padded_s / cold_s, limit=7.0, side="at least")
    ]


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
        memory_s = [timed(ask)() for _ in range(51)]
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
                partial_s[name].append(timed(call)())
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
    return document, [
        Bar(
            what="from disk, ms",
            value=1e3 * statistics.median(disk_s),
            limit=100.0,
            side="at most",
        ),
        Bar(
            what="from memory, ms",
            value=1e3 * statistics.median(memory_s),
            limit=2.0,
            side="at most",
        ),
        Bar(
            what=f"{len(known)} known and {NUM_NEW_LABELS} new, of {NUM_NEW_LABELS}",
            value=ratio(partial_s["known and new"], partial_s["new alone"]),
            limit=1.2,
            side="at most",
        ),
    ]


def _ask_new_process(
    bench: Bench, folder: Path, labels: tuple[str, ...]
) -> tuple[float, NDArray[np.float32]]:
    """Time one call of a client in a process of its own, with the cache in `folder`."""
    with borrowed(bench.repository) as server:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, server.url, bench.model, folder, labels)
        process = context.Process(target=_ask_once, args=arguments, daemon=True)
        process.start()
        theirs.close()
        answer: tuple[float, NDArray[np.float32]] = ours.recv()
        process.join()
        return answer


def _ask_once(
    pipe: Connection, url: str, model: str, folder: Path, labels: tuple[str, ...]
) -> None:
    """Be the other process of `_ask_new_process`."""
    with clip_rt.Client(url, model=model, cache_dir=folder, timeout_s=TIMEOUT_S) as client:
        _ = client.manifest
        start_s = time.perf_counter()
        class_CE = client.class_embeddings(labels, templates=TEMPLATES)
        pipe.send((time.perf_counter() - start_s, class_CE))


@contextmanager
def borrowed(repository: Path) -> Iterator[EmbeddedServer]:
    """Yield the embedded server over a repository, which the clients of this process share."""
    server = borrow(repository, start_timeout_s=START_TIMEOUT_S)
    try:
        yield server
    finally:
        give_back(server)


def measure_merging(bench: Bench) -> tuple[Found, list[Bar]]:
    """Embed single images and single short texts from more and more threads.

    With the client joining what waits into full requests, and with every item sent at once, alone,
    for Triton's dynamic batching to join. On a large model and on a small one: where a batch costs
    little, what is around it counts.
    """
    document: Found = {}
    for model, repository in (bench.model, bench.repository), (SMALL, CHECKOUT_REPOSITORY):
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
            patch.object(lane, "MAX_IN_FLIGHT", 1024),
            patch.object(lane.Lane, "_find_company", lambda self, first: []),
        ):
            return call()

    return changed


PARTS: Mapping[str, Callable[[Bench], tuple[Found, list[Bar]]]] = {
    "overhead": measure_overhead,
    "threads": measure_threads,
    "jpeg": measure_jpeg,
    "large_jpeg": measure_large_jpeg,
    "classifier": measure_classifier,
    "cache": measure_cache,
    "merging": measure_merging,
}


def export(repository: Path, model: str, cache_folder: Path) -> None:
    """Publish `model` in FP32 and in INT8, each with the command that anyone would use.

    Another process each time: torch shall not be in the one that is measured.
    """
    common = ["--model", model, "--weights", "random", "--repository", str(repository)]
    common += ["--max-batch-size", str(BATCH_ROWS), "--cache", str(cache_folder)]
    for extra in [], ["--precision", "int8", "--name", INT8]:
        command = [sys.executable, "-m", "export.onnx", *common, *extra]
        subprocess.run(command, cwd=ROOT, check=True)


def describe_bar(bar: Bar) -> Found:
    """Return what a result keeps of a bar."""
    return {
        "what": bar.what,
        "value": round(bar.value, 4),
        bar.side.replace(" ", "_"): bar.limit,
        "met": bar.is_met,
    }


def show(bars: Sequence[Bar]) -> None:
    """Print the table of the bars."""
    table = Table("bar", "measured", "limit", "")
    for bar in bars:
        verdict = "met" if bar.is_met else "missed"
        style = None if bar.is_met else "red"
        limit = f"{bar.side} {bar.limit:g}"
        table.add_row(bar.what, f"{bar.value:.3f}", limit, verdict, style=style)
    console.print(table)


def main(
    only: Annotated[str, typer.Option(help="Parts, with commas between them.")] = ",".join(PARTS),
    model: Annotated[str, typer.Option(help="Architecture.")] = MODEL,
    num_images: Annotated[int, typer.Option(help="In bulk.")] = 512,
    num_rounds: Annotated[int, typer.Option(help="Timed rounds of each comparison.")] = 3,
    num_classes: Annotated[int, typer.Option(help="Of the classifier, 1,000 at most.")] = 1000,
    repository: Annotated[
        Path | None, typer.Option(help="Has the models already; otherwise they are exported.")
    ] = None,
) -> None:
    """Measure, print a table, and write a dated JSON."""
    names = only.split(",")
    if unknown := set(names) - set(PARTS):
        raise typer.BadParameter(f"{', '.join(unknown)}; known are {', '.join(PARTS)}")
    # No client shall find what another run has cached.
    os.environ.pop(CACHE_VARIABLE, None)
    load_before = os.getloadavg()[0]
    parts: dict[str, Found] = {}
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as folder:
        if repository is None:
            repository = Path(folder, "models")
            export(repository, model, Path(folder, "exports"))
        bench = Bench(
            repository=repository,
            scratch=Path(folder),
            model=model,
            num_images=num_images,
            num_rounds=num_rounds,
            num_classes=num_classes,
        )
        # Held until the end, so that one server serves all.
        with borrowed(repository):
            for name in names:
                start_s = time.perf_counter()
                try:
                    parts[name], found = PARTS[name](bench)
                    bars += found
                except Exception as error:  # The other parts are still worth their time.
                    console.print_exception()
                    parts[name] = {"failed": repr(error)}
                parts[name]["took_s"] = round(time.perf_counter() - start_s, 1)
                console.print(f"{name}: {parts[name]['took_s']} s")
    show(bars)
    results = {
        "model": model,
        "num_threads": len(os.sched_getaffinity(0)),
        "num_rounds": num_rounds,
        "load_before": round(load_before, 2),
        "bars": [describe_bar(bar) for bar in bars],
        "parts": parts,
    }
    packages = ("nvidia-pytriton", "onnxruntime", "openvino", "pillow", "tritonclient")
    part = "" if set(parts) == set(PARTS) else "_".join(parts)
    console.print(f"written to {save('serving', results, packages=packages, part=part)}")
    if any("failed" in part for part in parts.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
