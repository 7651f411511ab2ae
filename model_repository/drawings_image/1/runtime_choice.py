"""Which of the runtimes computes a model fastest on this machine: measured once, then remembered.

What is remembered is one small file for each model and machine in the user's cache folder. It
changes how long a start takes, nothing else: where it cannot be read or written, the model is
measured again.

Python's standard library only, and nothing else of this package: an export copies this file beside
the model that Triton runs, where clip_rt may be missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

RUNTIMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
"""What can run a model in ONNX on a processor, with its name for people; the first is taken where
nothing was measured."""
PACKAGES = {
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
}
"""Which distributions bring a runtime."""

BUDGET_S = 1.5
"""For timed calls; when it is over, `MIN_ROUNDS` are made unless calls are very slow."""
MIN_ROUNDS, MAX_ROUNDS = 3, 25
MAX_LOAD_S = 5.0
"""A model that takes longer to load is not loaded twice to be measured: a start has a limit."""
BYTES_PER_BYTE = 6
"""Memory that both runtimes together may take while they load, for each byte of the model."""
LOCK_TIMEOUT_S = 20.0
END_BYTES = 2**20
MAX_ENTRIES = 256
MAX_ENTRY_BYTES = 16_384
_NONBLOCK, _CLOEXEC = getattr(os, "O_NONBLOCK", 0), getattr(os, "O_CLOEXEC", 0)
"""Windows has neither."""


@dataclass(frozen=True)
class Choice:
    """Which runtime, and the median times of a call that say so."""

    runtime: str
    """A key of `RUNTIMES`."""
    times_ms: Mapping[str, float]
    """By runtime."""

    def __str__(self) -> str:
        times = ", ".join(f"{RUNTIMES[name]} {ms:.3g} ms" for name, ms in self.times_ms.items())
        return f"{RUNTIMES[self.runtime]} is the faster here: {times}"


def choose(times_s: Mapping[str, float]) -> Choice:
    """Choose by measured times, seconds by runtime; of equals the first of `RUNTIMES`."""
    names = [name for name in RUNTIMES if name in times_s]
    return Choice(
        runtime=min(names, key=lambda name: times_s[name]),
        times_ms={name: round(1e3 * times_s[name], 3) for name in names},
    )


def time_by_turns(
    ways: Mapping[str, Callable[[], object]],
    *,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time calls by turns, so that what slows the machine for a while slows all of them.

    Args:
        ways: By name; each is called once before the rounds, of which each begins with another.
        budget_s: No round begins after it, once there are `MIN_ROUNDS`, or one that ended after
            four times the budget.
        clock: Seconds.

    Returns:
        The median of each, in seconds.
    """
    names = list(ways)
    start_s = clock()
    for way in ways.values():
        way()
    times_s: dict[str, list[float]] = {name: [] for name in names}
    for num_rounds in range(MAX_ROUNDS):
        spent_s = clock() - start_s
        if num_rounds and spent_s > budget_s * (4 if num_rounds < MIN_ROUNDS else 1):
            break
        first = num_rounds % len(names)
        for name in names[first:] + names[:first]:
            before_s = clock()
            ways[name]()
            times_s[name].append(clock() - before_s)
    # Only here: every command imports this module for its folders.
    import statistics

    return {name: statistics.median(times) for name, times in times_s.items()}


def installed(runtime: str) -> str:
    """Return the version of a runtime's package, empty where there is none; imports nothing."""
    import importlib.metadata

    for package in PACKAGES[runtime]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return ""


def digest(*facts: object) -> str:
    """Return a name for facts that JSON can say, 32 hexadecimal digits."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]


def digest_machine(processor: Mapping[str, object]) -> str:
    """Name what is the same for all models of this machine.

    Args:
        processor: Facts of `processor.Processor`.
    """
    return digest(processor, {runtime: installed(runtime) for runtime in RUNTIMES})


def model_bytes(file: Path) -> int:
    """Return the size of an ONNX file with the weights beside it."""
    return sum(each.stat().st_size for each in (file, *file.parent.glob(f"{file.name}.*")))


def digest_model(file: Path, *facts: object) -> str:
    """Name a model by its size, both ends of its file, and whatever else decides how fast it is.

    Copies have the same name, so that they are computed by the same runtime: the last bits of an
    embedding depend on it. All of a large file would take too long to read at each start.
    """
    hashed = hashlib.sha256()
    with file.open("rb") as opened:
        hashed.update(opened.read(END_BYTES))
        opened.seek(max(0, file.stat().st_size - END_BYTES))
        hashed.update(opened.read(END_BYTES))
    return digest(model_bytes(file), hashed.hexdigest(), *facts)


def fits_twice(num_bytes: int) -> bool:
    """Tell whether two runtimes may hold a model of this size while it is measured."""
    return BYTES_PER_BYTE * num_bytes < available_bytes()


def available_bytes(root: Path = Path("/")) -> float:
    """Return the memory this process may still take: the machine's, or its container's if less."""
    free_bytes = math.inf
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free_bytes = 1024.0 * int(line.split()[1])
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max", or another version of cgroups
            most, now = (int((root / "sys/fs/cgroup" / name).read_text()) for name in (limit, used))
            free_bytes = min(free_bytes, most - now)
    return free_bytes


def default_folder(part: str = "runtimes") -> Path | None:
    """Return where `part` of clip_rt keeps what it can make again; None where there is no home.

    That is `$XDG_CACHE_HOME/clip_rt/<part>`, or below ~/.cache where that is unset or relative.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    with contextlib.suppress(RuntimeError, KeyError):
        base = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
        return base / "clip_rt" / part
    return None


