r"""Threads that call one client while its servers are killed: wrong rows, hangs, errors, leaks.

    python -m benchmarks.soak                                             # 10 and 5 minutes
    python -m benchmarks.soak --minutes 1 --replica-minutes 1 --every-s 15 --num-calls 0

The first part has one server, the embedded one, over the bundled model. In turn it and the process
of one of its models are killed with SIGKILL. Calls may then fail, with a ServerError by their
deadline. The second part has two replicas, each `python -m clip_rt serve`, under one client. In
turn one is killed with SIGKILL and started again, and the other is drained with SIGTERM and started
again. There no call may fail.

Every row of every answer is compared with what was computed before anything was killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import clip_rt
from benchmarks import photos
from benchmarks.findings import Bar
from benchmarks.record import save
from benchmarks.serving import (
    MAX_DIFFERENCE,
    START_TIMEOUT_S,
    borrowed,
    describe_bar,
    show,
)
from clip_rt.client import CHECKOUT_REPOSITORY
from clip_rt.errors import ServerError, ServerStartError
from clip_rt.server import EmbeddedServer

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
WARM_UP_SHARE = 0.2
"""Of the samples that do not count for growth."""
MAX_GROWTH = 0.05
DRAIN_TIMEOUT_S = 60.0
POLL_S = 0.1
LABELS = tuple(
    "anchor apple arrow banana bell bicycle bird book bus camera car cat chair clock cloud cup dog "
    "door drum eye fish flag flower folder guitar hammer hand heart horse house key lamp leaf lock "
    "moon mountain mushroom pencil phone pizza rocket scissors ship shoe star sun train tree "
    "umbrella wallet".split()
)

console = Console()
Array = NDArray[np.float32]


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


class Resources:
    """What this process holds, sampled over time."""

    def __init__(self) -> None:
        self.samples: list[dict[str, float]] = []

    def sample(self, at_s: float, num_answered: int) -> None:
        """Note memory, file descriptors and threads."""
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        self.samples.append(
            {
                "at_s": round(at_s, 1),
                "answered": num_answered,
                "rss_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2),
                "fds": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
            }
        )

    def growth(self) -> dict[str, float]:
        """Return by how much of itself each grew after the warm-up."""
        counted = self.samples[round(WARM_UP_SHARE * len(self.samples)) :]
        at_s = [sample["at_s"] for sample in counted]
        names = ("rss_mib", "fds", "threads")
        return {name: growth(at_s, [sample[name] for sample in counted]) for name in names}


def growth(at_s: Sequence[float], values: Sequence[float]) -> float:
    """Return what a straight line through the values rises by, as a share of their mean.

    NaN for fewer than three values, through which any line would pass.
    """
    if len(values) < 3:
        return float("nan")
    slope, _ = np.polyfit(at_s, values, 1)
    return float(slope * (at_s[-1] - at_s[0]) / np.mean(values))


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
    files = [photos.jpeg((160, 120), index) for index in range(NUM_ITEMS)]
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


def find_server(port: int) -> int | None:
    """Return the process id of the tritonserver that was told to listen on a port."""
    for folder in Path("/proc").glob("[0-9]*"):
        # Any of them may end while we look.
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            is_server = Path(os.fsdecode(command[0])).name == "tritonserver"
            if is_server and f"--grpc-port={port}".encode() in command:
                return int(folder.name)
    return None


def find_children(parent: int) -> list[int]:
    """Return the process ids of the children of a process."""
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            if int(fields[1]) == parent:
                children.append(int(folder.name))
    return children


def kill(pid: int | None) -> None:
    """Kill a process, if it is still there."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def port_of(url: str) -> int:
    """Return the port of host:port."""
    return int(url.rpartition(":")[2])


