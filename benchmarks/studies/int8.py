r"""What INT8 gains on this processor, and what it costs: ONNX Runtime's ways and OpenVINO's.

    python -m benchmarks.studies.int8                     # speed, ViT-B/32 of random weights
    python -m benchmarks.studies.int8 --weights clip.safetensors \
        --weights-model RN26@64px --calibration data/drawings/train/noto.tar \
        --samples training/sample/styles/openmoji.tar

Speed does not depend on the weights. Every runtime gets all threads and runs by turns with the
others on the same batches. What INT8 costs is measured with weights that know something, as the
share of right choices on samples that the calibration has not seen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import tyro
from numpy.typing import NDArray
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from tyro.conf import UseAppendAction

from benchmarks.contenders.runtimes import load_onnxruntime
from benchmarks.record import save
from benchmarks.studies.common import console, show, write_towers
from benchmarks.timing import speeds, take_rounds, time_each
from benchmarks.top1 import top1
from clip_rt.specs import find_spec
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export import int8, probes
from export.pipeline import random_clip
from export.samples import Samples, calibration_batches, load_samples
from training.model import CLIP
from training.weights.load import load_clip

Array = NDArray[np.generic]
Encoder = Callable[[Array], NDArray[np.float32]]
BASELINE = "ONNX Runtime, FP32"
OURS = "OpenVINO, INT8"
IMAGE_BATCHES = (1, 8, 32)
TEXT_ROWS, TEXT_LENGTH_TOKENS = 32, 16
NUM_CALIBRATION = 64
"""Rows for ONNX Runtime's static way, which keeps every activation of them in memory."""


@dataclass(frozen=True, kw_only=True)
class Int8Config:
    """Measure, print tables, and write a dated JSON."""

    model: str = "ViT-B/32"
    """Architecture that is timed."""
    weights: str = ""
    """Weights whose accuracy is measured."""
    weights_model: str = "RN26@64px"
    """Their architecture."""
    calibration: UseAppendAction[tuple[Path, ...]] = ()
    """Samples to calibrate on."""
    samples: UseAppendAction[tuple[Path, ...]] = ()
    """Samples to measure on."""
    num_images: int = 2048
    """Of each of the samples."""
    num_rounds: int = 21
    """Timed calls of each."""
    num_threads: int = 2
    """Of each runtime."""


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Rows for ONNX Runtime's static quantisation."""

    def __init__(self, name: str, batches: Iterable[Array]) -> None:
        self.feeds = ({name: batch} for batch in batches)

    def get_next(self) -> dict[str, Array] | None:
        """Return the inputs of one run."""
        return next(self.feeds, None)


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
    # Its threads spin between the calls, as they do by default.
    load = partial(load_onnxruntime, is_default=True, num_threads=num_threads)
    return {
        BASELINE: load(fp32),
        "ONNX Runtime, INT8 dynamic": load(dynamic),
        "ONNX Runtime, INT8 static": load(static),
        "OpenVINO, FP32": int8.load_openvino(fp32, num_threads),
        OURS: int8.load_openvino(folder / "model.xml", num_threads),
    }


def make_towers(
    clip: CLIP, calibration: Sequence[Samples], folder: Path, num_threads: int
) -> dict[str, dict[str, Encoder]]:
    """Make every form of both towers."""
    if calibration:
        drawn = [[*batches] for batches in calibration_batches(calibration)]
    else:
        spec = clip.spec
        rows = probes.images(spec.side_px), probes.tokens(spec.text.context_length)
        drawn = [[row[None] for row in each] for each in rows]
    towers: dict[str, dict[str, Encoder]] = {}
    for (tower, file), batches in zip(write_towers(clip, folder).items(), drawn, strict=True):
        with console.status(f"quantise the {tower} tower"):
            towers[tower] = make_encoders(file, batches, file.parent, num_threads)
    return towers


def time_by_turns(
    encoders: Mapping[str, Encoder], batch: Array, num_rounds: int
) -> dict[str, dict[str, float]]:
    """Time each form on one batch, in rounds of one call each."""
    ways = {name: time_each(partial(encode, batch)) for name, encode in encoders.items()}
    return {
        name: {"median_ms": round(1e3 * time_s.median, 3), "speed": round(speed.median, 3)}
        for name, (time_s, speed) in speeds(take_rounds(ways, num_rounds), BASELINE).items()
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


def main(config: Int8Config) -> None:
    """Time a model nobody trained; count what INT8 costs weights that know something."""
    torch.set_num_threads(config.num_threads)
    speed = measure_speed(config.model, config.num_threads, config.num_rounds)
    for what, rows in speed.items():
        show(
            (what, "ms", "speed to FP32 in ONNX Runtime"),
            [
                (name, f"{row['median_ms']:.1f}", f"{row['speed']:.2f}")
                for name, row in rows.items()
            ],
        )
    cost = {}
    if config.weights:
        spec = find_spec(config.weights_model)
        cost = measure_cost(
            load_clip(spec, config.weights),
            [load_samples(path, spec.facts, num_images=100) for path in config.calibration],
            [
                load_samples(path, spec.facts, num_images=config.num_images)
                for path in config.samples
            ],
            config.num_threads,
        )
    for sample, shares in cost.items():
        show(
            (f"top-1 on {sample}", "", "change"),
            [
                (name, f"{share:.4f}", f"{share - shares[BASELINE]:+.4f}")
                for name, share in shares.items()
            ],
        )
    results = {"model": config.model, "num_threads": config.num_threads}
    results |= {"speed": speed, "top1": cost}
    save("studies.int8", results, packages=("nncf", "onnxruntime", "openvino", "torch"))


if __name__ == "__main__":
    with command():
        main(tyro.cli(Int8Config, prog=program(__spec__.name), description=__doc__))
