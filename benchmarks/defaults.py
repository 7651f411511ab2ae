"""Is what is chosen by default the fastest that was measured, with and without instruction sets?

    python -m benchmarks.defaults                     # this processor, and held to AVX2: 3 minutes
    python -m benchmarks.defaults --cap AVX512_CORE   # held to AVX-512 without VNNI and BF16

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
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import onnxruntime, openvino
from benchmarks.record import save
from benchmarks.timing import median_interval
from clip_rt import processor
from clip_rt.embedded import runtime_choice
from clip_rt.specs import ModelSpec, find_spec
from export import int8, probes
from export.graphs import ImageGraph, TextGraph
from export.onnx_writer import write_onnx
from export.road import random_clip
from training import precision
from training.accumulate import cached_backward
from training.data.batches import Batch
from training.loss import contrastive_loss
from training.model import CLIP
from training.optimizer import adamw

NO_CAP = "none"
SIZES = {"image": (1, 8), "text": (1, 32)}
TEXT_LENGTH_TOKENS = 16
TRAINED = "RN26@64px"
"""The bundled model's architecture, whose step is timed."""
console = Console()


def write_towers(spec: ModelSpec, folder: Path) -> None:
    """Write both towers of random weights, as model.onnx and model.xml in a folder each.

    Those that are there are left as they are.
    """
    if all((folder / tower / "model.xml").is_file() for tower in SIZES):
        return
    clip = random_clip(spec)
    for tower, graph, rows in (
        ("image", ImageGraph(clip), probes.images(spec.side_px)),
        ("text", TextGraph(clip), probes.tokens(spec.text.context_length)),
    ):
        (folder / tower).mkdir(parents=True, exist_ok=True)
        write_onnx(graph, spec, folder / tower / "model.onnx")
        calibration: list[NDArray[Any]] = [row[None] for row in rows]
        int8.write_int8(folder / tower / "model.onnx", calibration, folder / tower / "model.xml")


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
            "onnxruntime": onnxruntime.load(file),
            "openvino": openvino.load(file),
            "openvino int8": openvino.load(file.with_suffix(".xml")),
        }
        auto = ""
        for rows in sizes:
            shape = (rows, spec.side_px, spec.side_px, 3)
            batch: NDArray[Any] = rng.integers(0, 256, shape, np.uint8)
            if tower == "text":
                batch = np.tile(probes.tokens(TEXT_LENGTH_TOKENS)[:1], (rows, 1))
            times_s = runtime_choice.time_by_turns(
                {name: partial(encode, batch) for name, encode in encoders.items()},
                budget_s=budget_s,
            )
            if not auto:  # As the server does it: by both runtimes alone, on one row of zeros.
                row = np.zeros_like(batch[:1])
                ways = {name: partial(encoders[name], row) for name in runtime_choice.RUNTIMES}
                auto = runtime_choice.choose(runtime_choice.time_by_turns(ways)).runtime
            times_ms = {name: round(1e3 * each, 2) for name, each in times_s.items()}
            found[f"{tower}, batch {rows}"] = {"times_ms": times_ms, "auto": auto}
    return found


def make_step(clip: CLIP, batch: Batch, dtype: torch.dtype | None) -> Callable[[], object]:
    """Prepare a training step in a precision; None is FP32."""
    optimizer = adamw(clip, peak_lr=1e-4, weight_decay=0.2)
    autocast = partial(torch.autocast, "cpu", dtype) if dtype else nullcontext

    def objective(image_BE: Any, text_BE: Any, group_B: Any) -> Any:
        return contrastive_loss(image_BE, text_BE, clip.logit_scale.exp(), group_B=group_B)

    def step() -> None:
        cached_backward(clip, [batch], objective, autocast=autocast)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_steps(num_pairs: int, num_rounds: int) -> dict[str, Any]:
    """Time training steps by turns, and say what the precision auto would be."""
    spec = find_spec(TRAINED)
    torch.manual_seed(0)
    image_BCSS = torch.randn(num_pairs, 3, spec.side_px, spec.side_px)
    image_BCSS = image_BCSS.contiguous(memory_format=torch.channels_last)
    tokens_BL = torch.from_numpy(probes.tokens(TEXT_LENGTH_TOKENS)[:1]).long()
    batch = Batch(image_BCSS, tokens_BL.repeat(num_pairs, 1), torch.arange(num_pairs))
    steps = {}
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        clip = CLIP(spec).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        steps[name] = make_step(clip, batch, dtype)
    times_s: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(num_rounds + 1):
        for name, step in steps.items():
            start_s = time.perf_counter()
            step()
            if number:
                times_s[name].append(time.perf_counter() - start_s)
    cpu = torch.device("cpu")
    settled = precision.choose(
        "auto", has_fast_bf16=precision.has_fast_bf16(cpu), device=precision.describe(cpu)
    )
    medians = {name: round(median_interval(each).median, 3) for name, each in times_s.items()}
    return {"times_s": medians, "auto": settled.precision, "reason": settled.reason}


