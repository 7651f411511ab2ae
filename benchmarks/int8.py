r"""What INT8 gains on this processor, and what it costs: ONNX Runtime's ways and OpenVINO's.

    python -m benchmarks.int8                                    # speed, ViT-B/32 of random weights
    python -m benchmarks.int8 --weights clip.safetensors --weights-model RN26@64px \
        --calibration data/drawings/train/noto.tar --samples training/sample/styles/openmoji.tar

Speed does not depend on the weights. Every runtime gets all threads and runs by turns with the
others on the same batches. What INT8 costs is measured with weights that know something, as the
share of right choices on samples that the calibration has not seen.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import torch
import typer
from numpy.typing import NDArray
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table

from benchmarks.record import save
from clip_rt.requests.batches import MAX_ROWS, plan_texts
from clip_rt.specs import EMBEDDINGS, find_spec
from export import int8, probes
from export.graphs import ImageGraph, TextGraph
from export.onnx_writer import write_onnx
from export.road import random_clip
from export.samples import Samples, calibration_batches, load_samples
from training.model import CLIP
from training.weights.load import load_clip

Array = NDArray[np.generic]
Encoder = Callable[[Array], NDArray[np.float32]]
console = Console()

BASELINE = "ONNX Runtime, FP32"
OURS = "OpenVINO, INT8"
IMAGE_BATCHES = (1, 8, 32)
TEXT_ROWS, TEXT_LENGTH_TOKENS = 32, 16
NUM_CALIBRATION = 64
"""Rows for ONNX Runtime's static way, which keeps every activation of them in memory."""


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Rows for ONNX Runtime's static quantisation."""

    def __init__(self, name: str, batches: Iterable[Array]) -> None:
        self.feeds = ({name: batch} for batch in batches)

    def get_next(self) -> dict[str, Array] | None:
        """Return the inputs of one run."""
        return next(self.feeds, None)