class Replica:
    """`python -m clip_rt serve` on a port of its own."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"127.0.0.1:{self.port}"
        self.exit_codes: list[int] = []
        """Of drains."""
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it can be called.

        Raises:
            RuntimeError: it cannot.
        """
        command = [sys.executable, "-m", "clip_rt", "serve", "--port", str(self.port)]
        command += ["--repository", str(CHECKOUT_REPOSITORY)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._is_listening():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                tail = self._log.read_text("utf-8", "replace")[-2000:]
                raise RuntimeError(f"{self.name} does not start: {tail}")
            time.sleep(POLL_S)

    def kill(self) -> None:
        """End both of its processes at once, the server and the one that runs it."""
        assert self._process is not None
        kill(find_server(self.port))
        self._process.kill()
        self._process.wait()

    def drain(self) -> None:
        """Ask it to end what it has begun, and wait for that.

        Raises:
            RuntimeError: it does not end.
        """
        assert self._process is not None
        self._process.terminate()
        try:
            self.exit_codes.append(self._process.wait(DRAIN_TIMEOUT_S))
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{self.name} does not end: {error}") from error

    def close(self) -> None:
        """End it, whatever it does."""
        if self._process is not None:
            self.kill()

    def _is_listening(self) -> bool:
        """Whether its port answers, which Triton opens once its models are loaded.

        Asked without a client, whose descriptors and memory would be counted.
        """
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


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
        What came of the calls, samples of what the process held, and when each step was taken.
    """
    load, resources, stop = Load(make_kinds(client)), Resources(), threading.Event()
    done: list[dict[str, Any]] = []
    sample_s = min(SAMPLE_S, 60 * minutes / 20)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    # Not a `with`, which would wait for a thread that hangs.
    pool = ThreadPoolExecutor(NUM_THREADS + 1)
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
    return load.to_json() | {
        "num_hanging": len(hanging),
        "elapsed_s": round(elapsed_s, 1),
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
    bars = [
        Bar(what=f"{name}: {what}", value=value, limit=0, side="at most")
        for what, value in limits.items()
    ]
    for what, value in found["growth"].items():
        what = f"{name}: growth of {what}"
        bars.append(Bar(what=what, value=abs(value), limit=MAX_GROWTH, side="at most"))
    return bars


def plot(parts: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw what the process held, and how fast it called, over time."""
    rows = {"rss_mib": "memory, MiB", "fds": "file descriptors", "threads": "threads"}
    figure = Figure(figsize=(7 * len(parts), 9), layout="constrained")
    axes = figure.subplots(len(rows) + 1, len(parts), squeeze=False, sharex="col")
    for column, (name, found) in zip(axes.T, parts.items(), strict=True):
        samples = found["samples"]
        at_s = np.array([sample["at_s"] for sample in samples])
        answered = np.array([sample["answered"] for sample in samples])
        for axis, (key, label) in zip(column, rows.items(), strict=False):
            values = [sample[key] for sample in samples]
            axis.plot(at_s, values)
            axis.set_ylim(0, 1.2 * max(values))
            axis.set_ylabel(label)
        column[-1].plot(at_s[1:], np.diff(answered) / np.diff(at_s))
        column[-1].set_ylim(bottom=0)
        column[-1].set_ylabel("answered calls a second")
        column[-1].set_xlabel("seconds; lines where a server was killed, drained or started")
        column[0].set_title(name)
        for axis, step in itertools.product(column, found["steps"]):
            axis.axvline(step["at_s"], color="tab:red", alpha=0.3, linewidth=0.8)
    figure.savefig(path, dpi=110)


@contextmanager
def replicas(folder: Path) -> Iterator[tuple[Replica, Replica]]:
    """Yield two running replicas."""
    one, other = (Replica(name, folder / f"{name}.log") for name in ("replica 1", "replica 2"))
    try:
        one.start()
        other.start()
        yield one, other
    finally:
        one.close()
        other.close()


def main(
    minutes: Annotated[float, typer.Option(help="With one server; 0 leaves it out.")] = 10.0,
    replica_minutes: Annotated[float, typer.Option(help="With two; 0 leaves it out.")] = 5.0,
    num_calls: Annotated[int, typer.Option(help="In the first part, at least.")] = 100_000,
    every_s: Annotated[float, typer.Option(help="Between what is done to servers.")] = 30.0,
) -> None:
    """Measure, print a table, and write a dated JSON and a plot beside it."""
    parts: dict[str, dict[str, Any]] = {}
    bars: list[Bar] = []
    if minutes:
        with (
            borrowed(CHECKOUT_REPOSITORY) as server,
            clip_rt.Client(
                repository=CHECKOUT_REPOSITORY, model=MODEL, timeout_s=TIMEOUT_S
            ) as client,
        ):
            steps = one_server_steps(server)
            parts["one server"] = soak(
                client,
                steps,
                what="one server",
                minutes=minutes,
                num_calls=num_calls,
                every_s=every_s,
            )
        num_answered = parts["one server"]["num_answered"]
        what = "one server: answered calls"
        bars.append(Bar(what=what, value=num_answered, limit=num_calls, side="at least"))
        bars += bars_of("one server", parts["one server"], may_fail=True)
    if replica_minutes:
        with (
            tempfile.TemporaryDirectory() as folder,
            replicas(Path(folder)) as (one, other),
            clip_rt.Client([one.url, other.url], model=MODEL, timeout_s=TIMEOUT_S) as client,
        ):
            parts["two replicas"] = soak(
                client,
                replica_steps(one, other),
                what="two replicas",
                minutes=replica_minutes,
                num_calls=0,
                every_s=every_s / 2,
            )
            codes = one.exit_codes + other.exit_codes
            parts["two replicas"]["exit_codes_of_drains"] = codes
        bars += bars_of("two replicas", parts["two replicas"], may_fail=False)
    show(bars)
    results = {
        "model": MODEL,
        "num_threads": NUM_THREADS,
        "timeout_s": TIMEOUT_S,
        "bars": [describe_bar(bar) for bar in bars],
        **parts,
    }
    packages = ("grpcio", "nvidia-pytriton", "onnxruntime", "tritonclient")
    path = save("soak", results, packages=packages)
    plot(parts, path.with_suffix(".png"))
    console.print(f"written to {path} and {path.with_suffix('.png').name}")
    if any(found["num_hanging"] for found in parts.values()):
        # Python would wait for them.
        os._exit(1)


if __name__ == "__main__":
    typer.run(main)
