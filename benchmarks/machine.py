"""The machine a run was made on: what it is, what else it did, and what it can do at most."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from pydantic import TypeAdapter

from benchmarks.findings import Conditions, Peaks
from benchmarks.timing import median_interval, scaled
from clip_rt import processor

ROOT = Path(__file__).parents[1]
CPU_DIR = Path("/sys/devices/system/cpu/cpu0")
CGROUP_DIR = Path("/sys/fs/cgroup")
SAMPLE_EVERY_S = 2.0
MAX_LOAD_SHARE = 0.25
"""Of the cores, busy before the run with something else."""
MAX_STEAL_SHARE = 0.01
MAX_SPREAD = 0.10
"""Of the probe between its 10th and 90th percentile, and of the clock."""
SLOW_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""They make NumPy believe in a smaller processor than this one."""


def describe() -> dict[str, Any]:
    """Describe this machine: processor and what it can do, cores, caches, memory, system, Python.

    Equal on every call, so that runs can be compared by it.
    """
    found = processor.read()
    caps = {"cpu_caps": dict(found.caps)} if found.caps else {}
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": found.name,
        "cpu_flags": list(found.flags),
        **caps,
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "container_cores": _quota_cores(),
        "l2_mib": _cache_mib(2),
        "l3_mib": _cache_mib(3),
        "governor": _read(CPU_DIR / "cpufreq/scaling_governor"),
        "is_virtual": "hypervisor" in processor.read_cpuinfo().get("flags", "").split(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def usable_cores() -> int:
    """Return how many threads this process can have at work at the same time."""
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _quota_cores() or math.inf)))


def cache_bytes() -> int:
    """Return how much the last cache and all second ones may hold; 0 where it is not said.

    The last is counted once: of machines with several, a process cannot rely on more.
    """
    cores = usable_cores()
    mib = (_cache_mib(3) or 0.0) + cores * (_cache_mib(2) or 0.0)
    return int(mib * 2**20)


def _cache_mib(level: int) -> float | None:
    """Return the size of the first core's cache of that level."""
    for folder in CPU_DIR.glob("cache/index*"):
        size = _read(folder / "size")
        if _read(folder / "level") == str(level) and size and size.endswith("K"):
            return int(size[:-1]) / 1024
    return None


def _quota_cores() -> float | None:
    """Return how many cores the container may use; None where nothing limits it."""
    quota, _, period = (_read(CGROUP_DIR / "cpu.max") or "").partition(" ")
    if not quota:  # cgroup 1
        quota = _read(CGROUP_DIR / "cpu/cpu.cfs_quota_us") or ""
        period = _read(CGROUP_DIR / "cpu/cpu.cfs_period_us") or ""
    if not (quota.isdigit() and period.isdigit()):  # "max", -1, or neither is there
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


class Watch:
    """Watches the machine while a run is made; a context manager, begun before anything else.

    Attributes:
        load_before: Processes that ran or waited, mean of the minute before.
    """

    load_before: float

    def __enter__(self) -> Watch:
        self.load_before = os.getloadavg()[0]
        self._times_before = psutil.cpu_times()
        self._mhz: list[float] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()

    def conditions(self, probe_s: Sequence[float]) -> Conditions:
        """Say what was seen so far.

        Args:
            probe_s: Seconds of the probe in all rounds of the run, at least one.
        """
        times = [
            now - before for now, before in zip(psutil.cpu_times(), self._times_before, strict=True)
        ]
        # Guests are counted among users, so the first eight are all the time there was.
        total_s = sum(times[:8])
        steal_share = times[7] / total_s if len(times) > 7 and total_s > 0 else 0.0
        return Conditions(
            load_before=round(self.load_before, 2),
            steal_share=round(steal_share, 4),
            cpu_mhz=median_interval(self._mhz) if self._is_mhz_measured() else None,
            probe_ms=scaled(median_interval(probe_s), 1e3),
            warnings=self._warnings(steal_share, probe_s),
        )

    def _sample(self) -> None:
        while True:
            cores = psutil.cpu_freq(percpu=True) or []
            if cores:
                self._mhz.append(statistics.fmean(core.current for core in cores))
            if self._is_over.wait(SAMPLE_EVERY_S):
                return

    def _is_mhz_measured(self) -> bool:
        """A guest is often told one number for ever, which is not its clock."""
        return len(set(self._mhz)) > 1

    def _warnings(self, steal_share: float, probe_s: Sequence[float]) -> list[str]:
        warnings = []
        if self.load_before > MAX_LOAD_SHARE * usable_cores():
            warnings.append(
                f"the machine was busy before the run: load {self.load_before:.1f} on "
                f"{usable_cores()} cores"
            )
        if steal_share > MAX_STEAL_SHARE:
            warnings.append(f"other guests of the host took {steal_share:.1%} of processor time")
        if (spread := _spread(probe_s)) > MAX_SPREAD:
            warnings.append(f"the probe's time varied by {spread:.0%} during the run")
        if self._is_mhz_measured() and (spread := _spread(self._mhz)) > MAX_SPREAD:
            warnings.append(f"the clock of the cores varied by {spread:.0%} during the run")
        return warnings


def _spread(samples: Sequence[float]) -> float:
    """Return the distance of the 10th and 90th percentile as a share of the median."""
    if len(samples) < 2:
        return 0.0
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return (tenths[-1] - tenths[0]) / statistics.median(samples)


class Probe:
    """A process that measures what this machine can do, then times one fixed product of matrices.

    In a process of its own, because libraries read how they are to work when they are loaded, and
    their threads must not be counted among a contender's. Idle, it takes no processor time.

    Args:
        budget_s: For measuring, beside a few seconds to load libraries; the least there must be is
            measured even when it is over.
        divisor: How many times smaller the products are, for a test; see `peaks`.

    Attributes:
        peaks: What was measured.
        flop_while_probe: How many operations in FP32 the machine could do in the time of one probe,
            at the shape and with the library it does most with.

    Raises:
        RuntimeError: it ended; the message has what it said last.
    """

    def __init__(self, budget_s: float = 10.0, *, divisor: int = 1) -> None:
        num_threads = usable_cores()
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        env = {name: value for name, value in os.environ.items() if name not in SLOW_VARIABLES}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peaks", *map(str, (num_threads, budget_s, divisor))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=env | dict.fromkeys(threads, str(num_threads)),
            text=True,
        )
        try:
            found = self._ask("peaks")
        except BaseException:
            self.close()
            raise
        self.flop_while_probe: float = found["flop_while_probe"]
        self.peaks = TypeAdapter(Peaks).validate_python(found["peaks"])

    def time(self, num_calls: int) -> list[float]:
        """Return the seconds of each of so many probes; a way for `timing.take_turns`."""
        return self._ask(num_calls)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # by what it did not read any more
            self._process.stdin.close()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _ask(self, request: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # said below, with its exit code
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"the process that measures this machine ended with {self._process.wait()}; "
                "what it said is above."
            )
        return json.loads(answer)
