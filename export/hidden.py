"""Hidden states of texts, for pipelines of diffusion models: exported, and held against torch.

They are a file of their own beside the text tower's, from the same weights: `specs.HIDDEN_OUTPUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clip_rt.embedded import runtimes
from clip_rt.errors import InputError, ParityError
from clip_rt.specs import HIDDEN_OUTPUTS, MODELS
from export import onnx_writer, probes
from export.config import PRECISION_IN_WORDS
from export.console import mib, stage
from export.graphs import TextHiddenGraph
from export.parity import IN_WORDS, FileRuntime
from export.parity_report import TOLERANCES, Precision, Tolerance
from export.store import Store
from training.dual_encoder import DualEncoder
from training.encoders.of_transformers import HIDDEN_FAMILIES

Encode = Callable[[NDArray[np.int32]], Sequence[NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One output of the exported file for one batch, against the reference."""

    output: str
    name: str
    min_cosine: float
    """Smallest of any position's."""
    max_difference: float
    """Largest of any number, as a share of the largest number of its position, where that is above
    1."""
    batch_difference: float
    """The same from the same texts in a batch of all."""
    passed: bool


def check_encoder(encoder: DualEncoder) -> None:
    """Refuse a model whose text tower has no hidden states as a diffusion model reads them.

    Raises:
        InputError: names those that have.
    """
    if not encoder.has_text_hidden:
        raise InputError(
            f"there is no way to the hidden states of {encoder.facts.name}. There is one of "
            f"clip_rt's own architectures ({', '.join(MODELS)}), and of models of transformers "
            f"that are a {' or '.join(HIDDEN_FAMILIES)}: --model hf:owner/name. Leave "
            "--text-output embeddings."
        )


def make_hidden(
    encoder: DualEncoder, store: Store, *, precision: Precision, weights_fingerprint: str
) -> tuple[Path, int]:
    """Write the hidden states of texts as ONNX, or find them as they were written before.

    Args:
        encoder: Float32, in eval mode.
        store: Where files are kept.
        precision: fp32 or fp16_weights.
        weights_fingerprint: Of the encoder.

    Returns:
        The file, and the width of the text tower.
    """

    def write(path: Path) -> None:
        graph, is_half = TextHiddenGraph(encoder), precision == "fp16_weights"
        onnx_writer.write_onnx(graph, encoder.facts, path, fp16_weights=is_half)

    key = onnx_writer.describe_writing(
        encoder, "hidden", weights_fingerprint=weights_fingerprint, precision=precision
    )
    width = _reference(encoder, probes.tokens_of(encoder)[0][:1])[0].shape[-1]
    with stage("export hidden states of texts") as outcome:
        artefact = store.make("model.onnx", key, write)
        outcome.append(f"ONNX, {PRECISION_IN_WORDS[precision]}, {mib(artefact.path)}")
        outcome.append(f"{encoder.facts.context_length} x {width} for each text")
        if artefact.reused:
            outcome.append("unchanged, reused")
    return artefact.path, width


def check_hidden(
    encoder: DualEncoder,
    path: Path,
    *,
    precision: Precision,
    by: Sequence[FileRuntime],
) -> dict[str, Any]:
    """Compare an exported file with the model it was exported from.

    Args:
        encoder: The reference, float32, in eval mode.
        path: The file; it is called model.onnx.
        precision: Chooses the row of `parity_report.TOLERANCES`.
        by: Runtimes; each must agree with the reference.

    Returns:
        What the published report says of it.

    Raises:
        ParityError: some output drifts; carries the report.
    """
    tokens_NL, _ = probes.tokens_of(encoder)
    expected = _reference(encoder, tokens_NL)
    tolerance = TOLERANCES[precision]
    cases: list[Case] = []
    with stage("compare hidden states with torch") as outcome:
        for runtime in by:
            encode = _load(path, encoder, runtime)
            together = encode(tokens_NL)
            for size in sorted({1, 2, 3, len(tokens_NL)}):
                found = together if size == len(tokens_NL) else encode(tokens_NL[:size])
                name = f"{size} texts by {IN_WORDS[runtime]}"
                for output, rows, right, whole in zip(
                    HIDDEN_OUTPUTS, found, expected, together, strict=True
                ):
                    cases.append(
                        _compare(output, name, rows, right[:size], whole[:size], tolerance)
                    )
        report = {"cases": [asdict(case) for case in cases]}
        failed = [case for case in cases if not case.passed]
        if failed:
            worst = min(failed, key=lambda case: case.min_cosine)
            raise ParityError(
                f"hidden states of {encoder.facts.name} in {precision} drift from torch in "
                f"{len(failed)} of {len(cases)} cases; worst is {worst.output} at {worst.name}: "
                f"cosine {worst.min_cosine:.7f} (limit {tolerance.min_cosine}), difference "
                f"{worst.max_difference:.2e} (limit {tolerance.max_difference:.0e}), with the "
                f"batch {worst.batch_difference:.2e} (limit "
                f"{tolerance.max_batch_difference:.0e}). Nothing was published.",
                report=report,
            )
        outcome.append(f"cosine at least {min(case.min_cosine for case in cases):.7f}")
        outcome.append(f"difference at most {max(case.max_difference for case in cases):.1e}")
    return report


@torch.inference_mode()
def _reference(
    encoder: DualEncoder, tokens_NL: NDArray[np.int32]
) -> tuple[NDArray[np.float32], ...]:
    found = encoder.encode_text_hidden(torch.from_numpy(tokens_NL).long())
    return tuple(each.numpy() for each in found)


def _load(path: Path, encoder: DualEncoder, runtime: FileRuntime) -> Encode:
    """Load the file as a server does."""
    model = runtimes.ModelFile(
        name="hidden states of texts",
        folder=path.parent,
        kind="CPU",
        device_id=0,
        parameters={"runtime": runtime, "intra_op_threads": str(torch.get_num_threads())},
        dims=[encoder.facts.context_length],
        dtype=np.int32,
        log=lambda _: None,
        warn=lambda _: None,
    )
    return runtimes.load(model)


def _compare(
    output: str,
    name: str,
    found: NDArray[np.float32],
    expected: NDArray[np.float32],
    together: NDArray[np.float32],
    tolerance: Tolerance,
) -> Case:
    if found.shape != expected.shape or found.dtype != np.float32:
        raise ParityError(
            f"{output} is {found.dtype} {found.shape} for {name}; float32 {expected.shape} is "
            "promised.",
            report={},
        )
    # In float64, since 1 - cosine is near float32's resolution.
    a, b, c = (each.astype(np.float64) for each in (found, expected, together))
    # An empty or NaN comparison must never pass.
    if not (a.size and np.isfinite(a).all() and np.isfinite(c).all()):
        min_cosine, max_difference, batch_difference = -1.0, np.inf, np.inf
    else:
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        min_cosine = float(((a * b).sum(axis=-1) / np.maximum(lengths, 1e-300)).min())
        scale = np.maximum(np.abs(b).max(axis=-1, keepdims=True), 1.0)
        max_difference = float((np.abs(a - b) / scale).max())
        batch_difference = float((np.abs(a - c) / scale).max())
    return Case(
        output=output,
        name=name,
        min_cosine=min_cosine,
        max_difference=float(max_difference),
        batch_difference=float(batch_difference),
        passed=(
            min_cosine >= tolerance.min_cosine
            and max_difference <= tolerance.max_difference
            and batch_difference <= tolerance.max_batch_difference
        ),
    )
