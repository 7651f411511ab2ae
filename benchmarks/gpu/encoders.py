"""Stage 3: images and texts a second, and the latency of one call, ours beside the peers'.

All take turns on one device with one set of weights; whose answers are wrong is not timed. Device
time is that of CUDA events around calls on inputs that lie there already; the wall clock is around
one call from pinned memory of the host to embeddings there.

A share of the GEMM rate is operations over time over the rate measured for large square matrices.
Operations are those of `clip_rt.planning.work`, which a contender does: where the last block
computes only the position that is read, as ours does, the others of that block do not count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import peers
from benchmarks.gpu.agreement import BUILD_S, ENGINES, TOWERS, onnx_files
from benchmarks.gpu.bench import Bench, noting, spread
from benchmarks.gpu.runtimes import (
    CudaGraph,
    Encode,
    OnnxRuntime,
    bake,
    build_engine_of,
    compile_blocks,
    with_fused_attention,
)
from benchmarks.gpu.surroundings import ONNX_RUNTIME, OPEN_CLIP, TRANSFORMERS, watch_power
from benchmarks.timing import ratio, time_each
from clip_rt.planning.work import flop_per_image, flop_per_text
from clip_rt.specs import ModelSpec, Tower
from export import probes
from export.graphs import Graph, ImageGraph, TextGraph

MIN_COSINE = 0.999
"""Of every embedding with that of FP32 torch."""


@dataclass(frozen=True)
class Contender:
    """Something that encodes, not made yet."""

    name: str
    make: Callable[[], Encode]
    """Called once for all batches."""
    is_ours: bool = True
    is_captured: bool = False
    """Whether a CUDA graph is captured of it for each batch."""


PEERS: dict[str, Callable[..., Encode]] = {
    OPEN_CLIP: peers.open_clip_encoder,
    TRANSFORMERS: peers.transformers_encoder,
}


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield what was found so far, after each case."""
    result: dict[str, Any] = {"cases": [], "left_out": [], "failed": {}}
    for tower, spec in product(TOWERS, bench.scale.models):
        contenders = _contenders(bench, spec, tower)
        encoders: dict[Contender, Encode] = {}
        reference: tuple[Tensor, Tensor] | None = None
        for size in bench.scale.batches:
            case = {
                "model": spec.name,
                "tower": tower,
                "batch": size,
                "flop_ours": flop_of(spec, tower, is_pruned=True),
                "flop_whole": flop_of(spec, tower, is_pruned=False),
            }
            if not bench.has_time():
                result["left_out"].append(case)
                continue
            if reference is None:
                reference = _reference(bench, spec, tower)
                encoders = make(contenders, case, result)
            rows_N = torch.arange(size, device=bench.device) % len(reference[0])
            batch, expected_NE = (each[rows_N] for each in reference)
            rows = measure_case(bench, case, encoders, batch, expected_NE, result)
            result["cases"].append(case | {"rows": rows})
            yield result
        encoders.clear()
        bench.free()
    yield result


def flop_of(spec: ModelSpec, tower: Tower, *, is_pruned: bool) -> int:
    """Return the operations of one image, or of one text of the whole context."""
    if tower == "image":
        return flop_per_image(spec, is_pruned=is_pruned)
    return flop_per_text(spec, spec.text.context_length, is_pruned=is_pruned)


def _contenders(bench: Bench, spec: ModelSpec, tower: Tower) -> list[Contender]:
    def graph() -> Graph:
        clip = bench.clip(spec)
        made: Graph = ImageGraph(clip) if tower == "image" else TextGraph(clip)
        return bake(made, torch.float16).to(bench.device)

    def in_onnx_runtime(*, is_captured: bool) -> Encode:
        path = getattr(onnx_files(bench, bench.clip(spec)), tower)
        return OnnxRuntime(path, bench.device, is_captured=is_captured)

    def engine(name: str) -> Encode:
        if not bench.has_time(BUILD_S):
            raise TimeoutError(f"less than {BUILD_S:.0f} s were left to build it in")
        path = getattr(onnx_files(bench, bench.clip(spec)), tower)
        return build_engine_of(path, spec.facts, tower, ENGINES[name], bench.folder).encode

    def peer(make: Callable[..., Encode]) -> Encode:
        return make(bench.clip(spec), bench.device, tower)

    def compiled() -> Encode:
        return compile_blocks(graph(), bench.scale.compile_backend)

    def fused() -> Encode:
        return compile_blocks(with_fused_attention(graph()), bench.scale.compile_backend)

    has_onnx_runtime = bench.has(ONNX_RUNTIME)
    found = [
        (True, Contender("torch eager", graph)),
        (bench.is_cuda, Contender("torch CUDA graph", graph, is_captured=True)),
        (True, Contender("torch compiled", compiled, is_captured=bench.is_cuda)),
        (True, Contender("torch compiled, SDPA", fused, is_captured=bench.is_cuda)),
        (
            has_onnx_runtime or bench.is_rehearsal,
            Contender("ONNX Runtime", partial(in_onnx_runtime, is_captured=False)),
        ),
        (
            has_onnx_runtime,
            Contender("ONNX Runtime CUDA graph", partial(in_onnx_runtime, is_captured=True)),
        ),
        *(
            (bench.has(name), Contender(name, partial(engine, name), is_captured=True))
            for name in ENGINES
        ),
        *(
            (bench.has(name), Contender(name, partial(peer, make), is_ours=False))
            for name, make in PEERS.items()
        ),
    ]
    return [each for is_there, each in found if is_there]


