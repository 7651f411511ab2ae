"""What the reference answers to the image and the text of `clip_rt.wire.canary`, into manifests.

Every export writes it. For a model exported before there were canaries, and for the bundled one,
whose weights are published in FP16 only:

    python -m export.canary --name drawings

takes the ONNX files that are served, run by ONNX Runtime on the processor, as the reference.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from google.protobuf import text_format
from numpy.typing import NDArray

from clip_rt.errors import InputError
from clip_rt.inputs.images import preprocess
from clip_rt.inputs.tokenizer import pad, tokenize
from clip_rt.specs import CLIP_TOKENIZATION, Resizing
from clip_rt.wire import canary
from clip_rt.wire.manifest import CANARY
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export import parity, parity_report
from export.console import console
from export.graphs import make_graphs
from export.model_folders import check_known, tower_folders
from export.models import served_version
from export.repository import switch_version
from export.triton_config import read_config, read_manifest
from export.version_folder import CONFIG
from training.dual_encoder import DualEncoder


def make_canary(clip: DualEncoder, precision: str) -> dict[str, Any]:
    """Ask `clip`, in FP32, and return the value of `Manifest.canary` for an export of it."""
    facts = clip.facts
    ids = clip.text_tokenizer.encode_text(canary.TEXT, truncate=True)
    tokens = pad([ids], length_tokens=facts.context_length, pad_id=facts.tokenization.pad_id)
    pixels = _pixels(facts.side_px, facts.resizing)
    image_graph, text_graph = make_graphs(clip)
    with torch.inference_mode():
        return canary.write(
            image_graph(torch.from_numpy(pixels))[0].numpy(),
            text_graph(torch.from_numpy(tokens))[0].numpy(),
            min_cosine=_min_cosine(precision),
        )


def add_canary(repository: Path, name: str) -> Mapping[str, Any]:
    """Write a canary into the manifests of the served version of a model that has ONNX files.

    Args:
        repository: The model repository.
        name: Served name.

    Returns:
        The canary; a running server hands it out when it reloads the model.

    Raises:
        InputError: there is no such model, or it has no ONNX file.
        ContractError: a tower carries no manifest.
    """
    folders = tower_folders(repository, name)
    check_known(repository, name)
    version = served_version(folders[0])
    files = [folder / str(version) / "model.onnx" for folder in folders]
    lacking = next((file for file in files if not file.is_file()), None)
    if lacking is not None:
        raise InputError(f"there is no {lacking} to ask. Export the model again, for its canary.")
    manifest = read_manifest(folders[0])
    encode_image, encode_text = map(parity.onnx_encoder, files)
    if manifest.tokenization != CLIP_TOKENIZATION:
        raise InputError(
            f"{name} has a tokenizer of its own, and every export of such a model has a canary. "
            "Export the model again."
        )
    pixels = _pixels(manifest.side_px, manifest.resizing)
    tokens = tokenize(canary.TEXT, context_length=manifest.context_length)
    made = canary.write(
        encode_image(pixels)[0],
        encode_text(tokens)[0],
        min_cosine=_min_cosine(manifest.precision),
    )
    for file in files:
        config = read_config(file.parent)
        config.parameters[CANARY].string_value = json.dumps(made, sort_keys=True)
        beside = file.with_name(f"{CONFIG}.new")
        beside.write_text(text_format.MessageToString(config, as_utf8=True), "utf-8")
        os.replace(beside, file.with_name(CONFIG))
    switch_version(repository, name, version)
    return made


def _pixels(side_px: int, resizing: Resizing) -> NDArray[np.uint8]:
    return preprocess(canary.draw_image(), side_px=side_px, resizing=resizing)


def _min_cosine(precision: str) -> float:
    """Return what the gate asked for, but no more than of FP16: a GPU may compute FP32 in TF32."""
    asked = {
        str(name): tolerance.min_cosine for name, tolerance in parity_report.TOLERANCES.items()
    }
    return min(asked[precision], asked["fp16"])


@dataclass(frozen=True, kw_only=True)
class CanaryConfig:
    """Which model gets a canary."""

    name: str
    """Served name."""
    repository: Path = Path("model_repository")
    """Triton model repository."""


def main(config: CanaryConfig) -> None:
    """Do what `config` says."""
    made = add_canary(config.repository, config.name)
    console.print(
        f"{config.name} carries a canary; what serves it owes it a cosine of {made['min_cosine']}",
        markup=False,
    )


if __name__ == "__main__":
    with command():
        main(tyro.cli(CanaryConfig, prog=program("export.canary"), description=__doc__))
