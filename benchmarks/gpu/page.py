"""The page 'On GPUs' of the documentation, made of the JSON of a run, or of none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.document import result_of
from benchmarks.gpu.tables import absent, failures, number, tables

PAGE = Path(__file__).resolve().parents[2] / "docs/gpus.md"
TEMPLATE = Path(__file__).with_name("page.md")
NOTHING = """**Nothing of this project was measured on a GPU yet.** What [Export](export.md) says of
FP16 and TensorRT is proven on a processor only: the graphs by ONNX Runtime, and by the compiler of
TensorRT for RTX that they compile. The command below measures the rest. All of its stages run at
tiny size on a processor in our tests (`python -m benchmarks.gpu --rehearse`).
"""
CORES = 16
"""For which it is said what the processor prepares."""


def render(run: Mapping[str, Any] | None, result: Path | None = None) -> str:
    """Return the page's text.

    Args:
        run: What was found; None where nothing was measured yet.
        result: Its JSON, which the page links to; its picture is shown where it lies beside that.
    """
    found = NOTHING if run is None else "\n".join(_parts(run, result))
    return TEMPLATE.read_text(encoding="utf-8").replace("{found}", found)


def _parts(run: Mapping[str, Any], result: Path | None) -> list[str]:
    device = result_of(run, "device")
    driver = device.get("before", {}).get("driver")
    versions = ", ".join(f"{name} {each}" for name, each in run.get("versions", {}).items())
    source = f": [all figures]({_link(result)})" if result else ""
    card = f"{device.get('name', 'A processor')}, driver {driver}, CUDA {device.get('cuda')}"
    parts = [f"{card}, {versions}. {run['date']}, `{run['command']}`{source}.\n"]
    if result and (picture := result.with_suffix(".png")).is_file():
        parts.append(f"![Throughput, share of the GEMM rate, training]({_link(picture)})\n")
    for table in tables(run):
        parts += [f"## {table.title}\n", table.markdown() + "\n"]
    parts += [f"{line}\n" for line in (_bottleneck(run), _resumed(run)) if line]
    missing = [f"- {line}" for line in (*absent(run), *failures(run))]
    if missing:
        parts += ["## Not measured\n", "\n".join(missing) + "\n"]
    return parts


def _link(path: Path) -> str:
    return os.path.relpath(path, PAGE.parent)


def _bottleneck(run: Mapping[str, Any]) -> str:
    """Say which is slower: preparing images on `CORES` cores, or embedding them."""
    rates = result_of(run, "preprocessing").get("images_per_s", {})
    found = {int(name.split()[1]): each["median"] for name, each in rates.items()
             if name.startswith("processor")}  # fmt: skip
    if not found:
        return ""
    num_threads = max(found)
    per_s = found[num_threads] * CORES / num_threads
    how = "measured" if num_threads == CORES else f"computed from {num_threads}"
    text = f"{CORES} cores prepare {number(per_s)} images/s ({how})."
    for case in result_of(run, "encoders").get("cases", []):
        ours = [row["items_per_s"]["median"] for row in case["rows"].values() if row["is_ours"]]
        if case["tower"] == "image" and case["batch"] == 128 and ours:
            slower = "preparing" if per_s < max(ours) else "embedding"
            text += f" {case['model']} embeds {number(max(ours))}/s: {slower} is the bottleneck."
    return text


def _resumed(run: Mapping[str, Any]) -> str:
    found = result_of(run, "training").get("resumed")
    if found is None:
        return ""
    steps = "every step is in its log once" if found["steps_logged"] else "steps are missing"
    return (
        f"A run of {found['model']} was killed at step {found['killed_at_step']} and resumed: "
        f"{steps}, its loss went from {found['first_loss']} to {found['last_loss']}."
    )
