"""The gate every exported model passes: is it the FP32 torch model, within a stated tolerance?

Two encoders of numpy arrays go in, a report comes out, or `ParityError` when they drift. The
reference is `training.model.CLIP` itself with the constants of `clip_rt.specs`, not the exported
graph's torch form, so that a mistake in `graphs.py` is caught too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from clip_rt.errors import ParityError
from clip_rt.requests.batches import MAX_ROWS, TextPlan, plan_texts
from clip_rt.specs import EMBEDDINGS, TEXT_BUCKETS, Tower
from export import probes
from export.int8 import load_openvino
from export.parity_report import (
    MAX_NORM_ERROR,
    TOLERANCES,
    Case,
    Choices,
    ParityReport,
    Precision,
    tower_precision,
)
from export.samples import NO_TEXT, Samples
from training.dual_encoder import DualEncoder

FloatArray = NDArray[np.float32]
Encoder = Callable[[NDArray[np.generic]], FloatArray]
"""Pixels or tokens of a batch to embeddings; may raise whatever its runtime raises."""
FileRuntime = Literal["onnxruntime", "openvino"]
"""What runs an exported file on a processor."""
IN_WORDS: dict[FileRuntime, str] = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def check(
    clip: DualEncoder,
    *,
    encode_images: Encoder,
    encode_texts: Encoder,
    precision: Precision,
    text_lengths: tuple[int, ...] = TEXT_BUCKETS,
    max_batch_size: int | None = None,
    samples: Sequence[Samples] = (),
) -> ParityReport:
    """Compare both encoders with the model they were exported from.

    Args:
        clip: The reference, float32, in eval mode.
        encode_images: uint8 (N, S, S, 3) to float32 (N, E), L2-normalised.
        encode_texts: int32 (N, L) to float32 (N, E), L2-normalised.
        precision: Chooses the row of `TOLERANCES`.
        text_lengths: Each L to try; the reference always reads the whole context, so that a cut
            which is not exact shows.
        max_batch_size: Also try a batch of this size, the probes repeated; an engine's kernels are
            others there.
        samples: The user's own images and texts, measured too.

    Returns:
        The report; every case is within the tolerance.

    Raises:
        ParityError: some case is not; carries the report as JSON values.
    """
    return _check_all(
        clip,
        {"": lambda: (encode_images, encode_texts)},
        precision=precision,
        text_lengths=text_lengths,
        max_batch_size=max_batch_size,
        samples=samples,
    )


def check_files(
    clip: DualEncoder,
    *,
    image: Path,
    text: Path,
    precision: Precision,
    runtimes: Sequence[FileRuntime] = ("onnxruntime",),
    samples: Sequence[Samples] = (),
) -> ParityReport:
    """Run `check` on two files on the CPU.

    Args:
        clip: The reference, float32, in eval mode.
        image: Of the image tower; ONNX, or OpenVINO's where it ends in .xml.
        text: Of the text tower.
        precision: Chooses the row of `TOLERANCES`.
        runtimes: Each must agree with the reference. OpenVINO's own files are run by OpenVINO,
            whatever is given.
        samples: The user's own images and texts, measured too.

    Raises:
        ExportError: OpenVINO is asked for and not installed.
        ParityError: see `check`.
    """
    if image.suffix == text.suffix == ".xml":
        runtimes = ("openvino",)
    return _check_all(
        clip,
        {IN_WORDS[each]: partial(load_files, image, text, each) for each in runtimes},
        precision=precision,
        samples=samples,
    )


def load_files(
    image: Path, text: Path, runtime: FileRuntime = "onnxruntime"
) -> tuple[Encoder, Encoder]:
    """Load the exported files of both towers, on the CPU; OpenVINO's own are run by OpenVINO."""
    if runtime == "onnxruntime" and image.suffix != ".xml":
        return onnx_encoder(image), onnx_encoder(text)
    num_threads = torch.get_num_threads()
    return load_openvino(image, num_threads), load_openvino(text, num_threads)


def installed_runtimes() -> tuple[FileRuntime, ...]:
    """Return what may serve an ONNX file and can be asked here."""
    has_openvino = importlib.util.find_spec("openvino") is not None
    return ("onnxruntime", "openvino") if has_openvino else ("onnxruntime",)


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


@dataclass(frozen=True)
class _Probed:
    """The probes and what torch answers."""

    pixels: NDArray[np.uint8]
    tokens: NDArray[np.int32]
    needed_N: NDArray[np.intp]
    """How many of its tokens each text has."""
    image_NE: FloatArray
    text_NE: FloatArray
    lengths: Sequence[int]
    """Each the texts that fit are cut to."""


@dataclass(frozen=True)
class _Sampled:
    """A user's sample, its texts in batches as a client would send them, and what torch answers."""

    samples: Samples
    plan: TextPlan
    image_NE: FloatArray
    text_ME: FloatArray | None
    """In the order of the plan; None where there are no texts."""