def measure(model: str, folder: Path, budget_s: float, num_pairs: int) -> dict[str, Any]:
    """Measure all of it under the caps that this process was started with."""
    found = processor.read()
    return {
        "processor": found.label,
        "int8_is_fast": found.has_fast_int8,
        "served": time_towers(find_spec(model), folder, budget_s),
        "training": time_steps(num_pairs, 3),
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


def show(results: Mapping[str, Any]) -> None:
    """Print a table for each cap."""
    for cap, found in results.items():
        table = Table(
            f"cap {cap}: {found['processor']}", "ONNX Runtime", "OpenVINO", "INT8", "auto"
        )
        for case, row in found["served"].items():
            table.add_row(
                case, *(f"{each:.1f} ms" for each in row["times_ms"].values()), row["auto"]
            )
        console.print(table)
        steps = found["training"]
        console.print(f"a training step: {steps['times_s']} s, auto is {steps['auto']}")


def main(
    cap: Annotated[list[str], typer.Option(help="ISA of ONEDNN_MAX_CPU_ISA, or none.")] = [  # noqa: B006
        NO_CAP,
        "AVX2",
    ],
    model: Annotated[str, typer.Option(help="Architecture that is served.")] = "ViT-B/32",
    budget_s: Annotated[float, typer.Option(help="For the calls of each case.")] = 4.0,
    num_pairs: Annotated[int, typer.Option(help="Of a training step.")] = 16,
    tolerance: Annotated[float, typer.Option(help="Share that is no difference.")] = 0.1,
    folder: Annotated[Path | None, typer.Option(help="Keeps the towers for later runs.")] = None,
    is_part: Annotated[bool, typer.Option("--part", hidden=True)] = False,
) -> None:
    """Measure, print tables, write a dated JSON, and judge."""
    if is_part:
        assert folder is not None
        typer.echo(json.dumps(measure(model, folder, budget_s, num_pairs)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        with console.status("make the towers"):
            write_towers(find_spec(model), place)
        for each in cap:
            caps = {} if each == NO_CAP else {"ONEDNN_MAX_CPU_ISA": each, "OV_CPU_MAX_ISA": each}
            command = [sys.executable, "-m", "benchmarks.defaults", "--part"]
            command += ["--folder", str(place)]
            command += ["--model", model, "--budget-s", str(budget_s)]
            command += ["--num-pairs", str(num_pairs)]
            with console.status(f"measure, cap {each}"):
                done = subprocess.run(
                    command, env=os.environ | caps, stdout=subprocess.PIPE, text=True, check=True
                )
            results[each] = json.loads(done.stdout.splitlines()[-1])
    show(results)
    faults = judge(results, tolerance)
    document = {"model": model, "trained": TRAINED, "num_pairs": num_pairs, "caps": results}
    path = save(
        "defaults",
        document | {"tolerance": tolerance, "faults": faults},
        packages=("onnxruntime", "openvino", "torch"),
    )
    console.print(f"written to {path}")
    for fault in faults:
        console.print(f"not the fastest: {fault}", style="red", markup=False)
    raise typer.Exit(1 if faults else 0)


if __name__ == "__main__":
    typer.run(main)