def make(
    contenders: list[Contender], case: dict[str, Any], result: dict[str, Any]
) -> dict[Contender, Encode]:
    """Make all contenders of a case but those that fail, whose errors go to the result."""
    encoders = {}
    for each in contenders:
        with noting(result, f"{each.name}, {case['model']} {case['tower']}"):
            encoders[each] = each.make()
    return encoders


def _reference(bench: Bench, spec: ModelSpec, tower: Tower) -> tuple[Tensor, Tensor]:
    """Return the probes on the device, and their embeddings by FP32 torch."""
    clip = bench.clip(spec)
    graph: Graph = ImageGraph(clip) if tower == "image" else TextGraph(clip)
    length = spec.text.context_length
    items = probes.images(spec.side_px) if tower == "image" else probes.tokens(length)
    batch = torch.from_numpy(items).to(bench.device)
    with torch.inference_mode():
        expected_NE = copy.deepcopy(graph).to(bench.device)(batch)
    return batch, expected_NE


@torch.inference_mode()
def measure_case(
    bench: Bench,
    case: dict[str, Any],
    encoders: dict[Contender, Encode],
    batch: Tensor,
    expected_NE: Tensor,
    result: dict[str, Any],
) -> dict[str, Any]:
    """Check and time all contenders on one batch; return what was found by name."""
    size = len(batch)
    calls: dict[str, Callable[[], Tensor]] = {}
    rows: dict[str, dict[str, Any]] = {}
    ways, wall_ways = {}, {}
    for each, encode in encoders.items():
        with noting(result, f"{each.name}, {case['model']} {case['tower']}, batch {size}"):
            given = batch if each.is_ours else peers.form_input(batch)
            if each.is_captured:
                encode = CudaGraph(encode, given)
            cosine = _min_cosine(encode(given), expected_NE)
            if not cosine >= MIN_COSINE:  # Written so that NaN is refused too.
                raise ArithmeticError(f"cosine {cosine:.4f} with FP32 torch: wrong, not timed")
            rows[each.name] = {"is_ours": each.is_ours, "min_cosine": round(cosine, 7)}
            calls[each.name] = partial(encode, given)
            ways[each.name] = bench.device_way(calls[each.name])
            wall_ways[each.name] = time_each(_with_transfers(encode, given, bench.device))
    if not ways:
        return {}
    turns, wall_turns = bench.turns(ways), bench.turns(wall_ways)
    peak = bench.gemm_flop_per_s("fp16")
    for name, row in rows.items():
        row["device_ms"] = spread(turns[name], 1e3)
        row["wall_ms"] = spread(wall_turns[name], 1e3)
        row["items_per_s"] = spread(turns[name], size, is_rate=True)
        if peak is not None and "flop_ours" in case:
            flop = size * case["flop_ours" if row["is_ours"] else "flop_whole"]
            row["gemm_share"] = spread(turns[name], flop / peak, is_rate=True)
        if OPEN_CLIP in turns:
            theirs_s = turns[OPEN_CLIP].samples_s
            row["speed_to_open_clip"] = round(ratio(theirs_s, turns[name].samples_s), 3)
        if bench.is_cuda and size == bench.scale.batches[0]:
            row |= _power(bench, calls[name], turns[name].interval_s.median, size)
    return rows


def _min_cosine(found_NE: Tensor, expected_NE: Tensor) -> float:
    return float(torch.cosine_similarity(found_NE.double(), expected_NE.double()).min())


def _with_transfers(encode: Encode, given: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """Return a call from the host's memory to the host's memory."""
    host = given.cpu().pin_memory() if device.type == "cuda" else given.clone()
    return lambda: encode(host.to(device, non_blocking=True)).cpu()


def _power(bench: Bench, call: Callable[[], Tensor], call_s: float, size: int) -> dict[str, Any]:
    """Read the power while calls follow each other; nothing where the driver does not tell."""
    num_calls = max(1, round(bench.scale.power_s / call_s))
    with watch_power() as watts:
        took_s = bench.seconds(call, num_calls)
    # The first readings are of what was before, the last may be of what came after.
    steady = watts[len(watts) // 2 : -1]
    if not steady:
        return {}
    mean_w = sum(steady) / len(steady)
    return {
        "power_w": round(mean_w, 1),
        "items_per_joule": round(num_calls * size / took_s / mean_w, 3),
    }
