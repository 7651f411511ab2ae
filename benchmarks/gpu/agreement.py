"""Stage 2: are our FP16 and BF16 graphs FP32 torch's on this device, in each runtime there is?

By the gate that every export passes: `export.parity.check` on both towers, batches of 1, 2, 3, all
probes and `parity_batch`, every length of text. Weights are random, and their residual streams
scaled up. The gate knows no BF16, which is held against the tolerance of FP16 all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.bench import Bench, error_in_words
from benchmarks.gpu.runtimes import Encode, OnnxRuntime, bake, build_engine_of
from benchmarks.gpu.surroundings import ONNX_RUNTIME, RTX, TENSORRT
from clip_rt.errors import ParityError
from clip_rt.specs import TEXT_BUCKETS, ModelSpec, Tower
from export import parity
from export.engine import Runtime
from export.graphs import Graph, ImageGraph, TextGraph
from export.onnx_writer import write_onnx
from export.pipeline import Towers, fingerprint_of, make_onnx
from export.store import Store
from training.dual_encoder import DualEncoder
from training.model import CLIP

Load = Callable[[], tuple[parity.Encoder, parity.Encoder]]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TOWERS: tuple[Tower, ...] = ("image", "text")
ENGINES: dict[str, Runtime] = {TENSORRT: "tensorrt", RTX: "rtx"}
BUILD_S = 60.0
"""Time there must be before an engine is built."""


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield what was found so far, after each runtime of each model and precision."""
    result: dict[str, Any] = {"rows": [], "left_out": []}
    for precision in DTYPES:
        for spec in bench.scale.models:
            for runtime, load in _runtimes(bench, spec, precision).items():
                what = {"model": spec.name, "runtime": runtime, "precision": precision}
                if not bench.has_time(BUILD_S if runtime in ENGINES else 0.0):
                    result["left_out"].append(what)
                    continue
                lengths = TEXT_BUCKETS if runtime in ENGINES else bench.scale.text_lengths
                result["rows"].append(what | check(bench, bench.clip(spec), load, lengths))
                bench.free()
                yield result
    yield result


def onnx_files(bench: Bench, clip: CLIP, precision: str = "fp16") -> Towers:
    """Write both towers as an export does, or find what the stage before wrote."""
    if precision == "fp16":
        store = Store(bench.folder / "onnx")
        return make_onnx(clip, store, precision="fp16", weights_fingerprint=fingerprint_of(clip))
    folder = bench.folder / precision
    folder.mkdir(parents=True, exist_ok=True)
    files = Towers(folder / "image.onnx", folder / "text.onnx")
    for path, graph in ((files.image, ImageGraph(clip)), (files.text, TextGraph(clip))):
        write_onnx(bake(graph, DTYPES[precision]), clip.facts, path)
    return files


def _runtimes(bench: Bench, spec: ModelSpec, precision: str) -> dict[str, Load]:
    """Return how both encoders are made in each runtime, nothing made yet."""

    def in_torch() -> tuple[parity.Encoder, parity.Encoder]:
        clip = bench.clip(spec)
        graphs: tuple[Graph, Graph] = (ImageGraph(clip), TextGraph(clip))
        image, text = (bake(graph, DTYPES[precision]).to(bench.device) for graph in graphs)
        return on_arrays(image, bench.device), on_arrays(text, bench.device)

    def in_onnx_runtime() -> tuple[parity.Encoder, parity.Encoder]:
        files = onnx_files(bench, bench.clip(spec), precision)
        image, text = (OnnxRuntime(path, bench.device) for path in (files.image, files.text))
        return on_arrays(image, bench.device), on_arrays(text, bench.device)

    def in_engines(name: str) -> tuple[parity.Encoder, parity.Encoder]:
        files, runtime = onnx_files(bench, bench.clip(spec)), ENGINES[name]
        return (
            build_engine_of(files.image, spec.facts, "image", runtime, bench.folder),
            build_engine_of(files.text, spec.facts, "text", runtime, bench.folder),
        )

    found: dict[str, Load] = {"torch": in_torch}
    # On a processor it has no BF16.
    if bench.has(ONNX_RUNTIME) or (bench.is_rehearsal and precision == "fp16"):
        found["ONNX Runtime"] = in_onnx_runtime
    if precision == "fp16":  # Of BF16 there is no export.
        found |= {name: partial(in_engines, name) for name in ENGINES if bench.has(name)}
    return found


def on_arrays(encode: Encode, device: torch.device) -> parity.Encoder:
    """Let an encoder of tensors take and return arrays of the host."""

    @torch.inference_mode()
    def run(batch: NDArray[np.generic]) -> parity.FloatArray:
        # A copy, because encoders may write the next answer over this one.
        return encode(torch.from_numpy(batch).to(device)).float().cpu().numpy().copy()

    return run


def check(bench: Bench, clip: DualEncoder, load: Load, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Run the gate, and return what it measured whether or not it let the graphs pass."""
    try:
        image, text = load()
        report: Any
        try:
            report = parity.check(
                clip,
                encode_images=image,
                encode_texts=text,
                precision="fp16",
                text_lengths=lengths,
                max_batch_size=bench.scale.parity_batch,
            ).to_json()
        except ParityError as error:
            if not error.report:
                raise
            report = error.report
    except Exception as error:
        return {"failed": error_in_words(error)}
    found = {
        tower: [case for case in report["cases"] if case["tower"] == tower] for tower in TOWERS
    }
    return {
        "passed": report["passed"],
        "top1_agreement": report["top1_agreement"],
        "num_cases": len(report["cases"]),
        **{
            tower: {
                "min_cosine": min(case["min_cosine"] for case in cases),
                "max_difference": max(case["max_difference"] for case in cases),
                "max_batch_difference": max(case["batch_difference"] for case in cases),
            }
            for tower, cases in found.items()
        },
    }
