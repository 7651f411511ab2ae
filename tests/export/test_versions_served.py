"""What the real Triton serves of a repository with versions: the one config.pbtxt names."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import tiny_clip as tiny

import clip_rt
from clip_rt.specs import MODELS
from export import probes
from export.onnx import OnnxConfig, export
from export.repository import switch_version
from training.model import CLIP

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pytriton") is None, reason="the embedded server is not installed"
)


def embed(models, clip: CLIP) -> np.ndarray:
    """Ask a server of its own."""
    with clip_rt.Client(repository=models) as client:
        return client.encode_images(list(probes.images(clip.spec.side_px)))


def test_an_upgrade_and_the_way_back(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, tiny.VIT.name, tiny.VIT)
    made = {}
    for activation in ("quick_gelu", "gelu"):
        config = OnnxConfig(
            model=tiny.VIT.name, weights="random", name="shop", activation=activation,
            repository=tmp_path / "models", cache=tmp_path / "cache",
            precision="fp16" if activation == "gelu" else "fp32",
        )  # fmt: skip
        export(config)
        clip = tiny.make(tiny.VIT)
        made[activation] = embed(tmp_path / "models", clip)
    assert np.abs(made["gelu"] - made["quick_gelu"]).max() > 1e-4
    switch_version(tmp_path / "models", "shop")
    again = embed(tmp_path / "models", clip)
    np.testing.assert_array_equal(again, made["quick_gelu"])
