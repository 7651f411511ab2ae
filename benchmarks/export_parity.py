"""How far exported ONNX files are from torch, for the architectures people serve.

    python -m benchmarks.export_parity
    python -m benchmarks.export_parity --model ViT-B/32 --precision fp16

Every file runs in ONNX Runtime through the gate that an export passes, so the figures are its own:
both towers, batches of several sizes, every text length. Weights are random, as they are and with
residual streams scaled up, since trained ones have values far larger than an initialisation has.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.record import save
from clip_rt.errors import ParityError
from clip_rt.specs import find_spec
from export import parity
from export.graphs import ImageGraph, TextGraph
from export.onnx_writer import write_onnx
from export.precision import bake_fp16
from export.road import random_clip
from training.model import CLIP, ResidualAttentionBlock
from training.resnet import Bottleneck

MODELS = ["ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "RN50"]
RESIDUAL_FACTOR = 32.0
"""Times what every block adds to its stream."""
console = Console()


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


def measure(clip: CLIP, precision: parity.Precision) -> dict[str, Any]:
    """Export both towers and pass them through the gate."""
    with tempfile.TemporaryDirectory() as folder:
        start_s = time.perf_counter()
        files = {}
        for tower, graph in (("image", ImageGraph(clip)), ("text", TextGraph(clip))):
            files[tower] = Path(folder) / f"{tower}.onnx"
            made = bake_fp16(graph) if precision == "fp16" else graph
            write_onnx(made, clip.spec, files[tower])
        export_s = time.perf_counter() - start_s
        size_mib = sum(each.stat().st_size for each in Path(folder).iterdir()) / 2**20
        try:
            report = parity.check_files(
                clip, image=files["image"], text=files["text"], precision=precision
            ).to_json()
        except ParityError as error:
            report = dict(error.report)
    found: Any = report["cases"]
    towers = {
        tower: {
            "min_cosine": min(case["min_cosine"] for case in found if case["tower"] == tower),
            "p01_cosine": min(case["p01_cosine"] for case in found if case["tower"] == tower),
            "max_difference": max(
                case["max_difference"] for case in found if case["tower"] == tower
            ),
        }
        for tower in files
    }
    return {
        "passed": report["passed"],
        "top1_agreement": report["top1_agreement"],
        **towers,
        "export_s": round(export_s, 1),
        "size_mib": round(size_mib, 1),
    }


def main(
    model: Annotated[list[str], typer.Option(help="Architectures.")] = MODELS,
    precision: Annotated[list[str], typer.Option(help="fp32, fp16 or both.")] = ["fp32", "fp16"],  # noqa: B006
) -> None:
    """Measure, print a table, and write a dated JSON."""
    columns = ("model", "weights", "precision", "image cosine", "text cosine", "MiB", "")
    table, results = Table(*columns, title="smallest cosine with torch"), []
    for name in model:
        for weights, change in WEIGHTS.items():
            clip = change(random_clip(find_spec(name)))
            for each in precision:
                with console.status(f"{name}, {weights}, {each}"):
                    row = measure(clip, each)  # type: ignore[arg-type]
                results.append({"model": name, "weights": weights, "precision": each, **row})
                table.add_row(
                    name,
                    weights,
                    each,
                    f"{row['image']['min_cosine']:.8f}",
                    f"{row['text']['min_cosine']:.8f}",
                    f"{row['size_mib']:.0f}",
                    "ok" if row["passed"] else "drifts",
                )
    console.print(table)
    document = {"residual_factor": RESIDUAL_FACTOR, "results": results}
    path = save("export_parity", document, packages=("onnx", "onnxruntime", "torch"))
    console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
