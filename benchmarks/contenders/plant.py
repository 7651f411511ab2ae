"""Faults that are planted, so that the alarms of a run can be seen to go off."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders.implementation import Implementation
from benchmarks.findings import CallKind


@dataclass(frozen=True, kw_only=True)
class Plant:
    """What is wrong with a contender on purpose."""

    slow_down: float = 1.0
    """Times as long as it would take, at least 1."""
    is_wrong: bool = False
    """Whether its answers are those of other items."""


def parse_plant(text: str) -> tuple[str, Plant]:
    """Read `slow:NAME:1.2` or `wrong:NAME`.

    Returns:
        The name of the contender, and what is planted.

    Raises:
        ValueError: it is neither.
    """
    what, _, rest = text.partition(":")
    if what == "wrong" and rest:
        return rest, Plant(is_wrong=True)
    name, _, factor = rest.rpartition(":")
    if what == "slow" and name:
        try:
            slow_down = float(factor)
        except ValueError:
            slow_down = 0.0
        if 1.0 <= slow_down < 1e3:
            return name, Plant(slow_down=slow_down)
    raise ValueError(f"{text[:80]!r} is no fault to plant; write slow:NAME:1.2 or wrong:NAME.")


class Planted:
    """An implementation with a fault; otherwise it does what the one inside does."""

    def __init__(self, inside: Implementation, plant: Plant) -> None:
        self.inside = inside
        self._plant = plant
        self.calls = inside.calls
        self.versions = inside.versions

    def prepare(self, call: CallKind, items: Any) -> Any:
        """Prepare as ever."""
        return self.inside.prepare(call, items)

    def run(self, call: CallKind, prepared: Any) -> NDArray[np.float32]:
        """Run, and do what is planted."""
        start_s = time.perf_counter()
        answer = self.inside.run(call, prepared)
        if self._plant.is_wrong:
            # The answers of the neighbours; where there are none, one turned elsewhere.
            answer = np.roll(answer, 1, axis=0 if len(answer) > 1 else 1)
        time.sleep((self._plant.slow_down - 1.0) * (time.perf_counter() - start_s))
        return answer

    def pids(self) -> list[int]:
        """Return those of the one inside."""
        return self.inside.pids()

    def close(self) -> None:
        """Close the one inside."""
        self.inside.close()
