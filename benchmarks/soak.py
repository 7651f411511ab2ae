r"""Threads that call one client while its servers are killed: wrong rows, hangs, errors, leaks.

    python -m benchmarks.soak                                             # 10 and 5 minutes
    python -m benchmarks.soak --minutes 1 --replica-minutes 1 --every-s 15 --num-calls 0
    MALLOC_ARENA_MAX=2 python -m benchmarks.soak       # without an arena of malloc for each thread
    PYTHONMALLOC=malloc python -m benchmarks.soak      # Python's own objects are counted as well

The first part has one server, the embedded one, over the bundled model. In turn it and the process
of one of its models are killed with SIGKILL. Calls may then fail, with a ServerError by their
deadline. The second part has two replicas, each `python -m clip_rt serve`, under one client. In
turn one is killed with SIGKILL and started again, and the other is drained with SIGTERM and started
again. There no call may fail.

Every row of every answer is compared with what was computed before anything was killed.

Resident memory grows by what leaks, and by what malloc keeps of what it got back: glibc has an
arena for each thread, up to eight for each core, and one live object keeps a page of it. What
malloc has handed out is therefore counted too, and both when nothing goes on, before and after.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import clip_rt
from benchmarks import photos
from benchmarks.findings import Bar, at_least, at_most
from benchmarks.record import describe_bar, save
from benchmarks.replicas import Replica, find_children, find_server, kill, port_of, replicas
from benchmarks.report.terminal import bar_table
from benchmarks.resources import Resources, idle_mib
from benchmarks.serving.bench import MAX_DIFFERENCE, acquired
from clip_rt.embedded.bundled import find_model_repository
from clip_rt.embedded.server import EmbeddedServer
from clip_rt.errors import ServerError, ServerStartError
from clip_rt_commands import program
from clip_rt_commands.errors import command

MODEL = "drawings"
NUM_THREADS = 16
NUM_ITEMS = 256
"""Images, and texts, to draw from."""
MAX_ROWS = 40
"""Of one call; most have few, and more than a server's batch is among them."""
TIMEOUT_S = 30.0
GRACE_S = 1.0
"""A call that takes longer than its deadline and this hangs."""
SAMPLE_S = 5.0
MAX_GROWTH = 0.05
MALLOC_VARIABLES = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "PYTHONMALLOC")
"""Who keeps how much of the memory that was given back."""
LABELS = tuple(
    "anchor apple arrow banana bell bicycle bird book bus camera car cat chair clock cloud cup dog "
    "door drum eye fish flag flower folder guitar hammer hand heart horse house key lamp leaf lock "
    "moon mountain mushroom pencil phone pizza rocket scissors ship shoe star sun train tree "
    "umbrella wallet".split()
)

console = Console()
Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """Measure, print a table, and write a dated JSON and a plot beside it."""

    minutes: float = 10.0
    """With one server; 0 leaves it out."""
    replica_minutes: float = 5.0
    """With two; 0 leaves it out."""
    num_calls: int = 100_000
    """In the first part, at least."""
    every_s: float = 30.0
    """Between what is done to servers."""


@dataclass(frozen=True)
class Kind:
    """One sort of call, with the right answers."""

    name: str
    share: float
    """Of all calls."""
    items: Sequence[Any]
    call: Callable[[list[Any]], Array]
    expected_NX: Array
    """What `call` answers for all items, a row for each."""
    tolerance: float


def count_wrong(found_NX: Array, expected_NX: Array, tolerance: float) -> int:
    """Count rows that are not as expected; all of them where even their number is wrong."""
    if found_NX.shape != expected_NX.shape:
        return max(len(found_NX), len(expected_NX))
    is_right = (np.abs(found_NX - expected_NX) <= tolerance).all(axis=1)
    return int((~is_right).sum())


def check_distinct(kind: Kind) -> None:
    """Make sure that a row which belongs to another item would be noticed.

    Raises:
        ValueError: two items have answers that are nearly equal.
    """
    for row, expected in enumerate(kind.expected_NX[:-1]):
        closest = np.abs(kind.expected_NX[row + 1 :] - expected).max(axis=1).min()
        if closest < 10 * kind.tolerance:
            raise ValueError(f"{kind.name}: item {row} has the answer of another one")


