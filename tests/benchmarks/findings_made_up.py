"""Runs with made-up figures, for tests of what is done with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.findings import Conditions, Contender, Interval, Peaks, Row, Run


def around(median: float, width: float = 0.01) -> Interval:
    return Interval(median=median, low=median * (1 - width), high=median * (1 + width))


def exactly(value: float) -> Interval:
    return Interval(median=value, low=value, high=value)


def peaks(fp32: float, model: float, int8: float | None = None) -> Peaks:
    """Rates in GFLOP/s: at the best shape, at the model's, and of INT8; it reads 20 GB/s."""
    return Peaks(
        gemm_fp32_gflop_per_s=exactly(fp32),
        gemm_fp32_model_gflop_per_s=exactly(model),
        gemm_int8_gop_per_s=None if int8 is None else exactly(int8),
        read_gb_per_s=exactly(20.0),
        how="by hand",
    )


def row(contender: str = "onnxruntime", case: str = "batch 32", **changes: Any) -> Row:
    made = Row(
        suite="image",
        case=case,
        contender=contender,
        call="pixels",
        items=32,
        unit="images",
        time_ms=around(900.0),
        samples_ms=[891.0, 900.0, 909.0],
        per_s=around(32 / 0.9),
        steadied=around(18.0),
    )
    return replace(made, **changes)


def run(*rows: Row, **changes: Any) -> Run:
    made = Run(
        date="2026-11-26T03:00:00+00:00",
        command="python benchmarks/run.py",
        commit="0123456789ab",
        machine={"cpu": "x", "cores": 2, "cpu_flags": ["avx2"]},
        versions={"numpy": "1.26.4"},
        settings={"target": 0.03, "suites": ["image"]},
        model="ViT-B/32",
        weights="random, seed 0",
        baseline="open_clip",
        took_s=170.0,
        conditions=Conditions(
            load_before=0.1,
            steal_share=0.0,
            cpu_mhz=None,
            probe_ms=around(50.0),
            warnings=[],
        ),
        peaks=Peaks(
            gemm_fp32_gflop_per_s=around(360.0),
            gemm_fp32_model_gflop_per_s=around(340.0),
            gemm_int8_gop_per_s=around(1500.0),
            read_gb_per_s=around(30.0),
            how="2 threads",
        ),
        contenders=[
            Contender(
                name="onnxruntime",
                what="x",
                kind="runtime",
                precision="fp32",
                versions={"onnxruntime": "1.32.0"},
            )
        ],
        rows=list(rows),
    )
    return replace(made, **changes)