def recall(folder: Path | None, machine: str, model: str, name: str = "") -> Choice | None:
    """Return what was measured of a model on a machine; None where it was not, or is not legible.

    The arguments are those of `default_folder`, `digest_machine` and `digest_model`. What was
    measured of a copy of another name is remembered under `name` as well.
    """
    choice_by_name = recall_all(folder, machine, model)
    choice = next(iter(choice_by_name.values()), None)
    if choice is not None and name and name not in choice_by_name:
        remember(folder, machine, model, choice, name=name)
    return choice


def recall_all(folder: Path | None, machine: str, model: str = "") -> dict[str, Choice]:
    """Return the newest choice on a machine for each name of a model, or of all models."""
    with contextlib.suppress(OSError):
        files = list(folder.glob(f"{machine}-{model}*.json")) if folder else []
        files.sort(key=os.path.getmtime)
        return dict(found for file in files if (found := _read(file)))
    return {}


def remember(folder: Path | None, machine: str, model: str, choice: Choice, *, name: str) -> bool:
    """Keep a choice for `recall`; False where it cannot be kept.

    `name` is the model's in the server, for people. The folder is made if it is not there.
    """
    if folder is None:
        return False
    entry = {"model": name, "runtime": choice.runtime, "times_ms": dict(choice.times_ms)}
    partial = None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=folder)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        os.replace(partial, folder / f"{machine}-{model}-{digest(name)}.json")
    except OSError:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)
        return False
    _forget_oldest(folder)
    return True


@contextlib.contextmanager
def alone(folder: Path | None, *, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[bool | None]:
    """Keep out others who measure, who would slow each other.

    What is locked is a file in `folder`, or in the temporary folder where that cannot be written.

    Yields:
        Whether it is locked: False when somebody else was at it for `timeout_s`, None where neither
        folder can be written, and on Windows. Better not measure then.
    """
    if not hasattr(os, "getuid"):  # Windows has neither users by number nor these locks.
        yield None
        return
    descriptor = None
    shared = Path(tempfile.gettempdir()) / f"clip_rt-runtimes-{os.getuid()}.lock"
    for file in (folder / "lock", shared) if folder is not None else (shared,):
        with contextlib.suppress(OSError):
            if descriptor is None:
                file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                descriptor = os.open(file, flags, 0o600)
    if descriptor is None:
        yield None
        return
    try:
        yield _lock(descriptor, timeout_s)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, timeout_s: float) -> bool:
    import fcntl  # Here, because this module is imported where it does not exist.

    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.02)
        except OSError:  # A file system without locks.
            return True
        else:
            return True


def _read(file: Path) -> tuple[str, Choice] | None:
    """Return an entry's model and choice; None unless all of it is as `remember` writes it."""
    try:
        # Not waiting for whoever may write into what is no file.
        with open(os.open(file, os.O_RDONLY | _NONBLOCK | _CLOEXEC), "rb") as opened:
            entry = json.loads(opened.read(MAX_ENTRY_BYTES))
        name, runtime, times_ms = entry["model"], entry["runtime"], entry["times_ms"]
        choice = Choice(runtime, {each: float(times_ms[each]) for each in RUNTIMES})
        is_sound = isinstance(name, str) and runtime in RUNTIMES
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    is_sound &= all(math.isfinite(each) and each > 0 for each in choice.times_ms.values())
    return (name, choice) if is_sound else None


def _forget_oldest(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for file in sorted(folder.glob("*.json"), key=os.path.getmtime)[:-MAX_ENTRIES]:
            file.unlink(missing_ok=True)
        for left in folder.glob(".partial-*"):
            if time.time() - os.path.getmtime(left) > 3600:
                left.unlink(missing_ok=True)
