"""What a run is held to, where it measured it: ViT-B/32 on a processor, through the whole stack.

The stack is the client, Triton and the engine that Triton is given by default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.findings import Bar, CallKind, Level, Peaks, Row, at_least, at_most
from benchmarks.suites.cases import NUM_CLASSES

MODEL = "ViT-B/32"
BASELINE = "open_clip"
FP32, INT8, INFINITY = "triton openvino", "triton int8", "infinity"
WHAT = {FP32: "FP32", INT8: "INT8"}
CLIENTS = 8

SPEEDS: Sequence[tuple[str, str, str, float]] = (
    ("image", "batch 1", FP32, 1.4),
    ("image", "batch 8", FP32, 1.05),
    ("image", "batch 32", FP32, 1.05),
    ("image", "batch 1", INT8, 3.0),
    ("image", "batch 8", INT8, 3.0),
    ("image", "batch 32", INT8, 3.0),
    ("image", "batch 64", INT8, 3.0),
    ("jpeg", "1 of 640x480", FP32, 1.05),
    ("jpeg", "64 of 640x480", FP32, 1.05),
    ("jpeg", "1 of 640x480", INT8, 2.5),
    ("jpeg", "64 of 640x480", INT8, 2.5),
    ("classifier", f"{NUM_CLASSES} classes x 80, cold", FP32, 10.0),
    ("classifier", f"{NUM_CLASSES} classes x 80, cold", INT8, 25.0),
    ("text", "1 of 8 tokens", FP32, 4.0),
)
"""Suite, case, contender, and how many times as fast as open_clip it shall be at least."""
RATES: Sequence[tuple[str, CallKind, int, str, float]] = (
    ("single JPEGs", "jpegs", 1, FP32, 1.6),
    ("single JPEGs", "jpegs", 1, INT8, 4.0),
    ("32 short texts", "texts", 32, FP32, 1.2),
)
"""What, call, items, contender, and how many times infinity's rate it shall answer at least."""
GATEWAYS = {FP32: "gateway openvino", INT8: "gateway int8"}
"""HTTP in front of each."""
GATEWAY_CLIENTS = 16
GATEWAY_SHARE, GATEWAY_ADDED_MS = 0.9, 3.0
"""Of the client's rate at `GATEWAY_CLIENTS`; what one JPEG may take longer."""
GATEWAY_RATES = {FP32: 1.5, INT8: 4.0}
"""How many times infinity's rate it shall answer at least."""
SHARE_OF_LIMIT = 0.90


def find_bars(
    model: str, baseline: str, peaks: Peaks, rows: Iterable[Row], levels: Iterable[Level]
) -> list[Bar]:
    """Hold a run to the bars whose figures it has.

    Args:
        model: Architecture that was measured; others than `MODEL` have no bars.
        baseline: Contender that `Row.speed` is relative to.
        peaks: Of the machine.
        rows: Of the run.
        levels: Of the run.
    """
    if model != MODEL:
        return []
    found = {(row.suite, row.case, row.contender): row for row in rows}
    bars = []
    for suite, case, contender, limit in SPEEDS:
        row = found.get((suite, case, contender))
        if baseline == BASELINE and row is not None and row.speed is not None:
            what = f"{suite}, {case}, {WHAT[contender]}: times {BASELINE}"
            bars.append(at_least(what, row.speed.median, limit))
    answered = {
        (level.contender, level.call, level.items, level.num_clients): level.answered_per_s
        for level in levels
    }
    for name, call, items, contender, limit in RATES:
        ours, theirs = (
            answered.get((each, call, items, CLIENTS)) for each in (contender, INFINITY)
        )
        if ours is not None and theirs:
            what = f"{name}, {CLIENTS} clients, {WHAT[contender]}: times {INFINITY}"
            bars.append(at_least(what, ours / theirs, limit))
    bars += _find_gateway_bars(found, answered)
    batch = found.get(("image", "batch 32", FP32))
    if batch is not None and batch.flop_per_item is not None:
        # Rows are held to the highest rate at any shape, of their own rounds; this one to the rate
        # of its own products as it was before all rounds, which no slower hour makes smaller.
        gflop_per_s = batch.flop_per_item * batch.per_s.median / 1e9
        share = gflop_per_s / peaks.gemm_fp32_model_gflop_per_s.median
        what = "image, batch 32, FP32: share of the FP32 GEMM rate at its own shapes"
        bars.append(at_least(what, share, SHARE_OF_LIMIT))
    return bars


def _find_gateway_bars(
    rows: Mapping[tuple[str, str, str], Row],
    answered_per_s: Mapping[tuple[str, CallKind, int, int | None], float],
) -> list[Bar]:
    """Hold HTTP to the client behind it, and to infinity."""
    bars = []
    for contender, gateway in GATEWAYS.items():
        alone, by_http = (rows.get(("jpeg", "1 of 640x480", name)) for name in (contender, gateway))
        if alone is not None and by_http is not None:
            added_ms = by_http.time_ms.median - alone.time_ms.median
            what = f"one JPEG by HTTP, {WHAT[contender]}: ms added to the client"
            bars.append(at_most(what, added_ms, GATEWAY_ADDED_MS))
        mine, clients, theirs = (
            answered_per_s.get((name, "jpegs", 1, GATEWAY_CLIENTS))
            for name in (gateway, contender, INFINITY)
        )
        what = f"single JPEGs by HTTP, {GATEWAY_CLIENTS} clients, {WHAT[contender]}"
        if mine is not None and clients:
            bars.append(at_least(f"{what}: of the client", mine / clients, GATEWAY_SHARE))
        if mine is not None and theirs:
            limit = GATEWAY_RATES[contender]
            bars.append(at_least(f"{what}: times {INFINITY}", mine / theirs, limit))
    return bars
