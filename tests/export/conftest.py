"""Tiny models and their ONNX files, exported once for all tests of export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_clip as tiny

from clip_rt.specs import ModelSpec
from export.graphs import ImageGraph, TextGraph
from export.onnx_writer import write_onnx
from training.model import CLIP


@dataclass(frozen=True)
class Exported:
    """A model and its two FP32 ONNX files."""

    clip: CLIP
    image: Path
    text: Path


def _export(spec: ModelSpec, folder: Path) -> Exported:
    exported = Exported(tiny.make(spec), folder / "image.onnx", folder / "text.onnx")
    write_onnx(ImageGraph(exported.clip), spec, exported.image)
    write_onnx(TextGraph(exported.clip), spec, exported.text)
    return exported


@pytest.fixture(scope="session")
def exported_vit(tmp_path_factory) -> Exported:
    return _export(tiny.VIT, tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def exported_resnet(tmp_path_factory) -> Exported:
    return _export(tiny.RESNET, tmp_path_factory.mktemp("resnet"))


@pytest.fixture(params=["vit", "resnet"])
def exported(request) -> Exported:
    return request.getfixturevalue(f"exported_{request.param}")
