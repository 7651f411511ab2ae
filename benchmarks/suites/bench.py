"""What a run is measured with, and what it has found so far.

Whoever takes part in a case must answer right first: `Bench.admit` holds the answers of all against
those of torch in FP32, and nobody else is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from benchmarks.contenders.process import ContenderProcess
from benchmarks.findings import Accuracy, Duration, Level, Row, Stages
from benchmarks.machine import Probe
from benchmarks.suites.cases import Case
from clip_rt.inputs.tokenizer import TextTokenizer
from clip_rt.specs import EncoderFacts, ModelSpec

MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.99}
"""Of every answer with that of torch in FP32; below, it is a wrong one."""

Embeddings = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured, and how well."""

    is_full: bool
    target: float
    """Half-width of the interval of a median that is enough, as a share."""
    budget_s: float
    """For the turns of one case, in all starts together."""
    num_starts: int = 2
    """How often everyone is started anew to time the cases again."""
    level_s: float = 5.0
    """One turn of a contender under load."""
    level_rounds: int = 3
    arrivals_s: float = 15.0
    """How long calls arrive at one rate."""
    num_stage_calls: int = 21


class Progress:
    """A line for each step of a run, and what happens within it; used as a context manager.

    Args:
        console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("start")

    def __enter__(self) -> Progress:
        self._status.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._status.stop()

    def step(self, what: str) -> None:
        """Begin a step."""
        self.say(what)
        self._console.print(what, style="dim", highlight=False, markup=False)

    def say(self, what: str) -> None:
        """Say what happens within a step, where someone watches."""
        self._status.update(Text(what))


@dataclass(kw_only=True)
class Taken:
    """The turns of a case, in each start of the contenders that had it."""

    case: Case
    starts: list[dict[str, list[float]]] = field(default_factory=list)
    """Seconds of a call, one for each round, by contender, and of the probe."""
    min_cosine: dict[str, float] = field(default_factory=dict)
    """Of each contender, the worst in any start."""


@dataclass(kw_only=True)
class Bench:
    """What a run is measured with, and what it has found."""

    model: str
    """Architecture."""
    weights: str
    spec: ModelSpec | None
    """None of a model of another library, whose operations nobody here counts."""
    facts: EncoderFacts
    """How it is fed."""
    tokenizer: TextTokenizer
    settings: Settings
    contenders: Mapping[str, ContenderProcess]
    """In the order in which they are shown."""
    baseline: str
    """Whose times are the measure of `Row.speed`."""
    probe: Probe
    progress: Progress
    reference: Callable[[Case], Embeddings]
    """What FP32 answers."""
    served: Mapping[str, tuple[Path, str]]
    """Of those that the embedded Triton serves: the model repository, and the model's name."""
    probe_s: list[float] = field(default_factory=list)
    """Seconds of the probe in all rounds."""
    is_last_start: bool = True
    """What is not repeated in each start is measured in the last."""
    taken: dict[str, Taken] = field(default_factory=dict)
    """By the key of the case; rows are made of it when all starts are over."""
    rows: list[Row] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    stages: list[Stages] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)
    durations: list[Duration] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was not measured, and why; no failures."""
    failures: list[str] = field(default_factory=list)
    refused: set[tuple[str, str]] = field(default_factory=set)
    """Case and contender whose answers were wrong in any start; they have no row."""
    num_starts: int = 0
    """How often the contenders were started, for all that is measured."""
    _told: set[tuple[str, str]] = field(default_factory=set)
    """Case and contender of which it was said that it raised, or was wrong."""
    _admitted: dict[str, dict[str, float]] = field(default_factory=dict)
    _reference: dict[str, Embeddings] = field(default_factory=dict)

    def begin_start(self, *, is_last: bool) -> None:
        """Forget who is admitted: the contenders are new, and have none of the items."""
        self.num_starts += 1
        self.is_last_start = is_last
        self._admitted.clear()

    def admit(self, case: Case) -> dict[str, float]:
        """Give everyone who can do it the items of a case, and check what they answer.

        Returns:
            The worst cosine with the reference, by the names of those whose answers are right. Who
            raises is among `failures`; whose answers are wrong too, or, if it is a peer, among
            `notes`. Each is told once for each case, in whatever start it was seen first.
        """
        if case.key not in self._admitted:
            if case.key not in self._reference:
                self.progress.say(f"{case.key}: reference")
                self._reference[case.key] = self.reference(case)
            expected = self._reference[case.key]
            self._admitted[case.key] = {}
            for name, contender in self.contenders.items():
                if case.call not in contender.calls:
                    continue
                self.progress.say(f"{case.key}: answers of {name}")
                try:
                    contender.load(case.key, case.call, case.items)
                    cosines = row_cosines(contender.answer(case.key), expected)
                except Exception as error:  # The others are still worth their time.
                    self._tell(self.failures, case, name, f"{case.key}: {name} raised {error!r}")
                    continue
                limit = MIN_COSINE[contender.facts.precision]
                worst = float(cosines.min())
                if worst >= limit:
                    self._admitted[case.key][name] = worst
                else:
                    self.refused.add((case.key, name))
                    # What is wrong with somebody else's is worth knowing, and no fault of the run.
                    is_peer = contender.facts.kind == "peer"
                    remarks = self.notes if is_peer else self.failures
                    remark = (
                        f"{case.key}: the answers of {name} are wrong and have no speed: the "
                        f"cosine with FP32 is {worst:.5f} at worst, below {limit}"
                    )
                    self._tell(remarks, case, name, remark)
        return self._admitted[case.key]

    def _tell(self, remarks: list[str], case: Case, name: str, remark: str) -> None:
        if (case.key, name) not in self._told:
            self._told.add((case.key, name))
            remarks.append(remark)

    def cosines(self, case: Case, name: str) -> NDArray[np.float64]:
        """Return the cosine of each answer to an admitted case with the reference."""
        return row_cosines(self.contenders[name].answer(case.key), self._reference[case.key])


def row_cosines(found: Embeddings, expected: Embeddings) -> NDArray[np.float64]:
    """Return the cosine of each row with its like; NaN where there is none.

    Args:
        found: (N, D).
        expected: (N, D).
    """
    if found.shape != expected.shape:
        return np.full(max(1, len(expected)), np.nan)
    a, b = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines: NDArray[np.float64] = (a * b).sum(1) / (
            np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        )
    return cosines
