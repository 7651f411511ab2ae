"""What this process holds, over time: memory, file descriptors, threads."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

WARM_UP_SHARE = 0.2
"""Of the samples that do not count for growth."""


class Mallinfo2(ctypes.Structure):
    """What glibc 2.33 and later says of its heap (malloc.h)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
        )
    )


def heap_mib() -> float:
    """Return what malloc has handed out and not got back, in all its arenas.

    Memory that malloc has got back and keeps is in RSS and not in this; what it keeps for a thread
    alone (tcache) is in both. Python gets memory for small objects elsewhere, unless it is run with
    PYTHONMALLOC=malloc. NaN where libc is another.
    """
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return float("nan")
    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return float(info.uordblks + info.hblkhd) / 2**20


def rss_mib() -> float:
    """Return the resident memory of this process."""
    return float(psutil.Process().memory_info().rss) / 2**20


def peak_mib(pid: int) -> float:
    """Return the most memory a process has held (VmHWM), which psutil does not tell; 0 if none."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    return 0.0


def idle_mib() -> dict[str, float]:
    """Return what is left when nothing is going on, and malloc has given back what it kept."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return {"rss_mib": round(rss_mib(), 2), "heap_mib": round(heap_mib(), 2)}


class Resources:
    """What this process holds, sampled over time."""

    def __init__(self) -> None:
        self.samples: list[dict[str, float]] = []

    def sample(self, at_s: float, num_answered: int) -> None:
        """Note memory, file descriptors and threads."""
        self.samples.append(
            {
                "at_s": round(at_s, 1),
                "answered": num_answered,
                "rss_mib": round(rss_mib(), 2),
                "heap_mib": round(heap_mib(), 2),
                "fds": psutil.Process().num_fds(),
                "threads": psutil.Process().num_threads(),
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
