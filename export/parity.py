"""The gate every exported model passes: is it the FP32 torch model, within a stated tolerance?

Two encoders of numpy arrays go in, a report comes out, or `ParityError` when they drift. The
reference is `training.model.CLIP` itself with the constants of `clip_rt.specs`, not the exported
graph's torch form, so that a mistake in `graphs.py` is caught too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from clip_rt.errors import ParityError
from clip_rt.specs import CLIP_MEAN, CLIP_STD, EMBEDDINGS, END_OF_TEXT, TEXT_BUCKETS
from export import probes
from training.model import CLIP

FloatArray = NDArray[np.float32]
Encoder = Callable[[NDArray[np.generic]], FloatArray]
"""Pixels or tokens of a batch to embeddings; may raise whatever its runtime raises."""
Precision = Literal["fp32", "fp16_weights", "fp16", "int8"]
"""Of the exported model: FP32; FP32 on weights rounded to FP16; FP16 layers; INT8 products."""
Tower = Literal["image", "text"]


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


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(
        min_cosine=0.999999, max_difference=2e-5, top1_agreement=1.0, max_batch_difference=1e-5
    ),
    "fp16_weights": Tolerance(
        min_cosine=0.9999, max_difference=2e-3, top1_agreement=0.99, max_batch_difference=1e-5
    ),
    "fp16": Tolerance(
        min_cosine=0.9995, max_difference=1e-2, top1_agreement=0.98, max_batch_difference=5e-3
    ),
    "int8": Tolerance(
        min_cosine=0.97, max_difference=5e-2, top1_agreement=0.95, max_batch_difference=2e-2
    ),
}


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
    """Largest difference from the same items in the largest batch."""
    num_nonfinite: int
    """Embeddings with a NaN, an infinity, or no length at all."""
    passed: bool


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How far an exported model is from its reference, case by case."""

    architecture: str
    precision: Precision
    tolerance: Tolerance
    cases: tuple[Case, ...]
    top1_agreement: float
    """A choice counts as agreeing when the reference ranks it within `max_difference` of its own
    best, so that ties do not decide."""

    @property
    def passed(self) -> bool:
        """Whether every case and the agreement are within the tolerance."""
        agrees = self.top1_agreement >= self.tolerance.top1_agreement
        return agrees and all(case.passed for case in self.cases)

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON values."""
        return asdict(self) | {"passed": self.passed}


def check(
    clip: CLIP,
    *,
    encode_images: Encoder,
    encode_texts: Encoder,
    precision: Precision,
    text_lengths: tuple[int, ...] = TEXT_BUCKETS,
) -> ParityReport:
    """Compare both encoders with the model they were exported from.

    Args:
        clip: The reference, float32, in eval mode.
        encode_images: uint8 (N, S, S, 3) to float32 (N, E), L2-normalised.
        encode_texts: int32 (N, L) to float32 (N, E), L2-normalised.
        precision: Chooses the row of `TOLERANCES`.
        text_lengths: Each L to try; the reference always reads the whole context, so that a cut
            which is not exact shows.

    Returns:
        The report; every case is within the tolerance.

    Raises:
        ParityError: some case is not; carries the report as JSON values.
    """
    tolerance = TOLERANCES[precision]
    pixels = probes.images(clip.spec.side_px)
    tokens = probes.tokens(clip.spec.text.context_length)
    image_NE, text_NE = _reference_images(clip, pixels), _reference_texts(clip, tokens)
    cases = []
    found_image_NE = encode_images(pixels)
    for num_items in (1, 2, 3, len(pixels)):
        name = f"{num_items} images"
        found = encode_images(pixels[:num_items]) if num_items < len(pixels) else found_image_NE
        cases.append(
            _compare(
                "image",
                name,
                found,
                reference=image_NE,
                largest_batch=found_image_NE,
                num_items=num_items,
                tolerance=tolerance,
            )
        )
    last = np.argmax(tokens == END_OF_TEXT, axis=1)
    for length in sorted({min(length, tokens.shape[1]) for length in text_lengths}):
        fits = np.flatnonzero(last < length)
        cut = np.ascontiguousarray(tokens[fits, :length])
        found_text_NE = encode_texts(cut)
        for num_items in (1, 2, 3, len(fits)):
            name = f"{num_items} texts of {length}"
            found = encode_texts(cut[:num_items]) if num_items < len(cut) else found_text_NE
            cases.append(
                _compare(
                    "text",
                    name,
                    found,
                    reference=text_NE[fits],
                    largest_batch=found_text_NE,
                    num_items=num_items,
                    tolerance=tolerance,
                )
            )
    report = ParityReport(
        architecture=clip.spec.name,
        precision=precision,
        tolerance=tolerance,
        cases=tuple(cases),
        top1_agreement=_top1_agreement(
            image_NE @ text_NE.T, found_image_NE @ found_text_NE.T, tolerance.max_difference
        ),
    )
    if not report.passed:
        raise ParityError(_complaint(report), report=report.to_json())
    return report


def check_onnx(clip: CLIP, *, image: Path, text: Path, precision: Precision) -> ParityReport:
    """Run `check` on two ONNX files in ONNX Runtime, on the CPU.

    Raises:
        ParityError: see `check`.
    """
    return check(
        clip,
        encode_images=onnx_encoder(image),
        encode_texts=onnx_encoder(text),
        precision=precision,
    )


def onnx_encoder(path: Path) -> Encoder:
    """Load an exported ONNX file into ONNX Runtime, on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Torch's own threads work between the calls.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    input_name = session.get_inputs()[0].name

    def encode(batch: NDArray[np.generic]) -> FloatArray:
        return session.run([EMBEDDINGS], {input_name: batch})[0]

    return encode


