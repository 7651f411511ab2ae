"""How fast a model of open_clip is in its own library, in exported graphs, and through a client.

    python -m benchmarks.studies.external_speed                # ViT-B-16-SigLIP2: 20 minutes
    python -m benchmarks.studies.external_speed --model open_clip:ViT-B-32-256 --tokenizer none

Weights are random, which costs what trained ones cost; a tokenizer like Gemma's is made. Towers are
timed by turns on the same rows: in torch as open_clip runs them, in FP32 by both runtimes, and in
INT8. Then the whole way is, from images and strings to vectors: open_clip's preprocessing,
tokenizer and model, and a client with a real Triton. The exit code is 1 where a bar is not met.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image

import clip_rt
from benchmarks.contenders.runtimes import load_onnxruntime, load_openvino
from benchmarks.photos import SMALL_PX, photo
from benchmarks.record import save
from benchmarks.studies import made_tokenizers
from benchmarks.studies.common import TOWERS, console, show
from benchmarks.studies.scripts import draw_texts
from benchmarks.timing import take_turns, time_each
from clip_rt.specs import TOKENIZER_FILE, Tower
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export.onnx import OnnxConfig, export
from export.probes import PROMPTS
from training.encoders.encoder import ExternalEncoder, measure_any_length
from training.encoders.find import RANDOM_WEIGHTS, load_encoder

MODULE = "studies.external_speed"
ROWS = (1, 32)
SHORT_TOKENS = 16
"""Of texts that may have any length."""
FP32: Final = "fp32"
INT8: Final = "int8"
BARS: dict[tuple[str, Tower, int], float] = {
    (FP32, "image", 1): 1.2,
    (FP32, "image", 32): 1.05,
    (FP32, "text", 1): 1.0,
    (FP32, "text", 32): 1.0,
    (INT8, "image", 1): 2.5,
    (INT8, "image", 32): 2.5,
    (INT8, "text", 1): 2.0,
    (INT8, "text", 32): 2.0,
}
"""How many times as fast as in open_clip a tower is to be."""


@dataclass(frozen=True, kw_only=True)
class ExternalSpeedConfig:
    """Measure, print tables, and write a dated JSON."""

    model: str = "open_clip:ViT-B-16-SigLIP2"
    """A configuration of open_clip."""
    tokenizer: str = "gemma"
    """gemma makes one; none where the model has OpenAI's."""
    budget_s: float = 60.0
    """For the calls of each case."""
    folder: Path = Path("build/external_speed")
    """Keeps what is exported for later runs."""


def prepare(config: ExternalSpeedConfig) -> tuple[ExternalEncoder, Path]:
    """Load the model, and export it in FP32 and INT8 unless it is there."""
    config.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = None
    if config.tokenizer != "none":
        tokenizer = config.folder / TOKENIZER_FILE
        if not tokenizer.is_file():
            # Its padding is named in the file, since no other stands beside it.
            padding = '"padding":{"strategy":"BatchLongest","direction":"Right","pad_id":0,'
            padding += '"pad_to_multiple_of":null,"pad_type_id":0,"pad_token":"<pad>"}'
            content = made_tokenizers.gemma().replace('"padding": null', padding, 1)
            tokenizer.write_text(content, "utf-8")
    repository = config.folder / config.model.replace(":", "_").replace("/", "_")
    precisions: tuple[Literal["fp32", "int8"], ...] = (FP32, INT8)
    for precision in precisions:
        if not (repository / f"{precision}_text").is_dir():
            export(
                OnnxConfig(
                    model=config.model,
                    weights=RANDOM_WEIGHTS,
                    tokenizer=tokenizer,
                    name=precision,
                    precision=precision,
                    repository=repository,
                    cache=config.folder / "cache",
                )
            )
    return load_encoder(config.model, weights=None, tokenizer=tokenizer), repository


def time_towers(
    encoder: ExternalEncoder, repository: Path, budget_s: float
) -> dict[str, dict[str, float]]:
    """Return seconds of a call by case and way."""
    texts = draw_texts(max(ROWS))
    images = [photo(SMALL_PX, index) for index in range(max(ROWS))]
    tokens_NL = encoder.source.tokens(texts)
    # open_clip pads all the same.
    length = SHORT_TOKENS if measure_any_length(encoder, PROMPTS) else tokens_NL.shape[1]
    pixels_NCSS = torch.from_numpy(encoder.source.pixels(images))
    side_px = encoder.facts.side_px
    ours: dict[Tower, NDArray[Any]] = {
        "image": np.zeros((max(ROWS), side_px, side_px, 3), np.uint8),
        "text": np.ascontiguousarray(tokens_NL[:, :length], np.int32),
    }
    found = {}
    for tower in TOWERS:
        file, small = (repository / f"{name}_{tower}/1/model" for name in (FP32, INT8))
        encoders = {
            "onnxruntime": load_onnxruntime(file.with_suffix(".onnx")),
            "openvino": load_openvino(file.with_suffix(".onnx")),
            INT8: load_openvino(small.with_suffix(".xml")),
        }
        eager = encoder.encode_image if tower == "image" else encoder.encode_text
        theirs = pixels_NCSS if tower == "image" else torch.from_numpy(tokens_NL)
        for rows in ROWS:
            calls: dict[str, Callable[[], object]] = {
                "open_clip": partial(_embed, eager, theirs[:rows])
            }
            calls |= {
                name: partial(encode, ours[tower][:rows]) for name, encode in encoders.items()
            }
            found[f"{tower}, {rows}"] = _time(calls, budget_s)
    return found