def _check_all(
    clip: DualEncoder,
    loaders: Mapping[str, Callable[[], tuple[Encoder, Encoder]]],
    *,
    precision: Precision,
    text_lengths: Sequence[int] = TEXT_BUCKETS,
    max_batch_size: int | None = None,
    samples: Sequence[Samples] = (),
) -> ParityReport:
    """Run `check` on pairs of encoders with one reference.

    Each pair is made when the one before is done with: no two models lie in memory. The key of its
    maker is what its cases are said to be by.
    """
    pixels = probes.images(clip.facts.side_px)
    tokens, needed = probes.tokens_of(clip)
    if not clip.facts.is_any_length_exact:
        text_lengths = (tokens.shape[1],)
    lengths = sorted({min(length, tokens.shape[1]) for length in text_lengths})
    image_NE, text_NE = _reference_images(clip, pixels), _reference_texts(clip, tokens)
    probed = _Probed(pixels, tokens, needed, image_NE, text_NE, lengths)
    sampled = [_sample(clip, each, lengths) for each in samples]
    cases: list[Case] = []
    choices: list[Choices] = []
    agreements: list[float] = []
    for runtime, load in loaders.items():
        by = f" by {runtime}" if runtime else ""
        encoders = load()
        more, agreement = _check_probes(probed, *encoders, precision, by, max_batch_size)
        cases += more
        agreements.append(agreement)
        for each in sampled:
            more, chosen = _check_samples(each, *encoders, precision, by)
            cases += more
            choices += chosen
    report = ParityReport(
        architecture=clip.facts.name,
        precision=precision,
        tolerance=TOLERANCES[precision],
        cases=tuple(cases),
        choices=tuple(choices),
        top1_agreement=min(agreements),
    )
    if not report.passed:
        raise ParityError(_complaint(report), report=report.to_json())
    return report


def _sample(clip: DualEncoder, samples: Samples, lengths: Sequence[int]) -> _Sampled:
    pad_id = clip.facts.tokenization.pad_id
    plan = plan_texts(samples.token_ids, max_rows=MAX_ROWS, buckets=lengths, pad_id=pad_id)
    images = [_reference_images(clip, each) for each in samples.image_batches(MAX_ROWS)]
    texts = [_reference_texts(clip, each) for each in plan.batches]
    text_ME = np.concatenate(texts) if samples.token_ids else None
    return _Sampled(samples, plan, np.concatenate(images), text_ME)


def _check_probes(
    probed: _Probed,
    encode_images: Encoder,
    encode_texts: Encoder,
    precision: Precision,
    by: str,
    max_batch_size: int | None,
) -> tuple[list[Case], float]:
    """Compare both encoders on the probes; return the share of images with the same text too."""
    cases: list[Case] = []

    def compare(
        tower: Tower, items: NDArray[np.generic], encode: Encoder, expected_NE: FloatArray, of: str
    ) -> FloatArray:
        """Add a case for each size of batch; return the embeddings of all items in one."""
        together_NE = encode(items)
        for size in sorted({1, 2, 3, len(items), max_batch_size or 1}):
            rows = np.arange(size) % len(items)
            cases.append(
                _compare(
                    tower,
                    f"{size} {tower}s{of}{by}",
                    together_NE if size == len(items) else encode(items[rows]),
                    expected=expected_NE[rows],
                    together=together_NE[rows],
                    precision=precision,
                )
            )
        return together_NE

    image_NE, text_NE = probed.image_NE, probed.text_NE
    found_image_NE = compare("image", probed.pixels, encode_images, image_NE, "")
    for length in probed.lengths:
        fits = np.flatnonzero(probed.needed_N <= length)
        cut = np.ascontiguousarray(probed.tokens[fits, :length])
        found_text_NE = compare("text", cut, encode_texts, text_NE[fits], f" of {length}")
    tie = TOLERANCES[precision].max_difference
    return cases, _top1_agreement(image_NE @ text_NE[fits].T, found_image_NE @ found_text_NE.T, tie)


def _check_samples(
    sampled: _Sampled,
    encode_images: Encoder,
    encode_texts: Encoder,
    precision: Precision,
    by: str,
) -> tuple[list[Case], list[Choices]]:
    """Compare both encoders on a user's sample."""
    samples, plan = sampled.samples, sampled.plan
    image_NE, text_ME = sampled.image_NE, sampled.text_ME
    cases: list[Case] = []

    def compare(tower: Tower, found: FloatArray, expected: FloatArray) -> None:
        name = f"{len(found)} {tower}s of {samples.name}{by}"
        cases.append(
            _compare(tower, name, found, expected=expected, together=found, precision=precision)
        )

    images = samples.image_batches(MAX_ROWS)
    found_image_NE = np.concatenate([encode_images(each) for each in images])
    compare("image", found_image_NE, image_NE)
    if text_ME is None:
        return cases, []
    found_text_ME = np.concatenate([encode_texts(each) for each in plan.batches])
    compare("text", found_text_ME, text_ME)
    order = plan.row_by_text
    expected_N = (image_NE @ text_ME[order].T).argmax(axis=1)
    found_N = (found_image_NE @ found_text_ME[order].T).argmax(axis=1)
    has_text_N = samples.right_N != NO_TEXT
    lost, top1, reference_top1 = 0.0, None, None
    if has_text_N.any():
        top1 = float((found_N == samples.right_N)[has_text_N].mean())
        reference_top1 = float((expected_N == samples.right_N)[has_text_N].mean())
        lost = reference_top1 - top1
    choices = Choices(
        name=f"{samples.name}{by}",
        num_images=len(found_N),
        num_texts=len(order),
        agreement=float((expected_N == found_N).mean()),
        reference_top1=reference_top1,
        top1=top1,
        passed=lost <= TOLERANCES[precision].max_top1_lost,
    )
    return cases, [choices]


