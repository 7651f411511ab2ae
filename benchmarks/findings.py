"""What a run of `benchmarks/run.py` found: written to JSON, read back, drawn. Computes nothing.

Times are milliseconds of one call unless a name says otherwise; a call has `items` items.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from clip_rt.planning.work import Precision as Precision

Kind = Literal["runtime", "served", "gateway", "peer"]
"""An engine called directly; the whole path from client to engine; HTTP in front of that; what
people use instead."""
CallKind = Literal["pixels", "jpegs", "texts", "classifier", "zero_shot"]
"""What goes into a call.

pixels: uint8 (N, S, S, 3), resized and cropped; float and normalised beforehand for those that
read it so. jpegs: N encoded files. texts: N strings. classifier: labels, of which each has 80
prompts. zero_shot: N encoded files against labels that are known already.
All but the last answer float32 (N, D) of length 1, zero_shot answers (N, C) probabilities.
"""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A median, and where it lies with 95 % confidence."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class StartUp:
    """From nothing to the first answer."""

    ready_s: float
    first_answer_s: float
    """After ready."""
    rss_mib: float
    """Of all its processes, when ready."""
    peak_rss_mib: float
    """At the end of the run."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something that was measured, or why it was not."""

    name: str
    what: str
    """One sentence for a reader."""
    kind: Kind
    precision: Precision
    versions: dict[str, str] = field(default_factory=dict)
    absent: str | None = None
    """Why it did not take part."""
    startup: StartUp | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender in one case."""

    suite: str
    case: str
    """Such as "batch 32"; what `suite` and `case` name is equal for all contenders."""
    contender: str
    call: CallKind
    items: int
    unit: Literal["images", "texts", "classes"]
    time_ms: Interval
    samples_ms: list[float]
    """One for each round, in order: the mean of the calls of that turn."""
    rounds: list[int] = field(default_factory=list)
    """How many of the samples are of each start of the contender."""
    per_s: Interval
    """Items each second."""
    speed: Interval | None = None
    """Times as fast as `Run.baseline` in the same rounds."""
    steadied: Interval | None = None
    """Time in units of the probe of the same rounds, which a slower hour does not change."""
    flop_per_item: float | None = None
    share_of_limit: Interval | None = None
    """Of what the machine could do with that work, by `limit`."""
    limit: str | None = None
    """Such as "fp32 GEMM"; "memory" where reading the weights takes longer."""
    min_cosine: float | None = None
    """With the embeddings of torch in FP32, the worst of the items."""
    is_noisy: bool = False
    """Its interval is wider than was asked for when the time was up."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A served contender under load: closed loop of some clients, or arrivals at some rate."""

    contender: str
    call: CallKind
    items: int
    num_clients: int | None = None
    """Each sends its next call when it has the answer; None for arrivals."""
    offered_per_s: float | None = None
    """Calls that arrive each second, as a Poisson process; None for a closed loop."""
    answered_per_s: float
    num_calls: int
    num_failed: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    p999_ms: float
    """From the moment a call was due, not from when it could be sent."""
    is_knee: bool = False
    """The highest offered rate that it keeps up with."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Where the time of one call goes."""

    contender: str
    what: str
    total_ms: float
    stages_ms: dict[str, float]
    """In the order of a call; they follow each other, so they add up."""
    missing_ms: float
    """Of the total; negative where stages ran side by side."""
    note: str = ""
    """What is missing, where it is more than 5 %."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """What a precision costs: the bundled model on drawings it has not seen, and cosines."""

    contender: str
    precision: str
    top1: float | None
    num_images: int
    min_cosine: float
    median_cosine: float


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Something that is done now and then: an export, the build of an engine, a training step."""

    what: str
    seconds: float
    peak_rss_mib: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What this machine can do, measured in the run."""

    gemm_fp32_gflop_per_s: Interval
    """At the shape and with the library that do most: a limit that nothing may pass."""
    gemm_fp32_model_gflop_per_s: Interval
    """Of the four products of a layer of ViT-B/32 at 32 images, one after another."""
    gemm_int8_gop_per_s: Interval | None
    read_gb_per_s: Interval
    how: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A figure and what it is held to."""

    what: str
    value: float
    limit: float
    side: Literal["at least", "at most"]

    @property
    def is_met(self) -> bool:
        """Whether the figure is on the right side of the limit; NaN never is."""
        return self.value >= self.limit if self.side == "at least" else self.value <= self.limit


def at_least(what: str, value: float, limit: float) -> Bar:
    """Hold a figure to a lower limit."""
    return Bar(what=what, value=value, limit=limit, side="at least")


def at_most(what: str, value: float, limit: float) -> Bar:
    """Hold a figure to an upper limit."""
    return Bar(what=what, value=value, limit=limit, side="at most")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What else the machine did; a run on a busy machine says so."""

    load_before: float
    steal_share: float
    """Of processor time, taken by other guests of the host."""
    cpu_mhz: Interval | None
    """Over the run, of all cores."""
    probe_ms: Interval
    """A fixed matrix product, timed in every round."""
    warnings: list[str]


@dataclass(frozen=True, kw_only=True)
class Run:
    """All of one run."""

    version: int = 1
    date: str
    command: str
    commit: str
    """With "+" where the working tree differs from it; empty outside a checkout."""
    machine: dict[str, object]
    versions: dict[str, str]
    settings: dict[str, object]
    model: str
    weights: str
    baseline: str
    """Contender whose times are the measure of `Row.speed`."""
    took_s: float
    conditions: Conditions
    peaks: Peaks
    contenders: list[Contender]
    rows: list[Row]
    levels: list[Level] = field(default_factory=list)
    stages: list[Stages] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)
    durations: list[Duration] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Why the run is not to be believed: a row above the limit, a part that raised."""