def time_whole(
    encoder: ExternalEncoder, repository: Path, budget_s: float
) -> dict[str, dict[str, float]]:
    """Return seconds of a call by case and way, from images and strings to vectors."""
    images = [photo(SMALL_PX, index) for index in range(max(ROWS))]
    texts = [f"a photo of a {index}th red car." for index in range(max(ROWS))]
    found = {}
    clients = {
        precision: clip_rt.Client(repository=repository, model=precision, timeout_s=600)
        for precision in (FP32, INT8)
    }
    try:
        for rows in ROWS:
            some, few = images[:rows], texts[:rows]
            calls: dict[str, Callable[[], object]]
            calls = {"open_clip": partial(_embed_images, encoder, some)}
            calls |= {name: partial(each.encode_images, some) for name, each in clients.items()}
            found[f"images, {rows}"] = _time(calls, budget_s)
            calls = {"open_clip": partial(_embed_texts, encoder, few)}
            calls |= {name: partial(each.encode_texts, few) for name, each in clients.items()}
            found[f"texts, {rows}"] = _time(calls, budget_s)
    finally:
        for each in clients.values():
            each.close()
    return found


def _embed_images(encoder: ExternalEncoder, images: Sequence[Image.Image]) -> Any:
    return _embed(encoder.encode_image, torch.from_numpy(encoder.source.pixels(images)))


def _embed_texts(encoder: ExternalEncoder, texts: Sequence[str]) -> Any:
    return _embed(encoder.encode_text, torch.from_numpy(encoder.source.tokens(texts)))


@torch.inference_mode()
def _embed(encode: Callable[[Any], Any], batch: Any) -> Any:
    return torch.nn.functional.normalize(encode(batch), dim=-1)


def _time(calls: Mapping[str, Callable[[], object]], budget_s: float) -> dict[str, float]:
    turns = take_turns({name: time_each(call) for name, call in calls.items()}, budget_s=budget_s)
    return {name: each.interval_s.median for name, each in turns.items()}


def judge(towers: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Return how many times as fast as open_clip each tower is, beside its bar."""
    found = {}
    for (precision, tower, rows), bar in BARS.items():
        times_s = towers[f"{tower}, {rows}"]
        ways: Sequence[str] = (INT8,) if precision == INT8 else ("onnxruntime", "openvino")
        ratio = times_s["open_clip"] / min(times_s[each] for each in ways)
        found[f"{precision}, {tower}, {rows}"] = {
            "times_as_fast": round(ratio, 2),
            "bar": bar,
            "met": ratio >= bar,
        }
    return found


def main(config: ExternalSpeedConfig) -> None:
    """Measure towers, then the whole way, and judge the towers."""
    encoder, repository = prepare(config)
    towers = time_towers(encoder, repository, config.budget_s)
    whole = time_whole(encoder, repository, config.budget_s)
    for title, cases in (("towers", towers), ("from images and strings to vectors", whole)):
        names = list(next(iter(cases.values())))
        rows = [
            (case, *(f"{1e3 * times_s[name]:.1f}" for name in names))
            for case, times_s in cases.items()
        ]
        show(("milliseconds", *names), rows, title)
    bars = judge(towers)
    for case, each in bars.items():
        console.print(
            f"{case}: {each['times_as_fast']} times as fast, {each['bar']} asked: "
            f"{'yes' if each['met'] else 'NO'}",
            highlight=False,
        )
    results = {"model": config.model, "towers_s": towers, "whole_s": whole, "bars": bars}
    packages = ("nncf", "onnxruntime", "open_clip_torch", "openvino", "timm", "torch")
    save(MODULE, results, packages=packages)
    if not all(each["met"] for each in bars.values()):
        sys.exit(1)


if __name__ == "__main__":
    with command():
        main(tyro.cli(ExternalSpeedConfig, prog=program(__spec__.name), description=__doc__))
