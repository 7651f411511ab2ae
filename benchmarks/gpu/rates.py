"""Stage 1: what the card is, what it multiplies and moves in a second, and its clocks meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, noting, spread
from benchmarks.gpu.surroundings import read_gpu

ROWS = 128 * 257
"""Of the product of an MLP of ViT-L/14 with 128 images."""
WIDTHS = (1024, 4096)


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield what was found so far, after each part."""
    device = bench.device
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "before": read_gpu(),
        "gemm_side": bench.scale.gemm_side,
        "gemm_tflop_per_s": {},
        "mlp_tflop_per_s": {},
    }
    if bench.is_cuda:
        facts = torch.cuda.get_device_properties(device)
        result |= {
            "name": facts.name,
            "compute_capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "memory_gib": round(facts.total_memory / 2**30, 1),
        }
    yield result
    side = bench.scale.gemm_side
    mlp = (side, side, 2 * side) if bench.is_rehearsal else (ROWS, *WIDTHS)
    for shape, rates in (
        ((side, side, side), result["gemm_tflop_per_s"]),
        (mlp, result["mlp_tflop_per_s"]),
    ):
        for name, prepare in PRODUCTS.items():
            with noting(result, f"{name} product of {' x '.join(map(str, shape))}"), _tf32(name):
                call = prepare(device, *shape)
                turns = bench.turns({name: bench.device_way(call)}, budget_s=1.0)[name]
                m, k, n = shape
                rates[name] = spread(turns, 2e-12 * m * k * n, is_rate=True)
        bench.free()
        yield result
    result["during"] = read_gpu()
    result |= _bandwidths(bench)
    yield result


def _plain(dtype: torch.dtype, device: torch.device, m: int, k: int, n: int) -> Callable[[], Any]:
    # Random, because a card draws less power for zeros and then runs faster.
    a = torch.randn(m, k, device=device).to(dtype)
    b = torch.randn(k, n, device=device).to(dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return partial(torch.mm, a, b, out=out)


def _fp8(device: torch.device, m: int, k: int, n: int) -> Callable[[], Any]:
    fp8 = torch.float8_e4m3fn
    a = torch.randn(m, k, device=device).to(fp8)
    b = torch.randn(n, k, device=device).to(fp8).t()  # Its kernels want the right side by columns.
    one = torch.ones((), device=device)
    return partial(torch._scaled_mm, a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


PRODUCTS: dict[str, Callable[[torch.device, int, int, int], Callable[[], Any]]] = {
    "fp16": partial(_plain, torch.float16),
    "bf16": partial(_plain, torch.bfloat16),
    "tf32": partial(_plain, torch.float32),
    "fp32": partial(_plain, torch.float32),
    "fp8": _fp8,
}


@contextmanager
def _tf32(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _bandwidths(bench: Bench) -> dict[str, Any]:
    """Time copies within the device, and to and from it; bytes read and written both count."""
    num_bytes = bench.scale.copy_mib * 2**20
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    calls: dict[str, tuple[Callable[[], Tensor], int]] = {
        "copy_gb_per_s": (partial(target.copy_, source), 2 * num_bytes)
    }
    if bench.is_cuda:
        host = torch.empty(num_bytes // 8, dtype=torch.uint8, pin_memory=True)
        part = target[: num_bytes // 8]
        calls["to_device_gb_per_s"] = (partial(part.copy_, host, non_blocking=True), len(host))
        calls["from_device_gb_per_s"] = (partial(host.copy_, part, non_blocking=True), len(host))
    turns = bench.turns(
        {name: bench.device_way(call) for name, (call, _) in calls.items()}, budget_s=2.0
    )
    return {
        name: spread(turns[name], 1e-9 * moved, is_rate=True) for name, (_, moved) in calls.items()
    }