def onnxruntime_encoder(path: Path, num_threads: int) -> Encoder:
    """Load a tower with the runtime's own settings, its threads spinning between the calls."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: session.run([EMBEDDINGS], {name: batch})[0]


def make_encoders(
    fp32: Path, batches: Sequence[Array], folder: Path, num_threads: int
) -> dict[str, Encoder]:
    """Make every form of one tower.

    Args:
        fp32: ONNX file.
        batches: To calibrate on, one row each.
        folder: Where the other forms are written.
        num_threads: Of each runtime.
    """
    prepared, dynamic, static = (folder / f"{name}.onnx" for name in ("prep", "dynamic", "static"))
    quant_pre_process(fp32, prepared, skip_symbolic_shape=True)
    quantization.quantize_dynamic(
        prepared, dynamic, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
    )
    (graph_input,) = onnx.load(fp32, load_external_data=False).graph.input
    quantization.quantize_static(
        prepared,
        static,
        Reader(graph_input.name, batches[:NUM_CALIBRATION]),
        per_channel=True,
        # What int8.write_int8 quantises: products with weights, not those within attention.
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        extra_options={"MatMulConstBOnly": True},
    )
    int8.write_int8(fp32, list(batches), folder / "model.xml")
    return {
        BASELINE: onnxruntime_encoder(fp32, num_threads),
        "ONNX Runtime, INT8 dynamic": onnxruntime_encoder(dynamic, num_threads),
        "ONNX Runtime, INT8 static": onnxruntime_encoder(static, num_threads),
        "OpenVINO, FP32": int8.load_openvino(fp32, num_threads),
        OURS: int8.load_openvino(folder / "model.xml", num_threads),
    }


def make_towers(
    clip: CLIP, calibration: Sequence[Samples], folder: Path, num_threads: int
) -> dict[str, dict[str, Encoder]]:
    """Make every form of both towers."""
    if calibration:
        images, texts = calibration_batches(calibration)
    else:
        images = [row[None] for row in probes.images(clip.spec.side_px)]
        texts = [row[None] for row in probes.tokens(clip.spec.text.context_length)]
    towers: dict[str, dict[str, Encoder]] = {}
    for tower, graph, batches in (
        ("image", ImageGraph(clip), images),
        ("text", TextGraph(clip), texts),
    ):
        (folder / tower).mkdir()
        fp32 = folder / tower / "model.onnx"
        write_onnx(graph, clip.spec, fp32)
        with console.status(f"quantise the {tower} tower"):
            towers[tower] = make_encoders(fp32, batches, folder / tower, num_threads)
    return towers


def time_by_turns(
    encoders: Mapping[str, Encoder], batch: Array, num_rounds: int
) -> dict[str, dict[str, Any]]:
    """Time each form on one batch, in rounds of one call each, after two that do not count."""
    times_s: dict[str, list[float]] = {name: [] for name in encoders}
    for round_ in range(num_rounds + 2):
        for name, encode in encoders.items():
            start_s = time.perf_counter()
            encode(batch)
            if round_ > 1:
                times_s[name].append(time.perf_counter() - start_s)
    return {
        name: {
            "median_ms": round(1e3 * statistics.median(times), 3),
            "speed": round(
                statistics.median(a / b for a, b in zip(times_s[BASELINE], times, strict=True)), 3
            ),
        }
        for name, times in times_s.items()
    }


def measure_speed(model: str, num_threads: int, num_rounds: int) -> dict[str, Any]:
    """Time both towers of a model nobody trained."""
    clip = random_clip(find_spec(model))
    rng = np.random.default_rng(0)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        towers = make_towers(clip, (), Path(folder), num_threads)
        for rows in IMAGE_BATCHES:
            side = clip.spec.side_px
            pixels = rng.integers(0, 256, (rows, side, side, 3), np.uint8)
            results[f"image, batch {rows}"] = time_by_turns(towers["image"], pixels, num_rounds)
        tokens = np.tile(probes.tokens(TEXT_LENGTH_TOKENS)[:1], (TEXT_ROWS, 1))
        results[f"text, batch {TEXT_ROWS} of {TEXT_LENGTH_TOKENS} tokens"] = time_by_turns(
            towers["text"], tokens, num_rounds
        )
    return results


def top1(images: Encoder, texts: Encoder, samples: Samples) -> float:
    """Return the share of the images for which the right text is chosen."""
    plan = plan_texts(samples.token_ids, max_rows=MAX_ROWS)
    image_NE = np.concatenate([images(each) for each in samples.image_batches(MAX_ROWS)])
    text_ME = np.concatenate([texts(each) for each in plan.batches])[plan.row_by_text]
    return float(((image_NE @ text_ME.T).argmax(axis=1) == samples.right_N).mean())


def measure_cost(
    clip: CLIP, calibration: Sequence[Samples], samples: Sequence[Samples], num_threads: int
) -> dict[str, dict[str, float]]:
    """Count right choices of each form on each sample."""
    with tempfile.TemporaryDirectory() as folder:
        towers = make_towers(clip, calibration, Path(folder), num_threads)
        return {
            each.name: {
                name: round(top1(towers["image"][name], towers["text"][name], each), 4)
                for name in towers["image"]
            }
            for each in samples
        }


def show(speed: Mapping[str, Any], cost: Mapping[str, Mapping[str, float]]) -> None:
    """Print both tables."""
    for what, rows in speed.items():
        table = Table(what, "ms", "speed to FP32 in ONNX Runtime")
        for name, row in rows.items():
            table.add_row(name, f"{row['median_ms']:.1f}", f"{row['speed']:.2f}")
        console.print(table)
    for sample, shares in cost.items():
        table = Table(f"top-1 on {sample}", "", "change")
        for name, share in shares.items():
            table.add_row(name, f"{share:.4f}", f"{share - shares[BASELINE]:+.4f}")
        console.print(table)


def main(
    model: Annotated[str, typer.Option(help="Architecture that is timed.")] = "ViT-B/32",
    weights: Annotated[str, typer.Option(help="Weights whose accuracy is measured.")] = "",
    weights_model: Annotated[str, typer.Option(help="Their architecture.")] = "RN26@64px",
    calibration: Annotated[list[Path], typer.Option(help="Samples to calibrate on.")] = [],  # noqa: B006
    samples: Annotated[list[Path], typer.Option(help="Samples to measure on.")] = [],  # noqa: B006
    num_images: Annotated[int, typer.Option(help="Of each of the samples.")] = 2048,
    num_rounds: Annotated[int, typer.Option(help="Timed calls of each.")] = 21,
    num_threads: Annotated[int, typer.Option(help="Of each runtime.")] = 2,
) -> None:
    """Measure, print tables, and write a dated JSON."""
    torch.set_num_threads(num_threads)
    speed = measure_speed(model, num_threads, num_rounds)
    cost = {}
    if weights:
        spec = find_spec(weights_model)
        cost = measure_cost(
            load_clip(spec, weights),
            [load_samples(path, spec, num_images=100) for path in calibration],
            [load_samples(path, spec, num_images=num_images) for path in samples],
            num_threads,
        )
    show(speed, cost)
    results = {"model": model, "num_threads": num_threads, "speed": speed, "top1": cost}
    path = save("int8", results, packages=("nncf", "onnxruntime", "openvino", "torch"))
    console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