@torch.inference_mode()
def _reference_images(clip: DualEncoder, pixels: NDArray[np.uint8]) -> FloatArray:
    image_NCSS = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean_C11 = torch.tensor(clip.facts.mean).view(3, 1, 1)
    std_C11 = torch.tensor(clip.facts.std).view(3, 1, 1)
    embeddings_NE = clip.encode_image((image_NCSS - mean_C11) / std_C11)
    return torch.nn.functional.normalize(embeddings_NE, dim=-1).numpy()


@torch.inference_mode()
def _reference_texts(clip: DualEncoder, tokens: NDArray[np.int32]) -> FloatArray:
    embeddings_NE = clip.encode_text(torch.from_numpy(tokens).long())
    return torch.nn.functional.normalize(embeddings_NE, dim=-1).numpy()


def _compare(
    tower: Tower,
    name: str,
    found: FloatArray,
    *,
    expected: FloatArray,
    together: FloatArray,
    precision: Precision,
) -> Case:
    """Compare a batch's embeddings with the reference, and with the same in another batch."""
    if found.shape != expected.shape or found.dtype != np.float32:
        raise ParityError(
            f"the {tower} tower answers {found.dtype} {found.shape} to {name}; the contract wants "
            f"float32 {expected.shape}.",
            report={},
        )
    tolerance = TOLERANCES[tower_precision(precision, tower)]
    # In float64, since 1 - cosine is near float32's resolution.
    a, b = found.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(a, axis=1)
    finite = np.isfinite(norms) & (norms > 0)
    num_nonfinite = int((~finite).sum())
    cosines = (a * b).sum(axis=1)[finite] / (norms * np.linalg.norm(b, axis=1))[finite]
    # An empty or NaN comparison must never pass.
    is_sound = num_nonfinite == 0 and bool(np.isfinite(together).all())
    min_cosine = float(cosines.min()) if is_sound else -1.0
    max_difference = float(np.abs(a - b).max()) if is_sound else 2.0
    batch_difference = float(np.abs(found - together).max()) if is_sound else 2.0
    norm_error = float(np.abs(norms - 1).max()) if is_sound else 1.0
    return Case(
        tower=tower,
        name=name,
        num_items=len(found),
        min_cosine=min_cosine,
        p01_cosine=float(np.quantile(cosines, 0.01)) if is_sound else -1.0,
        mean_cosine=float(cosines.mean()) if finite.any() else -1.0,
        max_difference=max_difference,
        batch_difference=batch_difference,
        norm_error=norm_error,
        num_nonfinite=num_nonfinite,
        passed=(
            min_cosine >= tolerance.min_cosine
            and max_difference <= tolerance.max_difference
            and batch_difference <= tolerance.max_batch_difference
            and norm_error <= MAX_NORM_ERROR
        ),
    )


def _top1_agreement(expected_NM: FloatArray, found_NM: FloatArray, tie: float) -> float:
    rows = np.arange(len(expected_NM))
    chosen = expected_NM[rows, found_NM.argmax(axis=1)]
    return float((chosen >= expected_NM.max(axis=1) - tie).mean())


def _complaint(report: ParityReport) -> str:
    failed = [case for case in report.cases if not case.passed]
    worse = [each for each in report.choices if not each.passed]
    if worse and not failed:
        each = worse[0]
        return (
            f"{report.architecture} in {report.precision} is right for {each.top1:.3f} of the "
            f"{each.num_images} images of {each.name}, and was for {each.reference_top1:.3f}; it "
            f"may lose {report.tolerance.max_top1_lost}. Nothing was published."
        )
    if not failed:
        return (
            f"{report.architecture} in {report.precision} chooses the reference's prompt for "
            f"{report.top1_agreement:.3f} of the images; the limit is "
            f"{report.tolerance.top1_agreement}. Nothing was published."
        )
    worst = min(failed, key=lambda case: case.min_cosine)
    limits = TOLERANCES[tower_precision(report.precision, worst.tower)]
    return (
        f"{report.architecture} in {report.precision} drifts from torch in {len(failed)} of "
        f"{len(report.cases)} cases; worst is the {worst.tower} tower at {worst.name}: cosine "
        f"{worst.min_cosine:.7f} (limit {limits.min_cosine}), difference "
        f"{worst.max_difference:.2e} (limit {limits.max_difference:.0e}), with the batch "
        f"{worst.batch_difference:.2e} (limit {limits.max_batch_difference:.0e}), of the "
        f"length from 1 {worst.norm_error:.1e} (limit {MAX_NORM_ERROR:.0e}), "
        f"{worst.num_nonfinite} not finite. Nothing was published."
    )