def make_kinds(client: clip_rt.Client) -> list[Kind]:
    """Compute the right answers, by calls that nothing disturbs."""
    side_px = client.manifest.side_px
    files = photos.jpegs((160, 120), NUM_ITEMS)
    squares = clip_rt.preprocess(files, side_px=side_px)
    # Arrays and files by turns.
    images = [files[n] if n % 2 else squares[n] for n in range(NUM_ITEMS)]
    texts = [f"{LABELS[n % len(LABELS)]} number {n}" for n in range(NUM_ITEMS)]

    def score(some: list[Any]) -> Array:
        return client.zero_shot(some, LABELS).logits

    calls: tuple[tuple[str, float, list[Any], Callable[[list[Any]], Array], float], ...] = (
        ("encode_images", 0.35, images, client.encode_images, MAX_DIFFERENCE),
        ("encode_texts", 0.5, texts, client.encode_texts, MAX_DIFFERENCE),
        # Logits are cosines times some 30.
        ("zero_shot", 0.15, images, score, 30 * MAX_DIFFERENCE),
    )
    kinds = [
        Kind(name, share, items, call, call(items), tolerance)
        for name, share, items, call, tolerance in calls
    ]
    for kind in kinds:
        check_distinct(kind)
    return kinds


class Load:
    """Calls of random sorts and sizes from many threads, and what came of them."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self.kinds = kinds
        self.num_answered = 0
        self.num_rows = 0
        self.num_wrong_rows = 0
        self.num_late = 0
        self.longest_s = 0.0
        self.server_errors: Counter[str] = Counter()
        self.other_errors: Counter[str] = Counter()
        """Without a type, or of one that blames the caller, who did nothing wrong."""
        self.examples: dict[str, str] = {}
        """The first error of each type."""
        self.began_at_s: dict[int, float] = {}
        """When the call began that a thread is in."""
        self._lock = threading.Lock()

    def work(self, thread: int, stop: threading.Event) -> None:
        """Make one call after another until `stop` is set."""
        rng = np.random.default_rng(thread)
        shares = [kind.share for kind in self.kinds]
        while not stop.is_set():
            kind = self.kinds[rng.choice(len(self.kinds), p=shares)]
            # From 1 to MAX_ROWS, half of them below 3.
            num_rows = int((MAX_ROWS + 1) ** (rng.random() ** 2))
            self._call(thread, kind, rng.integers(len(kind.items), size=num_rows))

    def overdue_s(self) -> float:
        """Return how long the oldest call under way has been going."""
        now_s = time.monotonic()
        return max((now_s - began_s for began_s in self.began_at_s.copy().values()), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Return what a result keeps of it."""
        return {
            "num_answered": self.num_answered,
            "num_rows": self.num_rows,
            "num_wrong_rows": self.num_wrong_rows,
            "num_late": self.num_late,
            "longest_call_s": round(self.longest_s, 3),
            "server_errors": dict(self.server_errors),
            "other_errors": dict(self.other_errors),
            "first_of_each": self.examples,
        }

    def _call(self, thread: int, kind: Kind, rows: NDArray[np.int64]) -> None:
        began_s = self.began_at_s[thread] = time.monotonic()
        errors, example, num_wrong = Counter[str](), "", 0
        tally = self.server_errors
        try:
            found = kind.call([kind.items[row] for row in rows])
            num_wrong = count_wrong(found, kind.expected_NX[rows], kind.tolerance)
        except ServerError as error:
            errors[type(error).__name__] += 1
            example = str(error)
        except Exception as error:
            tally = self.other_errors
            errors[type(error).__name__] += 1
            example = "".join(traceback.format_exception(error))
        elapsed_s = time.monotonic() - began_s
        del self.began_at_s[thread]
        with self._lock:
            if not errors:
                self.num_answered += 1
                self.num_rows += len(rows)
            self.num_wrong_rows += num_wrong
            self.num_late += elapsed_s > TIMEOUT_S + GRACE_S
            self.longest_s = max(self.longest_s, elapsed_s)
            tally.update(errors)
            for name in errors:
                self.examples.setdefault(name, example)


