"""Export to ONNX: the graphs obey the contract, the command line works as a module."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_clip as tiny
import torch
import typer.testing
from safetensors.torch import save_file

from clip_rt.errors import InputError
from clip_rt.specs import EMBEDDINGS, MODELS
from export import onnx as command
from export import parity, probes
from export.graphs import ImageGraph, TextGraph
from export.onnx import export_clip, make_manifest, random_clip, write_image, write_text
from export.repository import read_manifest
from training.weights.load import fingerprint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clip(exported):
    return exported.clip


@pytest.fixture
def files(exported):
    return exported.image, exported.text


@torch.inference_mode()
def test_graphs_equal_the_model_they_prune(clip):
    pixels, tokens = probes.images(clip.spec.side_px), probes.tokens(77)
    found = ImageGraph(clip)(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(found, parity._reference_images(clip, pixels), atol=1e-6)
    found = TextGraph(clip)(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(found, parity._reference_texts(clip, tokens), atol=1e-6)


def test_inputs_and_outputs_obey_the_contract(clip, files):
    side = clip.spec.side_px
    expected = (
        ("pixels", onnx.TensorProto.UINT8, ["batch", side, side, 3]),
        ("tokens", onnx.TensorProto.INT32, ["batch", "length"]),
    )
    for path, (name, dtype, shape) in zip(files, expected, strict=True):
        graph = onnx.load(path).graph
        onnx.checker.check_model(str(path), full_check=True)
        found = [(value.name, value.type.tensor_type) for value in graph.input]
        assert [(value, tensor.elem_type) for value, tensor in found] == [(name, dtype)]
        dims = [dim.dim_param or dim.dim_value for dim in found[0][1].shape.dim]
        assert dims == shape
        (output,) = graph.output
        assert output.name == EMBEDDINGS
        assert output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_both_towers_pass_the_gate(clip, files):
    report = parity.check_onnx(clip, image=files[0], text=files[1], precision="fp32")
    assert report.passed


def test_every_length_up_to_the_context_is_read(clip, files):
    encode = parity.onnx_encoder(files[1])
    tokens = probes.tokens(77)[:1]
    expected = encode(tokens)
    assert expected.shape == (1, clip.spec.embedding_dim)
    for length in (15, 16, 17, 50, 76):
        np.testing.assert_allclose(encode(tokens[:, :length]), expected, atol=1e-6)


def test_one_file_without_traces_of_the_machine_that_wrote_it(files):
    for path in files:
        content = path.read_bytes()
        assert not path.with_name(path.name + ".data").exists()
        for trace in (str(ROOT), sys.prefix, "stack_trace", ".py", "torch.nn"):
            assert trace.encode() not in content, trace


def test_two_exports_give_the_same_bytes(exported_vit, tmp_path):
    write_text(exported_vit.clip, tmp_path / "text.onnx")
    assert (tmp_path / "text.onnx").read_bytes() == exported_vit.text.read_bytes()


def test_more_weights_than_one_file_holds_are_refused(exported_vit, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "MAX_WEIGHT_BYTES", 10**6)
    with pytest.raises(InputError, match=r"text\.onnx would hold .* GiB.*--weights-dtype fp16"):
        write_text(exported_vit.clip, tmp_path / "text.onnx")
    assert not list(tmp_path.iterdir())


class TestManifest:
    def test_says_what_was_exported(self, clip):
        manifest = make_manifest(clip, "shop-v3", precision="fp32")
        assert manifest.model == "shop-v3"
        assert manifest.architecture == clip.spec.name
        assert manifest.fingerprint == fingerprint(clip.state_dict())
        assert manifest.logit_scale == pytest.approx(1 / 0.07)
        assert manifest.libraries.keys() == {"clip_rt", "onnx", "onnxruntime", "torch"}

    def test_records_the_activation(self):
        clip = tiny.make(replace(tiny.VIT, activation="gelu"))
        assert make_manifest(clip, "x", precision="fp32").activation == "gelu"


def test_gelu_is_exported_too(exported_vit, tmp_path):
    clip = tiny.make(replace(tiny.VIT, activation="gelu"))
    write_image(clip, tmp_path / "image.onnx")
    pixels = probes.images(clip.spec.side_px)
    found = parity.onnx_encoder(tmp_path / "image.onnx")(pixels)
    np.testing.assert_allclose(found, parity._reference_images(clip, pixels), atol=2e-6)
    other = parity.onnx_encoder(exported_vit.image)(pixels)
    assert np.abs(found - other).max() > 1e-4


def test_random_weights_are_the_same_every_time():
    first, second = random_clip(tiny.VIT), random_clip(tiny.VIT)
    assert fingerprint(first.state_dict()) == fingerprint(second.state_dict())


def test_a_taken_name_fails_before_the_export(clip, tmp_path, monkeypatch):
    (tmp_path / "shop_text").mkdir()
    monkeypatch.setattr("export.onnx.write_image", lambda *_, **__: pytest.fail("exported"))
    with pytest.raises(InputError, match="shop_text"):
        export_clip(clip, name="shop", repository_folder=tmp_path)


class TestCommand:
    """`python -m export.onnx`, which must find the onnx package and not itself."""

    def run(self, *arguments):
        return subprocess.run(
            [sys.executable, "-m", "export.onnx", *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def test_publishes_a_checkpoint(self, tmp_path):
        clip = random_clip(MODELS["RN26@64px"], seed=3)
        checkpoint = tmp_path / "clip.safetensors"
        save_file(clip.state_dict(), checkpoint)
        found = self.run(
            *("--model", "RN26@64px", "--checkpoint", checkpoint, "--name", "shop-v3"),
            *("--repository", tmp_path / "models", "--weights-dtype", "fp16"),
        )
        assert found.returncode == 0, found.stdout + found.stderr
        assert {path.name for path in (tmp_path / "models").iterdir()} == {
            "shop_v3_image",
            "shop_v3_text",
        }
        for title in ("load the weights", "export the image tower", "compare", "publish", "MiB"):
            assert title in found.stdout
        manifest = read_manifest(tmp_path / "models" / "shop_v3_image")
        assert manifest.fingerprint == fingerprint(clip.state_dict())
        assert manifest.precision == "fp16_weights"
        size_bytes = sum(path.stat().st_size for path in tmp_path.rglob("model.onnx"))
        assert size_bytes < 40e6

    def test_errors_end_with_status_1_and_no_traceback(self, tmp_path):
        found = self.run("--model", "ViT-B/31", "--weights", "random", "--repository", tmp_path)
        assert found.returncode == 1
        assert "unknown architecture 'ViT-B/31'" in found.stdout
        assert "Traceback" not in found.stdout + found.stderr
        assert not list(tmp_path.iterdir())


def test_failed_parity_ends_with_status_1_and_shows_the_table(
    exported_vit, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(MODELS, "tiny-ViT", tiny.VIT)
    tolerance = parity.Tolerance(min_cosine=1.1, max_difference=0, top1_agreement=1)
    monkeypatch.setitem(parity.TOLERANCES, "fp32", tolerance)
    for name, source in (("write_image", exported_vit.image), ("write_text", exported_vit.text)):
        monkeypatch.setattr(
            command, name, lambda _, path, source=source, **__: shutil.copyfile(source, path)
        )
    app = typer.Typer()
    app.command()(command.main)
    found = typer.testing.CliRunner().invoke(
        app, ["--model", "tiny-ViT", "--weights", "random", "--repository", str(tmp_path)]
    )
    printed = capsys.readouterr().out + found.output
    assert found.exit_code == 1
    assert "drifts" in printed
    assert "ParityError" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", [[], ["--weights", "random", "--checkpoint", "x"]])
def test_exactly_one_source_of_weights_is_needed(tmp_path, weights):
    app = typer.Typer()
    app.command()(command.main)
    found = typer.testing.CliRunner().invoke(
        app, ["--model", "RN26@64px", "--repository", str(tmp_path), *weights]
    )
    assert found.exit_code == 1
