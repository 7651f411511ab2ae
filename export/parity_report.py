"""What is measured of an exported model against the FP32 reference, and what may differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from clip_rt.specs import Tower

Precision = Literal["fp32", "fp16_weights", "fp16", "fp8", "int8"]
"""Of the exported model: FP32; FP32 on weights rounded to FP16; FP16 layers; FP8 or INT8 products.
Of fp8 the text tower is FP16, see `tower_precision`."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What an exported model may differ from the FP32 reference."""

    min_cosine: float
    """Smallest cosine of any embedding with its reference."""
    max_difference: float
    """Largest absolute difference of any component; components lie in [-1, 1]."""
    top1_agreement: float
    """Share of images for which both choose the same prompt."""
    max_batch_difference: float
    """Largest change of any component that the size of its batch makes."""
    max_top1_lost: float
    """Of the user's samples, how much lower the share of right choices may be."""


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(
        min_cosine=0.999999,
        max_difference=2e-5,
        top1_agreement=1.0,
        max_batch_difference=1e-5,
        max_top1_lost=0.001,
    ),
    "fp16_weights": Tolerance(
        min_cosine=0.9999,
        max_difference=2e-3,
        top1_agreement=0.99,
        max_batch_difference=1e-5,
        max_top1_lost=0.005,
    ),
    "fp16": Tolerance(
        min_cosine=0.9995,
        max_difference=1e-2,
        top1_agreement=0.98,
        max_batch_difference=5e-3,
        max_top1_lost=0.005,
    ),
    # Rounding to E4M3 alone leaves a cosine of 0.9993 on average, see `export.fp8`; of 200 drawings
    # through a small trained tower the worst had 0.998. Further off, ranges do not fit, or a model
    # magnifies what is lost.
    "fp8": Tolerance(
        min_cosine=0.995,
        max_difference=5e-2,
        top1_agreement=0.98,
        max_batch_difference=2e-2,
        max_top1_lost=0.005,
    ),
    # Loose for a single odd picture, strict on what is chosen for the user's own.
    "int8": Tolerance(
        min_cosine=0.8,
        max_difference=0.2,
        top1_agreement=0.75,
        max_batch_difference=1e-5,
        max_top1_lost=0.01,
    ),
}


def tower_precision(precision: Precision, tower: Tower) -> Precision:
    """Return the precision of one tower of an export, which its tolerance goes by too."""
    return "fp16" if (precision, tower) == ("fp8", "text") else precision


MAX_NORM_ERROR = 1e-3
"""In every precision: the L2 normalisation is always FP32."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an exported encoder against the reference."""

    tower: Tower
    name: str
    num_items: int
    min_cosine: float
    p01_cosine: float
    """First percentile: what one embedding in a hundred is worse than."""
    mean_cosine: float
    max_difference: float
    batch_difference: float
    """Largest difference from the same items in a batch of all."""
    norm_error: float
    """Largest difference of a length from 1."""
    num_nonfinite: int
    """Embeddings with a NaN, an infinity, or no length at all."""
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Which texts an exported model and its reference choose for the images of a user's sample."""

    name: str
    num_images: int
    num_texts: int
    agreement: float
    """Share of the images for which both choose the same text, ties counted as they are."""
    reference_top1: float | None
    """Share of right choices; None where no image has a text of its own."""
    top1: float | None
    passed: bool


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How far an exported model is from its reference, case by case."""

    architecture: str
    precision: Precision
    tolerance: Tolerance
    cases: tuple[Case, ...]
    top1_agreement: float
    """On the probes. A choice counts as agreeing when the reference ranks it within
    `max_difference` of its own best, so that ties do not decide."""
    choices: tuple[Choices, ...] = ()
    """On the user's samples, where there are any."""

    @property
    def passed(self) -> bool:
        """Whether every case and the agreement are within the tolerance."""
        agrees = self.top1_agreement >= self.tolerance.top1_agreement
        fits = all(each.passed for each in self.cases) and all(c.passed for c in self.choices)
        return agrees and fits

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON values."""
        return asdict(self) | {"passed": self.passed}