@torch.inference_mode()
def _reference_images(clip: CLIP, pixels: NDArray[np.uint8]) -> FloatArray:
    image_NCSS = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean_C11 = torch.tensor(CLIP_MEAN).view(3, 1, 1)
    std_C11 = torch.tensor(CLIP_STD).view(3, 1, 1)
    embeddings_NE = clip.encode_image((image_NCSS - mean_C11) / std_C11)
    return torch.nn.functional.normalize(embeddings_NE, dim=-1).numpy()


@torch.inference_mode()
def _reference_texts(clip: CLIP, tokens: NDArray[np.int32]) -> FloatArray:
    embeddings_NE = clip.encode_text(torch.from_numpy(tokens))
    return torch.nn.functional.normalize(embeddings_NE, dim=-1).numpy()


def _compare(
    tower: Tower,
    name: str,
    found: FloatArray,
    *,
    reference: FloatArray,
    largest_batch: FloatArray,
    num_items: int,
    tolerance: Tolerance,
) -> Case:
    """Compare a batch's embeddings with the first rows of the reference and of a larger batch."""
    expected, largest_batch = reference[:num_items], largest_batch[:num_items]
    if found.shape != expected.shape or found.dtype != np.float32:
        raise ParityError(
            f"the {tower} tower answers {found.dtype} {found.shape} to {name}; the contract wants "
            f"float32 {expected.shape}.",
            report={},
        )
    # In float64, since 1 - cosine is near float32's resolution.
    a, b = found.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(a, axis=1)
    finite = np.isfinite(norms) & (norms > 0)
    num_nonfinite = int((~finite).sum())
    cosines = (a * b).sum(axis=1)[finite] / (norms * np.linalg.norm(b, axis=1))[finite]
    # An empty or NaN comparison must never pass.
    is_sound = num_nonfinite == 0 and bool(np.isfinite(largest_batch).all())
    min_cosine = float(cosines.min()) if is_sound else -1.0
    max_difference = float(np.abs(a - b).max()) if is_sound else 2.0
    batch_difference = float(np.abs(found - largest_batch).max()) if is_sound else 2.0
    return Case(
        tower=tower,
        name=name,
        num_items=len(found),
        min_cosine=min_cosine,
        p01_cosine=float(np.quantile(cosines, 0.01)) if is_sound else -1.0,
        mean_cosine=float(cosines.mean()) if finite.any() else -1.0,
        max_difference=max_difference,
        batch_difference=batch_difference,
        num_nonfinite=num_nonfinite,
        passed=(
            min_cosine >= tolerance.min_cosine
            and max_difference <= tolerance.max_difference
            and batch_difference <= tolerance.max_batch_difference
        ),
    )


def _top1_agreement(expected_NM: FloatArray, found_NM: FloatArray, tie: float) -> float:
    rows = np.arange(len(expected_NM))
    chosen = expected_NM[rows, found_NM.argmax(axis=1)]
    return float((chosen >= expected_NM.max(axis=1) - tie).mean())


def _complaint(report: ParityReport) -> str:
    failed = [case for case in report.cases if not case.passed]
    if not failed:
        return (
            f"{report.architecture} in {report.precision} chooses the reference's prompt for "
            f"{report.top1_agreement:.3f} of the images; the limit is "
            f"{report.tolerance.top1_agreement}. Nothing was published."
        )
    worst = min(failed, key=lambda case: case.min_cosine)
    return (
        f"{report.architecture} in {report.precision} drifts from torch in {len(failed)} of "
        f"{len(report.cases)} cases; worst is the {worst.tower} tower at {worst.name}: cosine "
        f"{worst.min_cosine:.7f} (limit {report.tolerance.min_cosine}), difference "
        f"{worst.max_difference:.2e} (limit {report.tolerance.max_difference:.0e}), with the batch "
        f"{worst.batch_difference:.2e} (limit {report.tolerance.max_batch_difference:.0e}), "
        f"{worst.num_nonfinite} not finite. Nothing was published."
    )
