"""Stage 6: SigLIP 2 of open_clip, exported as any model of another library is: parity and rates.

Its towers in ONNX Runtime and TensorRT, by the gate of every export, and timed by turns beside
open_clip's own model under autocast. Weights are random.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.agreement import BUILD_S, ENGINES, TOWERS, check, on_arrays
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.encoders import Contender, make, measure_case
from benchmarks.gpu.runtimes import Encode, OnnxRuntime, build_engine_of
from benchmarks.gpu.surroundings import ONNX_RUNTIME, OPEN_CLIP
from benchmarks.small_tokenizer import small_tokenizer
from clip_rt.specs import Tower
from export import probes
from export.config import ExportConfig
from export.graphs import make_graphs
from export.pipeline import fingerprint_of, load_weights, make_onnx
from export.store import Store
from training.dual_encoder import DualEncoder
from training.encoders.find import RANDOM_WEIGHTS
from training.encoders.libraries import import_open_clip

MODEL = "ViT-B-16-SigLIP2"


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield what was found so far, after each runtime and case."""
    result: dict[str, Any] = {"rows": [], "cases": [], "left_out": [], "failed": {}}
    if not bench.has(OPEN_CLIP):
        yield result
        return
    encoder = _load(bench)
    store = Store(bench.folder / "onnx")
    fingerprint = fingerprint_of(encoder)
    files = make_onnx(encoder, store, precision="fp16", weights_fingerprint=fingerprint)
    paths = {"image": files.image, "text": files.text}
    towers = {tower: _contenders(bench, encoder, tower, paths[tower]) for tower in TOWERS}
    for image, text in zip(*towers.values(), strict=True):
        if image.name == OPEN_CLIP:
            continue
        what = {"model": MODEL, "runtime": image.name, "precision": "fp16"}

        def load(pair: tuple[Contender, ...] = (image, text)) -> Any:
            return tuple(on_arrays(each.make(), bench.device) for each in pair)

        if not bench.has_time():
            result["left_out"].append(what)
            continue
        result["rows"].append(what | check(bench, encoder, load, ()))
        bench.free()
        yield result
    for tower, contenders in towers.items():
        batch, expected_NE = _reference(bench, encoder, tower)
        encoders: dict[Contender, Encode] = {}
        for size in bench.scale.batches:
            case = {"model": MODEL, "tower": tower, "batch": size}
            if not bench.has_time():
                result["left_out"].append(case)
                continue
            encoders = encoders or make(contenders, case, result)
            rows_N = torch.arange(size, device=bench.device) % len(batch)
            rows = measure_case(bench, case, encoders, batch[rows_N], expected_NE[rows_N], result)
            result["cases"].append(case | {"rows": rows})
            yield result
        encoders.clear()
        bench.free()
    yield result


def _load(bench: Bench) -> DualEncoder:
    tokenizer = bench.folder / "tokenizer.json"
    tokenizer.write_text(small_tokenizer(), "utf-8")
    name = str(_write_small(bench.folder / "siglip")) if bench.is_rehearsal else MODEL
    return load_weights(
        ExportConfig(model=f"open_clip:{name}", weights=RANDOM_WEIGHTS, tokenizer=tokenizer)
    )


def _write_small(folder: Path) -> Path:
    """Write the configuration with towers of two layers, for a rehearsal."""
    config = import_open_clip().get_model_config(MODEL)
    config["embed_dim"] = 64
    config["vision_cfg"] = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2}
    config["vision_cfg"] |= {"head_width": 32}
    config["text_cfg"] |= {"width": 64, "heads": 2, "layers": 2, "vocab_size": 1000}
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    folder.mkdir(exist_ok=True)
    document = {"model_cfg": config, "preprocess_cfg": preprocessing | {"size": 32}}
    (folder / "open_clip_config.json").write_text(json.dumps(document), "utf-8")
    return folder


def _contenders(bench: Bench, encoder: DualEncoder, tower: Tower, file: Path) -> list[Contender]:
    """Return open_clip, and our file in each runtime there is, nothing made yet."""

    def in_open_clip() -> Encode:
        graph = _graph(encoder, tower).to(bench.device)

        def encode(batch: Tensor) -> Tensor:
            with torch.autocast(bench.device.type, dtype=torch.float16):
                return graph(batch)

        return encode

    def in_onnx_runtime() -> Encode:
        return OnnxRuntime(file, bench.device)

    def engine(name: str) -> Encode:
        if not bench.has_time(BUILD_S):
            raise TimeoutError(f"less than {BUILD_S:.0f} s were left to build it in")
        runtime = ENGINES[name]
        return build_engine_of(file, encoder.facts, tower, runtime, bench.folder).encode

    found = [Contender(OPEN_CLIP, in_open_clip)]
    if bench.has(ONNX_RUNTIME) or bench.is_rehearsal:
        found.append(Contender("ONNX Runtime", in_onnx_runtime))
    engines: list[tuple[str, Callable[[], Encode]]] = [
        (name, partial(engine, name)) for name in ENGINES if bench.has(name)
    ]
    return found + [Contender(name, each, is_captured=True) for name, each in engines]


def _graph(encoder: DualEncoder, tower: Tower) -> torch.nn.Module:
    graphs = make_graphs(encoder)
    return copy.deepcopy(graphs[TOWERS.index(tower)])


def _reference(bench: Bench, encoder: DualEncoder, tower: Tower) -> tuple[Tensor, Tensor]:
    """Return the probes on the device, and their embeddings by FP32 torch."""
    pixels = probes.images(encoder.facts.side_px)
    items = pixels if tower == "image" else probes.tokens_of(encoder)[0]
    batch = torch.from_numpy(items).to(bench.device)
    with torch.inference_mode():
        return batch, _graph(encoder, tower).to(bench.device)(batch)