Step = tuple[str, Callable[[], None]]


def one_server_steps(server: EmbeddedServer) -> list[Step]:
    """Return what is done to the embedded server, in turn; nothing while it is being restarted."""

    def find() -> int | None:
        with contextlib.suppress(ServerStartError):
            return find_server(port_of(server.url))
        return None

    def kill_stub() -> None:
        parent = find()
        for child in find_children(parent)[:1] if parent else []:
            kill(child)

    return [
        ("kill -9 the server", lambda: kill(find())),
        ("kill -9 a model's process", kill_stub),
    ]


def replica_steps(one: Replica, other: Replica) -> list[Step]:
    """Return what is done to two replicas, in turn; each is killed, and each is drained."""
    steps: list[Step] = []
    for first, second in (one, other), (other, one):
        steps += [
            (f"kill -9 {first.name}", first.kill),
            (f"start {first.name}", first.start),
            (f"SIGTERM to {second.name}", second.drain),
            (f"start {second.name}", second.start),
        ]
    return steps


def disturb(
    steps: Sequence[Step], every_s: float, stop: threading.Event, done: list[dict[str, Any]]
) -> None:
    """Take the steps in turn, one every so often, and note when."""
    start_s = time.monotonic()
    for what, act in itertools.cycle(steps):
        if stop.wait(every_s):
            return
        done.append({"at_s": round(time.monotonic() - start_s, 1), "what": what})
        act()


def soak(
    client: clip_rt.Client,
    steps: Sequence[Step],
    *,
    what: str,
    minutes: float,
    num_calls: int,
    every_s: float,
) -> dict[str, Any]:
    """Call and disturb, until the time is over and the calls are made; twice the time at most.

    Args:
        client: All threads call it.
        steps: Taken in turn.
        what: Said beside the progress.
        minutes: At least.
        num_calls: At least, not counting those that failed.
        every_s: Between two steps.

    Returns:
        What came of the calls, samples of what the process held, what it held before and after them
        when nothing went on, and when each step was taken.
    """
    load, resources, stop = Load(make_kinds(client)), Resources(), threading.Event()
    done: list[dict[str, Any]] = []
    sample_s = min(SAMPLE_S, 60 * minutes / 20)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    # Not a `with`, which would wait for a thread that hangs.
    pool = ThreadPoolExecutor(NUM_THREADS + 1)
    idle = {"before": idle_mib()}
    start_s = time.monotonic()
    disturbing = pool.submit(disturb, steps, every_s, stop, done)
    working = [pool.submit(load.work, thread, stop) for thread in range(NUM_THREADS)]
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(what, total=60 * minutes)
            while True:
                elapsed_s = time.monotonic() - start_s
                resources.sample(elapsed_s, load.num_answered)
                num_failed = sum(load.server_errors.values())
                text = f"{what}: {load.num_answered:,} answered, {num_failed:,} failed"
                progress.update(task, completed=elapsed_s, description=text)
                is_enough = elapsed_s >= 60 * minutes and load.num_answered >= num_calls
                if is_enough or elapsed_s >= 120 * minutes or disturbing.done():
                    break
                if load.overdue_s() > TIMEOUT_S + GRACE_S:
                    faulthandler.dump_traceback()
                time.sleep(sample_s)
    finally:
        stop.set()
        pool.shutdown(wait=False)
    ended, hanging = wait(working, TIMEOUT_S + GRACE_S)
    for future in (disturbing, *ended):
        future.result()
    idle["after"] = idle_mib()
    return load.to_json() | {
        "num_hanging": len(hanging),
        "elapsed_s": round(elapsed_s, 1),
        "idle": idle,
        "growth": {name: round(each, 4) for name, each in resources.growth().items()},
        "steps": done,
        "samples": resources.samples,
    }


def bars_of(name: str, found: Mapping[str, Any], *, may_fail: bool) -> list[Bar]:
    """Hold a part to what was promised."""
    limits = {
        "wrong rows": found["num_wrong_rows"],
        "hanging or late calls": found["num_hanging"] + found["num_late"],
        "errors not of a server": sum(found["other_errors"].values()),
    }
    if not may_fail:
        limits["failed calls"] = sum(found["server_errors"].values())
    bars = [at_most(f"{name}: {what}", value, 0) for what, value in limits.items()]
    for what, value in found["growth"].items():
        bars.append(at_most(f"{name}: growth of {what}", abs(value), MAX_GROWTH))
    return bars


