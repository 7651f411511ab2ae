"""What a contender is, in the process that it has to itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

import clip_rt
from benchmarks.findings import CallKind
from clip_rt.classification.zero_shot import MIN_NORM
from clip_rt.inputs.prompts import fill, find_templates

TEMPLATES = "openai_imagenet"
"""The 80 prompts that each class has in a "classifier" call; "zero_shot" has one for each label."""


class UnfitError(Exception):
    """A contender cannot take part here; the message says why."""


class Implementation(Protocol):
    """One way to embed images and texts.

    Only the served ones need allow `run` from several threads at once.
    """

    calls: frozenset[CallKind]
    """What it can do."""
    versions: dict[str, str]
    """Of the packages that decide its speed."""

    def prepare(self, call: CallKind, items: Any) -> Any:
        """Bring items, as `items.read_items` returns them, to the form its call takes; untimed."""
        ...

    def run(self, call: CallKind, prepared: Any) -> NDArray[np.float32]:
        """Do what is timed; see `findings.CallKind` for what comes back."""
        ...

    def pids(self) -> list[int]:
        """Return the processes beside its own that work for it."""
        ...

    def close(self) -> None:
        """End what it started."""
        ...


@runtime_checkable
class Staged(Protocol):
    """A contender whose client can tell where the time of a call goes."""

    @property
    def client(self) -> clip_rt.Client:
        """What makes the calls."""
        ...


@runtime_checkable
class Profiled(Protocol):
    """A contender whose engine counts how long each of its operators takes."""

    def profile(self, call: CallKind, prepared: Any, num_calls: int) -> list[dict[str, float]]:
        """Return for each of some runs the seconds by kind of operator, and `total`."""
        ...


@runtime_checkable
class OnDevice(Protocol):
    """A contender on an accelerator that can be timed without the transfers."""

    def time_on_device(self, call: CallKind, prepared: Any, num_calls: int) -> list[float]:
        """Return the seconds of each of some runs, by the accelerator's own clock."""
        ...


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


def unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Scale rows to length 1; float32 (N, D)."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return (rows / np.maximum(norms, MIN_NORM)).astype(np.float32)
