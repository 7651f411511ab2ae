"""A runtime with a fault, for tests that see it noticed; the process of a contender imports it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import contenders
from benchmarks.contenders import runtimes
from benchmarks.contenders.implementation import Implementation
from benchmarks.contenders.kit import Kit


def make(kit: Kit, *, slow_down: float = 1.0, is_wrong: bool = False, **options: Any) -> Any:
    """Make a runtime that takes so many times as long, or answers for other items."""
    return plant(runtimes.make(kit, **options), slow_down=slow_down, is_wrong=is_wrong)


def plant(inside: Implementation, *, slow_down: float, is_wrong: bool) -> Any:
    right = inside.run

    def run(call: Any, prepared: Any) -> Any:
        start_s = time.perf_counter()
        answer = right(call, prepared)
        if is_wrong:
            # The answers of the neighbours; where there are none, one turned elsewhere.
            answer = np.roll(answer, 1, axis=0 if len(answer) > 1 else 1)
        time.sleep((slow_down - 1.0) * (time.perf_counter() - start_s))
        return answer

    inside.run = run  # type: ignore[method-assign]
    return inside


def plant_in(patch: pytest.MonkeyPatch, name: str, **fault: Any) -> None:
    """Let the contender of a name have a fault."""
    entries = {each.name: each for each in contenders._ENTRIES}
    whole = entries[name]
    entries[name] = replace(whole, module=__name__, options=whole.options | fault)
    patch.setattr(contenders, "_ENTRIES", tuple(entries.values()))
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))
