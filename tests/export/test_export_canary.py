"""The canary an export writes is what its reference answers, in both manifests of a model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import clip_rt
from clip_rt.errors import InputError
from clip_rt.wire import canary
from export import parity, parity_report
from export.canary import add_canary, make_canary
from export.pipeline import make_manifest
from export.repository import publish, switch_version
from export.triton_config import read_config, read_manifest

ROOT = Path(__file__).parents[2]


def ask(exported):
    """What the two ONNX files answer."""
    spec = exported.clip.spec
    pixels = clip_rt.preprocess(canary.draw_image(), side_px=spec.side_px)
    tokens = clip_rt.tokenize(canary.TEXT)
    return {
        "image": parity.onnx_encoder(exported.image)(pixels)[0],
        "text": parity.onnx_encoder(exported.text)(tokens)[0],
    }


@pytest.fixture
def published(exported_vit, tmp_path):
    manifest = make_manifest(
        exported_vit.clip, "shop", precision="fp32", weights_fingerprint="a" * 64
    )
    bare = replace(manifest, canary=None)
    for _ in range(2):
        publish(tmp_path, bare, image=exported_vit.image, text=exported_vit.text)
    return tmp_path


def test_an_export_carries_what_its_reference_answers(exported):
    manifest = make_manifest(exported.clip, "x", precision="fp32", weights_fingerprint="a" * 64)
    cosines, min_cosine = canary.compare(manifest.canary, **ask(exported))
    assert min(cosines.values()) > 1 - 1e-6
    # A GPU may compute FP32 in TF32, so that no more than FP16's bar is asked for.
    assert min_cosine == parity_report.TOLERANCES["fp16"].min_cosine


def test_a_looser_precision_asks_for_less(exported_vit):
    assert make_canary(exported_vit.clip, "int8")["min_cosine"] == 0.8


def test_is_added_to_the_served_version_of_both_towers(published, exported_vit):
    made = add_canary(published, "shop")
    cosines, _ = canary.compare(made, **ask(exported_vit))
    assert min(cosines.values()) > 1 - 1e-6
    for tower in ("image", "text"):
        folder = published / f"shop_{tower}"
        assert read_manifest(folder).canary == read_manifest(folder / "2").canary == made
        assert read_manifest(folder / "1").canary is None
        assert read_config(folder).parameters["fingerprint"].string_value == f'"{"a" * 64}"'
    assert not list(published.rglob("*.new"))
    assert switch_version(published, "shop") == 1


def test_needs_a_model_with_onnx_files(published):
    with pytest.raises(InputError, match="no model 'other'"):
        add_canary(published, "other")
    (published / "shop_text" / "2" / "model.onnx").unlink()
    with pytest.raises(InputError, match="Export the model again"):
        add_canary(published, "shop")


def test_the_command_says_what_it_did(published):
    done = subprocess.run(
        [sys.executable, "-m", "export.canary", "--name", "shop", "--repository", published],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "shop carries a canary" in done.stdout
    assert read_manifest(published / "shop_image").canary is not None


def test_the_bundled_model_carries_its_own():
    for tower in ("image", "text"):
        folder = ROOT / f"model_repository/drawings_{tower}"
        manifest = read_manifest(folder)
        assert manifest.canary == read_manifest(folder / "1").canary
        cosines, min_cosine = canary.compare(
            manifest.canary,
            image=np.ones(manifest.embedding_dim, np.float32),
            text=np.ones(manifest.embedding_dim, np.float32),
        )
        assert max(cosines.values()) < min_cosine
