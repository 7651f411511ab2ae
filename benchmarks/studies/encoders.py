"""Which models of open_clip export exactly: every configuration, both precisions, one table.

    python -m benchmarks.studies.encoders                         # all; stop it, and go on later
    python -m benchmarks.studies.encoders --model EVA02-B-16 --model MobileCLIP2-S0
    python -m benchmarks.studies.encoders --max-parameters 5e8

Weights are random, with norms and biases moved away from where they begin, so that none can be left
out. Each configuration is exported in a process of its own and passes through the gate of every
export, both towers, batches of 1, 3 and more. What is done is written at once and not done again. A
configuration whose text tower or tokenizer lies on the hub gets a small tokenizer, and is left out
where the tower itself must be fetched.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.progress import track
from tyro.conf import UseAppendAction

from benchmarks.record import describe_result, write
from benchmarks.studies.common import ROOT, console, show
from clip_rt.errors import ParityError
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export import onnx_writer, parity
from export.graphs import make_graphs
from export.parity_report import Precision
from export.probes import PROMPTS
from training.encoders.encoder import ExternalEncoder, measure_any_length
from training.encoders.libraries import import_open_clip
from training.encoders.of_open_clip import load_open_clip

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
COMMAND = ("python", "-m", "benchmarks.studies.encoders")
LIMIT_S = 1800.0
"""Longest time of one configuration."""
PACKAGES = ("open_clip_torch", "timm", "torch", "onnx", "onnxruntime", "onnxscript", "transformers")


@dataclass(frozen=True, kw_only=True)
class EncodersConfig:
    """Export configurations of open_clip, and write what came of each."""

    model: UseAppendAction[tuple[str, ...]] = ()
    """Configurations; without it, all."""
    max_parameters: float = 1e9
    """Larger ones are left out: FP32, ONNX and runtime each hold them once."""
    out: Path = ROOT / "benchmarks/results/encoders.json"
    """What is done already is read from here and kept."""
    one: str | None = None
    """Export this one here, and print what came of it as JSON."""


@torch.no_grad()
def disturb(encoder: ExternalEncoder) -> None:
    """Move norms and biases away from ones and zeros."""
    torch.manual_seed(1)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))


def measure(name: str) -> dict[str, Any]:
    """Export one configuration in both precisions, and return what the gate says of each."""
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "tokenizer.json").write_text(_small_tokenizer(), "utf-8")
        encoder = load_open_clip(name, tokenizer=place / "tokenizer.json")
        disturb(encoder)
        if not measure_any_length(encoder, PROMPTS):
            encoder.facts = replace(encoder.facts, is_any_length_exact=False)
        facts = encoder.facts
        found: dict[str, Any] = {
            "side_px": facts.side_px,
            "context_length": facts.context_length,
            "any_length": facts.is_any_length_exact,
            "resizing": facts.resizing.mode,
            "interpolation": facts.resizing.interpolation,
            "tokenizer": facts.tokenization.kind,
            "score": facts.score,
            "parameters": sum(each.numel() for each in encoder.parameters()),
        }
        for precision in PRECISIONS:
            found[precision] = _gate(encoder, place / precision, precision)
    return found | {"seconds": round(time.monotonic() - start_s, 1)}


def _gate(encoder: ExternalEncoder, folder: Path, precision: Precision) -> dict[str, Any]:
    folder.mkdir()
    files: dict[str, Path] = {}
    for graph in make_graphs(encoder):
        files[graph.tower] = folder / f"{graph.tower}.onnx"
        onnx_writer.write_onnx(graph, encoder.facts, files[graph.tower], fp16=precision == "fp16")
    try:
        report: Any = parity.check_files(
            encoder, image=files["image"], text=files["text"], precision=precision
        ).to_json()
    except ParityError as error:
        report = error.report
    finally:
        for file in folder.iterdir():
            file.unlink()
    cosines = {
        tower: min(case["min_cosine"] for case in report["cases"] if case["tower"] == tower)
        for tower in files
    }
    return {"passed": report["passed"], **cosines}


def _small_tokenizer() -> str:
    """Return the tokenizer.json of a few words: a tower is asked for vectors, not for sense."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        PROMPTS, trainers.BpeTrainer(special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    made.enable_padding(pad_id=0, pad_token="<pad>")
    return str(made.to_str())


def _measure_apart(name: str) -> dict[str, Any]:
    """Run `measure` in a process of its own: memory ends with it."""
    arguments = [sys.executable, "-m", "benchmarks.studies.encoders", "--one", name]
    try:
        done = subprocess.run(
            arguments, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {LIMIT_S:g} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    last = [line for line in done.stderr.splitlines() if line.strip()]
    return {"failed": last[-1][:300] if last else f"exit code {done.returncode}"}


def _count_parameters(name: str) -> float:
    """Return how many parameters a configuration has, without making them."""
    open_clip = import_open_clip()
    try:
        with torch.device("meta"):
            model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
        return float(sum(each.numel() for each in model.parameters()))
    # What cannot be made says why when it is measured.
    except Exception:
        return 0.0


def main(config: EncodersConfig) -> None:
    """Do what `config` says."""
    if config.one is not None:
        print(json.dumps(measure(config.one)))  # noqa: T201
        return
    done: dict[str, Any] = {}
    if config.out.is_file():
        done = json.loads(config.out.read_text("utf-8"))["models"]
    names = config.model or tuple(import_open_clip().list_models())
    left = [name for name in names if name not in done]
    for name in track(left, "open_clip's configurations", console=console):
        if (size := _count_parameters(name)) > config.max_parameters:
            done[name] = {"left_out": f"{size / 1e9:.1f} billion parameters"}
        else:
            done[name] = _measure_apart(name)
        write(config.out, describe_result(COMMAND, PACKAGES) | {"models": done})
    show(
        ("model", "side", "tokens", "FP32", "FP16", "s"),
        [_row(name, found) for name, found in done.items()],
    )


def _row(name: str, found: dict[str, Any]) -> tuple[object, ...]:
    if "side_px" not in found:
        return name, "", "", found.get("failed") or found.get("left_out"), "", ""
    worst = [
        f"{min(found[each]['image'], found[each]['text']):.7f}"
        + ("" if found[each]["passed"] else " refused")
        for each in PRECISIONS
    ]
    return name, found["side_px"], found["context_length"], *worst, found["seconds"]


if __name__ == "__main__":
    with command():
        main(
            tyro.cli(
                EncodersConfig, prog=program("benchmarks.studies.encoders"), description=__doc__
            )
        )
