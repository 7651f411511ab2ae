"""Is what is chosen by default the fastest that was measured, with and without instruction sets?

    python -m benchmarks.studies.defaults      # this processor, and held to AVX2: 3 minutes
    python -m benchmarks.studies.defaults --cap AVX512_CORE    # without VNNI and BF16

For each cap a process of its own loads the towers of ViT-B/32 in FP32 by both runtimes and in INT8,
times them by turns, and asks what `runtime: auto`, the export's advice on INT8 and the training's
precision `auto` would be; then it times training steps in FP32 and BF16 by turns. A cap is given to
oneDNN and to OpenVINO; ONNX Runtime has none, and MKL, which computes FP32 in PyTorch, keeps its
own. The exit code is 1 where a default is slower than its alternative by more than `--tolerance`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from tyro.conf import UseAppendAction

from benchmarks.contenders.runtimes import load_onnxruntime, load_openvino
from benchmarks.record import save
from benchmarks.studies.common import PRECISIONS, ROOT, console, make_step, show, write_towers
from benchmarks.timing import median_interval, take_rounds, take_turns, time_each
from clip_rt import processor
from clip_rt.embedded import runtime_choice
from clip_rt.specs import ModelSpec, find_spec
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export import int8, probes
from export.pipeline import random_clip
from training import precision
from training.data.batches import Batch, count_tokens
from training.model import CLIP

MODULE = "benchmarks.studies.defaults"
NO_CAP = "none"
CAPS = (NO_CAP, "AVX2")
SIZES = {"image": (1, 8), "text": (1, 32)}
TEXT_LENGTH_TOKENS = 16
NUM_ROUNDS = 3
"""Of training steps."""
TRAINED = "RN26@64px"
"""The bundled model's architecture, whose step is timed."""


@dataclass(frozen=True, kw_only=True)
class DefaultsConfig:
    """Measure, print tables, write a dated JSON, and judge."""

    cap: UseAppendAction[tuple[str, ...]] = ()
    """ISA of ONEDNN_MAX_CPU_ISA, or none; without it, none and AVX2."""
    model: str = "ViT-B/32"
    """Architecture that is served."""
    budget_s: float = 4.0
    """For the calls of each case."""
    num_pairs: int = 16
    """Of a training step."""
    tolerance: float = 0.1
    """Share that is no difference."""
    folder: Path | None = None
    """Keeps the towers for later runs."""


def write_all(spec: ModelSpec, folder: Path) -> None:
    """Write both towers of random weights, as model.onnx and model.xml in a folder each.

    Those that are there are left as they are.
    """
    if all((folder / tower / "model.xml").is_file() for tower in SIZES):
        return
    rows: dict[str, NDArray[Any]] = {
        "image": probes.images(spec.side_px),
        "text": probes.tokens(spec.text.context_length),
    }
    for tower, file in write_towers(random_clip(spec), folder).items():
        calibration: list[NDArray[Any]] = [row[None] for row in rows[tower]]
        int8.write_int8(file, calibration, file.with_suffix(".xml"))


def time_towers(spec: ModelSpec, folder: Path, budget_s: float) -> dict[str, Any]:
    """Time each tower in each form at each size, and say what auto would take.

    Returns:
        By tower and rows: milliseconds by form, and `auto`, the runtime of the batch of 1.
    """
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for tower, sizes in SIZES.items():
        file = folder / tower / "model.onnx"
        encoders = {
            "onnxruntime": load_onnxruntime(file),
            "openvino": load_openvino(file),
            "openvino int8": load_openvino(file.with_suffix(".xml")),
        }
        auto = ""
        for rows in sizes:
            shape = (rows, spec.side_px, spec.side_px, 3)
            batch: NDArray[Any] = rng.integers(0, 256, shape, np.uint8)
            if tower == "text":
                batch = np.tile(probes.tokens(TEXT_LENGTH_TOKENS)[:1], (rows, 1))
            turns = take_turns(
                {name: time_each(partial(encode, batch)) for name, encode in encoders.items()},
                budget_s=budget_s,
            )
            if not auto:  # As the server does it: by both runtimes alone, on one row of zeros.
                row = np.zeros_like(batch[:1])
                ways = {name: partial(encoders[name], row) for name in runtime_choice.RUNTIMES}
                auto = runtime_choice.choose(runtime_choice.time_by_turns(ways)).runtime
            times_ms = {
                name: round(1e3 * each.interval_s.median, 2) for name, each in turns.items()
            }
            found[f"{tower}, batch {rows}"] = {"times_ms": times_ms, "auto": auto}
    return found


