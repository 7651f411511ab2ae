"""Which models of open_clip export exactly: every configuration, both precisions, one table.

    python -m benchmarks.studies.encoders                         # all; stop it, and go on later
    python -m benchmarks.studies.encoders --model EVA02-B-16 --model MobileCLIP2-S0
    python -m benchmarks.studies.encoders --max-parameters 5e8
    python -m benchmarks.studies.encoders --render benchmarks/results    # docs/which-model.md

Weights are random, with norms and biases moved away from where they begin, so that none can be left
out. Each configuration is exported in a process of its own and passes through the gate of every
export, both towers, batches of 1, 3 and more, small ones first. What is done is written at once and
not done again. No network is needed: a configuration whose tokenizer
lies on the hub gets a small one, and one whose text tower is described there finds the description
in a local folder in the hub's layout.

One row of each tower is timed by turns with ViT-B-32's: what is written is how many times as long
it takes, which another machine changes less than milliseconds. Have nothing else run meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.progress import track
from tyro.conf import UseAppendAction

from benchmarks.contenders.runtimes import load_openvino
from benchmarks.record import describe_result, write
from benchmarks.small_tokenizer import SPECIAL, SPECIAL_OF_ROBERTA, small_tokenizer
from benchmarks.studies import encoders_page
from benchmarks.studies.common import ROOT, console, show
from benchmarks.timing import ratio, take_turns, time_each
from clip_rt.errors import ParityError
from clip_rt.specs import EncoderFacts, Tower, find_spec
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export import onnx_writer, parity
from export.graphs import make_graphs
from export.parity_report import Precision
from export.probes import PROMPTS
from training.encoders.encoder import ExternalEncoder, measure_any_length
from training.encoders.libraries import import_open_clip, import_transformers
from training.encoders.of_open_clip import load_open_clip

TOWERS: tuple[Tower, ...] = ("image", "text")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
COMMAND = ("python", "-m", "benchmarks.studies.encoders")
LIMIT_S = 1800.0
"""Longest time of one configuration."""
YARDSTICK = "ViT-B-32"
"""Whose towers the others are timed beside."""
BUDGET_S = 4.0
"""For the turns of a tower and its yardstick."""
NUM_TOKENS = 16
"""Of a text that is timed, where it need not be padded."""
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
    render: Path | None = None
    """Write the page from this result, or the newest in this folder, and measure nothing."""
    one: str | None = None
    """Export this one here, and print what came of it as lines of JSON, the last the fullest."""
    yardstick: Path | None = None
    """With `one`: folder of the towers it is timed beside."""
    only_time: tyro.conf.FlagCreatePairsOff[bool] = False
    """With `one`: leave the gate out."""


@torch.no_grad()
def disturb(encoder: ExternalEncoder) -> None:
    """Move norms and biases away from ones and zeros."""
    torch.manual_seed(1)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))


def measure(name: str, yardstick: Path | None, *, only_time: bool = False) -> None:
    """Export one configuration, and print how long it takes and what the gate says of it."""
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        encoder = _load(name, place)
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
        files: dict[Precision, dict[Tower, Path]] = {
            precision: _name_files(place, precision) for precision in PRECISIONS
        }
        _write(encoder, files["fp32"])
        if yardstick is not None:
            found["times_yardstick"] = {
                tower: _time(tower, facts, files["fp32"], yardstick) for tower in TOWERS
            }
            print(json.dumps(found), flush=True)  # noqa: T201
        for precision in PRECISIONS if not only_time else ():
            if precision == "fp16":
                for tower in TOWERS:
                    onnx_writer.write_fp16(files["fp32"][tower], files["fp16"][tower])
            found[precision] = _gate(encoder, files[precision], precision)
            found["seconds"] = round(time.monotonic() - start_s, 1)
            # Printed now: a runtime that ends this process takes the next precision only.
            print(json.dumps(found), flush=True)  # noqa: T201


def _load(name: str, place: Path) -> ExternalEncoder:
    where = import_open_clip().get_model_config(name)["text_cfg"].get("hf_tokenizer_name", "")
    is_roberta = any(family in where for family in ("roberta", "xlm", "nllb"))
    tokenizer = small_tokenizer(SPECIAL_OF_ROBERTA if is_roberta else SPECIAL)
    (place / "tokenizer.json").write_text(tokenizer, "utf-8")
    encoder = load_open_clip(name, tokenizer=place / "tokenizer.json")
    disturb(encoder)
    if not measure_any_length(encoder, PROMPTS):
        encoder.facts = replace(encoder.facts, is_any_length_exact=False)
    return encoder


def _name_files(folder: Path, precision: Precision) -> dict[Tower, Path]:
    return {tower: folder / f"{precision}_{tower}.onnx" for tower in TOWERS}


def _write(encoder: ExternalEncoder, files: Mapping[Tower, Path]) -> None:
    for graph in make_graphs(encoder):
        onnx_writer.write_onnx(graph, encoder.facts, files[graph.tower])


def write_yardstick(folder: Path) -> None:
    """Write the towers that others are timed beside."""
    _write(_load(YARDSTICK, folder), _name_files(folder, "fp32"))


def _time(tower: Tower, facts: EncoderFacts, files: Mapping[Tower, Path], yardstick: Path) -> float:
    """Return how many times as long as the yardstick a tower takes, for one row, by OpenVINO."""
    ways = {
        "mine": (files[tower], facts),
        YARDSTICK: (_name_files(yardstick, "fp32")[tower], find_spec("ViT-B/32").facts),
    }
    calls = {
        name: time_each(partial(load_openvino(file), _make_row(tower, each)))
        for name, (file, each) in ways.items()
    }
    turns = take_turns(calls, budget_s=BUDGET_S)
    mine, reference = (turns[name].samples_s for name in ways)
    return round(ratio(mine, reference), 3)


def _make_row(tower: Tower, facts: EncoderFacts) -> NDArray[Any]:
    if tower == "image":
        return np.zeros((1, facts.side_px, facts.side_px, 3), np.uint8)
    length = NUM_TOKENS if facts.is_any_length_exact else facts.context_length
    return np.ones((1, length), np.int32)


def write_hub(folder: Path) -> None:
    """Write the text towers that open_clip names on the hub, in the layout of the hub's cache.

    Sizes as their authors publish them; weights and tokenizers are not there.
    """
    library = import_transformers()
    roberta = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    towers = {
        "roberta-base": library.RobertaConfig(vocab_size=50265, **roberta),
        "xlm-roberta-base": library.XLMRobertaConfig(vocab_size=250002, **roberta),
        "xlm-roberta-large": library.XLMRobertaConfig(
            vocab_size=250002, intermediate_size=4096, **roberta, **large
        ),
        "google/mt5-base": library.MT5Config(
            vocab_size=250112, d_model=768, d_ff=2048, num_layers=12, num_heads=12
        ),
        "google/mt5-xl": library.MT5Config(
            vocab_size=250112, d_model=2048, d_ff=5120, num_layers=24, num_heads=32
        ),
        "facebook/nllb-200-distilled-600M": library.M2M100Config(vocab_size=256206),
        "facebook/nllb-200-distilled-1.3B": library.M2M100Config(
            vocab_size=256206, encoder_layers=24, encoder_ffn_dim=8192, decoder_layers=24
        ),
    }
    for name, tower in towers.items():
        place = folder / f"models--{name.replace('/', '--')}"
        tower.save_pretrained(place / "snapshots" / "local")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("local", "utf-8")


def _gate(
    encoder: ExternalEncoder, files: Mapping[Tower, Path], precision: Precision
) -> dict[str, Any]:
    try:
        report: Any = parity.check_files(
            encoder, image=files["image"], text=files["text"], precision=precision
        ).to_json()
    except ParityError as error:
        report = error.report
    cosines: dict[str, float] = {
        tower: min(case["min_cosine"] for case in report["cases"] if case["tower"] == tower)
        for tower in TOWERS
    }
    return {"passed": report["passed"], **cosines}


def _measure_apart(name: str, yardstick: Path, *, only_time: bool) -> dict[str, Any]:
    """Run `measure` in a process of its own: memory ends with it."""
    arguments = [sys.executable, "-m", "benchmarks.studies.encoders", "--one", name]
    arguments += ["--yardstick", str(yardstick), *(["--only-time"] if only_time else [])]
    try:
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        text = error.stdout if isinstance(error.stdout, str) else (error.stdout or b"").decode()
        return _last(text) | {"failed": f"not done within {LIMIT_S:g} s"}
    if done.returncode == 0:
        return _last(done.stdout)
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        why = f"ended by {signal.Signals(-done.returncode).name}"
    else:
        why = errors[-1][:300] if errors else f"exit code {done.returncode}"
    return _last(done.stdout) | {"failed": why}


def _last(printed: str) -> dict[str, Any]:
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    return dict(json.loads(lines[-1])) if lines else {}


def _count_parameters(name: str) -> float:
    """Return how many parameters a configuration has, without making them."""
    open_clip = import_open_clip()
    try:
        with torch.device("meta"):
            model = open_clip.create_model(
                name, device="meta", load_weights=False, pretrained_text=False
            )
        return float(sum(each.numel() for each in model.parameters()))
    # What cannot be made says why when it is measured.
    except Exception:
        return 0.0


def main(config: EncodersConfig) -> None:
    """Do what `config` says."""
    if config.one is not None:
        measure(config.one, config.yardstick, only_time=config.only_time)
        return
    if config.render is not None:
        console.print(encoders_page.write_page(config.render), markup=False, soft_wrap=True)
        return
    done: dict[str, Any] = {}
    if config.out.is_file():
        done = json.loads(config.out.read_text("utf-8"))["models"]
    with tempfile.TemporaryDirectory() as folder:
        # Read when the hub's library is imported, which counting does.
        os.environ |= {"HF_HUB_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        write_hub(Path(folder))
        names = config.model or tuple(import_open_clip().list_models())
        num_known = len(import_open_clip().list_models())
        left = [name for name in names if not _is_done(done.get(name, {}))]
        sizes = {name: _count_parameters(name) for name in left}
        write_yardstick(Path(folder))
        for name in track(sorted(left, key=sizes.__getitem__), "exporting", console=console):
            if (size := sizes[name]) > config.max_parameters:
                done[name] = {"left_out": f"{size / 1e9:.1f} billion parameters"}
            else:
                before = done.get(name, {})
                only_time = "fp16" in before or "failed" in before
                done[name] = before | _measure_apart(name, Path(folder), only_time=only_time)
            result = {"num_known": num_known, "models": done}
            write(config.out, describe_result(COMMAND, PACKAGES) | result)
    show(
        ("model", "side", "tokens", "FP32", "FP16", "s"),
        [_row(name, found) for name, found in done.items()],
    )


def _is_done(found: Mapping[str, Any]) -> bool:
    return "left_out" in found or "times_yardstick" in found


def _row(name: str, found: dict[str, Any]) -> tuple[object, ...]:
    why = found.get("failed") or found.get("left_out", "")
    shown = [_worst(found[each]) if each in found else why for each in PRECISIONS]
    return name, found.get("side_px"), found.get("context_length"), *shown, found.get("seconds")


def _worst(gate: dict[str, Any]) -> str:
    text = f"{min(gate['image'], gate['text']):.7f}"
    return text if gate["passed"] else f"{text} refused"


if __name__ == "__main__":
    with command():
        main(
            tyro.cli(
                EncodersConfig, prog=program("benchmarks.studies.encoders"), description=__doc__
            )
        )