def plot(parts: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw what the process held, and how fast it called, over time."""
    rows = {
        "memory, MiB": {"rss_mib": "resident", "heap_mib": "handed out by malloc"},
        "file descriptors": {"fds": "open"},
        "threads": {"threads": "alive"},
    }
    figure = Figure(figsize=(7 * len(parts), 9), layout="constrained")
    axes = figure.subplots(len(rows) + 1, len(parts), squeeze=False, sharex="col")
    for column, (name, found) in zip(axes.T, parts.items(), strict=True):
        samples = found["samples"]
        at_s = np.array([sample["at_s"] for sample in samples])
        answered = np.array([sample["answered"] for sample in samples])
        for axis, (label, lines) in zip(column, rows.items(), strict=False):
            for key, line in lines.items():
                axis.plot(at_s, [sample[key] for sample in samples], label=line)
            axis.set_ylim(0, 1.2 * max(axis.dataLim.y1, 1))
            axis.set_ylabel(label)
            if len(lines) > 1:
                axis.legend(loc="center right")
        column[-1].plot(at_s[1:], np.diff(answered) / np.diff(at_s))
        column[-1].set_ylim(bottom=0)
        column[-1].set_ylabel("answered calls a second")
        column[-1].set_xlabel("seconds; lines where a server was killed, drained or started")
        column[0].set_title(name)
        for axis, step in itertools.product(column, found["steps"]):
            axis.axvline(step["at_s"], color="tab:red", alpha=0.3, linewidth=0.8)
    figure.savefig(path, dpi=110)


def main(config: SoakConfig) -> None:
    """Measure, print a table, and write a dated JSON and a plot beside it."""
    parts: dict[str, dict[str, Any]] = {}
    bars: list[Bar] = []
    if config.minutes:
        repository = find_model_repository()
        with (
            acquired(repository) as server,
            clip_rt.Client(repository=repository, model=MODEL, timeout_s=TIMEOUT_S) as client,
        ):
            parts["one server"] = found = soak(
                client,
                one_server_steps(server),
                what="one server",
                minutes=config.minutes,
                num_calls=config.num_calls,
                every_s=config.every_s,
            )
        what = "one server: answered calls"
        bars.append(at_least(what, found["num_answered"], config.num_calls))
        bars += bars_of("one server", found, may_fail=True)
    if config.replica_minutes:
        with (
            tempfile.TemporaryDirectory() as folder,
            replicas(Path(folder)) as (one, other),
            clip_rt.Client([one.url, other.url], model=MODEL, timeout_s=TIMEOUT_S) as client,
        ):
            parts["two replicas"] = found = soak(
                client,
                replica_steps(one, other),
                what="two replicas",
                minutes=config.replica_minutes,
                num_calls=0,
                every_s=config.every_s / 2,
            )
            found["exit_codes_of_drains"] = one.exit_codes + other.exit_codes
        bars += bars_of("two replicas", found, may_fail=False)
    console.print(bar_table(bars))
    malloc = {name: os.environ[name] for name in MALLOC_VARIABLES if name in os.environ}
    results = {
        "model": MODEL,
        "num_threads": NUM_THREADS,
        "timeout_s": TIMEOUT_S,
        "malloc": malloc,
        "bars": [describe_bar(bar) for bar in bars],
        **parts,
    }
    packages = ("grpcio", "nvidia-pytriton", "onnxruntime", "tritonclient")
    # What is set apart is kept apart.
    part = "_".join(name.lower().rstrip("_") for name in malloc)
    path = save("soak", results, packages=packages, part=part)
    plot(parts, path.with_suffix(".png"))
    console.print(f"drawn to {path.with_suffix('.png')}")
    if any(found["num_hanging"] for found in parts.values()):
        # Python would wait for them.
        os._exit(1)


if __name__ == "__main__":
    with command():
        main(tyro.cli(SoakConfig, prog=program(__spec__.name), description=__doc__))
