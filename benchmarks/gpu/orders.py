"""What goes between the process that writes and the one that measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Order:
    """A stage to measure."""

    stage: str
    budget_s: float
    earlier: Mapping[str, Any]
    """Results of the stages before."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a stage found so far."""

    result: Mapping[str, Any]
    found: Mapping[str, Mapping[str, str]]
    """What is installed."""
    is_last: bool = False
    error: str = ""
    """Why it ended before its time."""
