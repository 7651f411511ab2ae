"""A model and its ONNX files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.graphs import ImageGraph, TextGraph
from export.onnx_writer import write_onnx
from training.model import CLIP


@dataclass(frozen=True)
class Exported:
    """A model and the ONNX files of its two towers."""

    clip: CLIP
    image: Path
    text: Path


def export_towers(clip: CLIP, folder: Path, *, fp16_weights: bool = False) -> Exported:
    """Write both towers, in FP32 unless told otherwise, into a folder, made if it is not there."""
    folder.mkdir(exist_ok=True)
    exported = Exported(clip, folder / "image.onnx", folder / "text.onnx")
    write_onnx(ImageGraph(clip), clip.facts, exported.image, fp16_weights=fp16_weights)
    write_onnx(TextGraph(clip), clip.facts, exported.text, fp16_weights=fp16_weights)
    return exported
