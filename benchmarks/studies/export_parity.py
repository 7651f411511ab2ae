"""How far exported ONNX files are from torch, for the architectures people serve.

    python -m benchmarks.studies.export_parity
    python -m benchmarks.studies.export_parity --model ViT-B/32 --precision fp16

Every file runs in ONNX Runtime through the gate that an export passes, so the figures are its own:
both towers, batches of several sizes, every text length. Weights are random, as they are and with
residual streams scaled up, since trained ones have values far larger than an initialisation has.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tyro.conf import UseAppendAction

from benchmarks.record import save
from benchmarks.studies.common import TOWERS, console, show, write_towers
from clip_rt.errors import ParityError
from clip_rt.specs import find_spec
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export import parity
from export.pipeline import random_clip
from training.model import CLIP, ResidualAttentionBlock
from training.resnet import Bottleneck

MODELS = ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "RN50")
Precision = Literal["fp32", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
RESIDUAL_FACTOR = 32.0
"""Times what every block adds to its stream."""


@dataclass(frozen=True, kw_only=True)
class ExportParityConfig:
    """Measure, print a table, and write a dated JSON."""

    model: UseAppendAction[tuple[str, ...]] = ()
    """Architectures; without it, five that people serve."""
    precision: UseAppendAction[tuple[Precision, ...]] = ()
    """fp32 or fp16; without it, both."""


@torch.no_grad()
def scale_residual_streams(clip: CLIP) -> CLIP:
    """Make every block add more to its stream, in place."""
    for module in clip.modules():
        if isinstance(module, ResidualAttentionBlock):
            names = ["attn.out_proj", "mlp.c_proj"]
        else:
            names = ["bn3"] if isinstance(module, Bottleneck) else []
        for parameter in (p for name in names for p in module.get_submodule(name).parameters()):
            parameter.mul_(RESIDUAL_FACTOR)
    return clip


WEIGHTS: dict[str, Callable[[CLIP], CLIP]] = {
    "random": lambda clip: clip,
    "scaled residual": scale_residual_streams,
}


def measure(clip: CLIP, precision: Precision) -> dict[str, Any]:
    """Export both towers and pass them through the gate."""
    with tempfile.TemporaryDirectory() as folder:
        start_s = time.perf_counter()
        files = write_towers(clip, Path(folder), is_fp16=precision == "fp16")
        export_s = time.perf_counter() - start_s
        sizes = [each.stat().st_size for each in Path(folder).rglob("*") if each.is_file()]
        try:
            report = parity.check_files(
                clip, image=files["image"], text=files["text"], precision=precision
            ).to_json()
        except ParityError as error:
            report = dict(error.report)
    all_cases: Any = report["cases"]
    found = {tower: [case for case in all_cases if case["tower"] == tower] for tower in TOWERS}
    return {
        "passed": report["passed"],
        "top1_agreement": report["top1_agreement"],
        **{
            tower: {
                "min_cosine": min(case["min_cosine"] for case in cases),
                "p01_cosine": min(case["p01_cosine"] for case in cases),
                "max_difference": max(case["max_difference"] for case in cases),
            }
            for tower, cases in found.items()
        },
        "export_s": round(export_s, 1),
        "size_mib": round(sum(sizes) / 2**20, 1),
    }


def main(config: ExportParityConfig) -> None:
    """Measure each architecture, with each sort of weights, in each precision."""
    results = []
    models = tuple(config.model) or MODELS
    for model, (weights, change) in product(models, WEIGHTS.items()):
        clip = change(random_clip(find_spec(model)))
        for precision in config.precision or PRECISIONS:
            with console.status(f"{model}, {weights}, {precision}"):
                row = {"model": model, "weights": weights, "precision": precision}
                results.append(row | measure(clip, precision))
    show(
        ("model", "weights", "precision", "image cosine", "text cosine", "MiB", ""),
        [
            (
                *(row["model"], row["weights"], row["precision"]),
                *(f"{row[tower]['min_cosine']:.8f}" for tower in TOWERS),
                f"{row['size_mib']:.0f}",
                "ok" if row["passed"] else "drifts",
            )
            for row in results
        ],
        title="smallest cosine with torch",
    )
    document = {"residual_factor": RESIDUAL_FACTOR, "results": results}
    save("studies.export_parity", document, packages=("onnx", "onnxruntime", "torch"))


if __name__ == "__main__":
    with command():
        main(tyro.cli(ExportParityConfig, prog=program(__spec__.name), description=__doc__))