def time_steps(num_pairs: int) -> dict[str, Any]:
    """Time training steps by turns, and say what the precision auto would be."""
    spec = find_spec(TRAINED)
    torch.manual_seed(0)
    image_BCSS = torch.randn(num_pairs, 3, spec.side_px, spec.side_px)
    image_BCSS = image_BCSS.contiguous(memory_format=torch.channels_last)
    tokens_BL = torch.from_numpy(probes.tokens(TEXT_LENGTH_TOKENS)[:1]).long()
    tokens_BL = tokens_BL.repeat(num_pairs, 1)
    batch = Batch(image_BCSS, tokens_BL, torch.arange(num_pairs), count_tokens(tokens_BL))
    ways = {}
    for name, autocast in PRECISIONS.items():
        clip = CLIP(spec).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        ways[name] = time_each(make_step(clip, [batch], autocast))
    times_s = take_rounds(ways, NUM_ROUNDS)
    cpu = torch.device("cpu")
    settled = precision.choose(
        "auto", has_fast_bf16=precision.has_fast_bf16(cpu), device=precision.describe(cpu)
    )
    medians = {name: round(median_interval(each).median, 3) for name, each in times_s.items()}
    return {"times_s": medians, "auto": settled.precision, "reason": settled.reason}


def measure(model: str, folder: str, budget_s: float, num_pairs: int) -> dict[str, Any]:
    """Measure all of it under the caps that this process was started with."""
    found = processor.read()
    return {
        "processor": found.label,
        "int8_is_fast": found.has_fast_int8,
        "served": time_towers(find_spec(model), Path(folder), budget_s),
        "training": time_steps(num_pairs),
    }


def judge(results: Mapping[str, Any], tolerance: float) -> list[str]:
    """Name each default that was slower than its alternative by more than a share.

    Only what the choice was made for counts: one row for the runtime and INT8.
    """
    faults = []
    for cap, found in results.items():
        for case, row in found["served"].items():
            if not case.endswith("batch 1"):
                continue
            times_ms, auto = row["times_ms"], row["auto"]
            best = min(runtime_choice.RUNTIMES, key=lambda name: times_ms[name])
            if times_ms[auto] > (1 + tolerance) * times_ms[best]:
                faults.append(
                    f"{cap}, {case}: {auto} takes {times_ms[auto]} ms, {best} {times_ms[best]}"
                )
            is_faster = times_ms["openvino int8"] * (1 + tolerance) < times_ms[best]
            is_slower = times_ms["openvino int8"] > (1 + tolerance) * times_ms[best]
            if (is_slower and found["int8_is_fast"]) or (is_faster and not found["int8_is_fast"]):
                faults.append(
                    f"{cap}, {case}: INT8 takes {times_ms['openvino int8']} ms, FP32 "
                    f"{times_ms[best]}, and int8_is_fast is {found['int8_is_fast']}"
                )
        times_s, auto = found["training"]["times_s"], found["training"]["auto"]
        if times_s[auto] > (1 + tolerance) * min(times_s.values()):
            faults.append(f"{cap}, training: {auto} is the default, and a step takes {times_s} s")
    return faults


def measure_capped(config: DefaultsConfig, cap: str, folder: Path) -> dict[str, Any]:
    """Measure in a process of its own that is started with a cap."""
    caps = {} if cap == NO_CAP else {"ONEDNN_MAX_CPU_ISA": cap, "OV_CPU_MAX_ISA": cap}
    what = (config.model, str(folder.absolute()), config.budget_s, config.num_pairs)
    code = f"import json; from {MODULE} import measure; print(json.dumps(measure(*{what!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | caps,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(config: DefaultsConfig) -> int:
    """Measure under each cap; return 1 where a default is not the fastest."""
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = config.folder or Path(scratch)
        with console.status("make the towers"):
            write_all(find_spec(config.model), folder)
        for cap in config.cap or CAPS:
            with console.status(f"measure, cap {cap}"):
                results[cap] = found = measure_capped(config, cap, folder)
            show(
                (f"cap {cap}: {found['processor']}", "ONNX Runtime", "OpenVINO", "INT8", "auto"),
                [
                    (case, *(f"{each:.1f} ms" for each in row["times_ms"].values()), row["auto"])
                    for case, row in found["served"].items()
                ],
            )
            steps = found["training"]
            console.print(f"a training step: {steps['times_s']} s, auto is {steps['auto']}")
    faults = judge(results, config.tolerance)
    document = {"model": config.model, "trained": TRAINED, "num_pairs": config.num_pairs}
    document |= {"caps": results, "tolerance": config.tolerance, "faults": faults}
    save("studies.defaults", document, packages=("onnxruntime", "openvino", "torch"))
    for fault in faults:
        console.print(f"not the fastest: {fault}", style="red", markup=False)
    return 1 if faults else 0


if __name__ == "__main__":
    with command():
        sys.exit(main(tyro.cli(DefaultsConfig, prog=program(__spec__.name), description=__doc__)))
