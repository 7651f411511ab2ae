"""What a contender is, in the process that it has to itself."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

import clip_rt
from benchmarks.contenders.kit import Kit
from benchmarks.findings import CallKind
from clip_rt.inputs.prompts import fill, find_templates
from clip_rt.specs import CLIP_MEAN, CLIP_STD, MIN_NORM

TEMPLATES = "openai_imagenet"
"""The 80 prompts that each class has in a "classifier" call; "zero_shot" has one for each label."""
ALL_CALLS: frozenset[CallKind] = frozenset({"pixels", "jpegs", "texts", "classifier", "zero_shot"})


class UnfitError(Exception):
    """A contender cannot take part here; the message says why."""


@dataclass(frozen=True)
class LoadResult:
    """What came of a contender under load."""

    latencies_s: list[float]
    """Of the calls that were answered."""
    num_failed: int
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker is to be: all that it is told when it starts."""

    module: str
    """With a function `make(kit, **options)` that returns an Implementation."""
    kit: Kit
    options: dict[str, Any]


class Implementation(ABC):
    """One way to embed images and texts; only the served ones need allow `run` from many threads.

    One whose engine counts how long each of its operators takes also has a method
    `profile(call, prepared, num_calls)`, which returns for each of some runs the seconds by kind of
    operator, and `total`.
    """

    calls: frozenset[CallKind] = ALL_CALLS
    """What it can do."""
    versions: dict[str, str]
    """Of the packages that decide its speed."""
    client: clip_rt.Client | None = None
    """What makes the calls, where that is a client, which can tell where the time goes."""

    def prepare(self, call: CallKind, items: Any) -> Any:
        """Bring items, as `findings.CallKind` has them, to the form its call takes; untimed."""
        return items

    @abstractmethod
    def run(self, call: CallKind, prepared: Any) -> NDArray[np.float32]:
        """Do what is timed; see `findings.CallKind` for what comes back."""

    def pids(self) -> list[int]:
        """Return the processes beside its own that work for it."""
        return []

    def close(self) -> None:  # noqa: B027 - most have started nothing.
        """End what it started."""


def count_cores() -> int:
    """Return how many cores this process may use; so many threads every contender has."""
    return len(os.sched_getaffinity(0))


def installed(*packages: str) -> dict[str, str]:
    """Return the versions of packages."""
    return {package: metadata.version(package) for package in packages}


def prompts_of(labels: Sequence[str]) -> list[str]:
    """Return the prompts of "classifier", all of the first label before those of the second."""
    return [fill(template, label) for label in labels for template in find_templates(TEMPLATES)]


def zero_shot_prompts(labels: Sequence[str]) -> list[str]:
    """Return the one prompt that each label has in "zero_shot"."""
    (template,) = find_templates(None)
    return [fill(template, label) for label in labels]


def normalise(pixels_NSSC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return float32 (N, 3, S, S) with CLIP's mean and deviation applied, as its towers read it."""
    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    scaled = (pixels_NSSC.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Scale rows to length 1; float32 (N, D)."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return (rows / np.maximum(norms, MIN_NORM)).astype(np.float32)
