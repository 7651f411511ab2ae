"""Tiny models and their ONNX files, exported once for all tests of export."""

from __future__ import annotations

import pytest
import tiny_clip as tiny
from exported import Exported, export_towers


@pytest.fixture(scope="session")
def exported_vit(tmp_path_factory) -> Exported:
    return export_towers(tiny.make(tiny.VIT), tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def exported_resnet(tmp_path_factory) -> Exported:
    return export_towers(tiny.make(tiny.RESNET), tmp_path_factory.mktemp("resnet"))


@pytest.fixture(params=["vit", "resnet"])
def exported(request) -> Exported:
    return request.getfixturevalue(f"exported_{request.param}")
