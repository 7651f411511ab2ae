"""Export to ONNX: the graphs obey the contract, the command line works as a module."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_clip as tiny
import torch
from safetensors.torch import save_file

from clip_rt.errors import InputError, ParityError
from clip_rt.specs import EMBEDDINGS, MODELS
from clip_rt_commands.errors import command
from export import console, onnx_writer, parity, parity_report, probes, storage
from export.graphs import ImageGraph, TextGraph
from export.onnx import OnnxConfig, export
from export.onnx_writer import write_onnx
from export.pipeline import make_manifest, random_clip
from export.repository import publish
from export.triton_config import read_manifest
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
    report = parity.check_files(clip, image=files[0], text=files[1], precision="fp32")
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
    clip = exported_vit.clip
    write_onnx(TextGraph(clip), clip.facts, tmp_path / "text.onnx")
    assert (tmp_path / "text.onnx").read_bytes() == exported_vit.text.read_bytes()


def test_more_weights_than_one_file_holds_lie_beside_it(exported_vit, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_writer, "MAX_FILE_BYTES", 10**6)
    clip = exported_vit.clip
    path = tmp_path / "model.onnx"
    write_onnx(TextGraph(clip), clip.facts, path)
    assert storage.external_files(path) == [tmp_path / "model.onnx.data"]
    assert path.stat().st_size < 10**6
    report = parity.check_files(clip, image=exported_vit.image, text=path, precision="fp32")
    assert report.passed
    folders = publish(
        tmp_path / "models",
        make_manifest(clip, "shop", precision="fp32", weights_fingerprint="a" * 64),
        image=exported_vit.image,
        text=path,
    )
    assert {each.name for each in (folders[1] / "1").iterdir()} == {
        "config.pbtxt", "dlpack.py", "model.onnx", "model.onnx.data", "model.py", "processor.py",
        "runtime_choice.py", "runtimes.py",
    }  # fmt: skip


class TestManifest:
    def test_says_what_was_exported(self, clip):
        manifest = make_manifest(clip, "shop-v3", precision="fp32", weights_fingerprint="a" * 64)
        assert manifest.model == "shop-v3"
        assert manifest.architecture == clip.spec.name
        assert manifest.fingerprint == "a" * 64
        assert manifest.logit_scale == pytest.approx(1 / 0.07)
        assert manifest.libraries.keys() == {"clip_rt", "onnx", "onnxruntime", "torch"}

    def test_records_the_activation(self):
        clip = tiny.make(replace(tiny.VIT, activation="gelu"))
        manifest = make_manifest(clip, "x", precision="fp32", weights_fingerprint="a" * 64)
        assert manifest.activation == "gelu"


def test_gelu_is_exported_too(exported_vit, tmp_path):
    clip = tiny.make(replace(tiny.VIT, activation="gelu"))
    write_onnx(ImageGraph(clip), clip.facts, tmp_path / "image.onnx")
    pixels = probes.images(clip.spec.side_px)
    found = parity.onnx_encoder(tmp_path / "image.onnx")(pixels)
    np.testing.assert_allclose(found, parity._reference_images(clip, pixels), atol=2e-6)
    other = parity.onnx_encoder(exported_vit.image)(pixels)
    assert np.abs(found - other).max() > 1e-4


def test_random_weights_are_the_same_every_time():
    first, second = random_clip(tiny.VIT), random_clip(tiny.VIT)
    assert fingerprint(first.state_dict()) == fingerprint(second.state_dict())


def config(folder: Path, **changes: object) -> OnnxConfig:
    values = {"model": "tiny-ViT", "weights": "random", "name": "shop"}
    folders = {"repository": folder / "models", "cache": folder / "cache"}
    return OnnxConfig(**{**values, **folders, **changes})


@pytest.fixture
def tiny_spec(monkeypatch):
    monkeypatch.setitem(MODELS, tiny.VIT.name, tiny.VIT)
    return tiny.VIT


def test_a_taken_name_fails_before_the_export(tiny_spec, tmp_path, monkeypatch):
    (tmp_path / "models/shop_text").mkdir(parents=True)
    monkeypatch.setattr("export.onnx.load_weights", lambda _: pytest.fail("exported"))
    with pytest.raises(InputError, match="shop_text"):
        export(config(tmp_path))


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tiny_spec, tmp_path, capsys):
    assert export(config(tmp_path, precision="fp16", dry_run=True)) is None
    printed = capsys.readouterr().out
    for stage in ("load the weights", "FP16", "cosine at least 0.9995", "'shop' into"):
        assert stage in printed
    assert not list(tmp_path.iterdir())


def test_what_the_gate_found_is_one_line_and_a_file(tiny_spec, tmp_path, capsys):
    export(config(tmp_path, name="shop"))
    printed = capsys.readouterr().out
    (line,) = [each for each in printed.splitlines() if "worst cosine" in each]
    assert "32 cases pass" in line or "16 cases pass" in line
    assert "drifts" not in printed
    assert len(printed.splitlines()) < 20
    file = Path(printed.split("every case: ")[1].split("\n")[0])
    assert file == tmp_path / "models/shop_image/1/parity.json"
    cases = json.loads(file.read_text("utf-8"))["cases"]
    assert f"{len(cases)} cases" in line
    assert f"{min(case['min_cosine'] for case in cases):.7f}" in line
    # Each of them where it is asked for.
    export(config(tmp_path, name="shop", verbose=True))
    assert capsys.readouterr().out.count(" ok ") == len(cases)


def test_what_comes_next_can_be_pasted_into_a_shell(tiny_spec, tmp_path, capsys):
    folder = tmp_path / "it's $HOME"
    for _ in range(2):
        capsys.readouterr()
        export(config(tmp_path, name="shop @2", repository=folder))
    commands = [line[4:] for line in capsys.readouterr().out.splitlines() if line[:4] == " " * 4]
    words = [shlex.split(each) for each in commands]
    assert [each[2:] for each in words[1:]] == [
        ["clip_rt", "serve", "--repository", str(folder)],
        ["export.repository", "--repository", str(folder), "--name", "shop @2", "--rollback"],
        ["export.repository", "--repository", str(folder)],
    ]
    python, flag, program = words[0]
    assert (python, flag) == ("python", "-c")
    found = {}
    client = type("Client", (), {"__init__": lambda self, **given: found.update(given)})
    with pytest.raises(AttributeError, match="encode_texts"):
        exec(program.replace("import clip_rt; ", ""), {"clip_rt": type("", (), {"Client": client})})
    assert found == {"repository": str(folder), "model": "shop @2"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repository": Path("file")}, "is no folder; name another --repository"),
        ({"repository": Path("file/below")}, "is no folder; name another --repository"),
        ({"samples": (Path("none/val"),)}, "'none/val' does not exist"),
        ({"class_names": Path("none.csv")}, "'none.csv' does not exist"),
    ],
)
def test_what_is_not_there_is_said_before_any_work(
    tiny_spec, tmp_path, monkeypatch, capsys, changes, message
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(InputError, match=message):
        export(config(tmp_path, **changes))
    assert capsys.readouterr().out == ""


def test_a_second_run_makes_only_what_has_changed(tiny_spec, tmp_path, capsys):
    export(config(tmp_path))
    assert "reused" not in capsys.readouterr().out
    export(config(tmp_path, name="other"))
    assert capsys.readouterr().out.count("unchanged, reused") == 2
    export(config(tmp_path, precision="fp16", name="half"))
    assert "reused" not in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "models/half_image")
    assert manifest.precision == "fp16"


def test_islands_of_a_graph_without_fp16_are_refused():
    with pytest.raises(InputError, match="islands are of fp16 only"):
        config(Path(), find_islands=True)


def test_below_the_gate_nothing_is_published_and_what_was_served_stays(
    tiny_spec, tmp_path, monkeypatch
):
    export(config(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    tolerance = parity_report.Tolerance(
        min_cosine=1.1,
        max_difference=0,
        top1_agreement=1,
        max_batch_difference=0,
        max_top1_lost=0,
    )
    monkeypatch.setitem(parity_report.TOLERANCES, "fp32", tolerance)
    for name in ("shop", "new"):
        with pytest.raises(ParityError, match="Nothing was published"):
            export(config(tmp_path, name=name))
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # What was measured of those that were refused is kept beside what an export reuses.
    added = {tmp_path / "cache" / f"failed-{name}.json" for name in ("shop", "new")}
    assert after.keys() - before.keys() == added
    assert {path: after[path] for path in before} == before


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

    @pytest.mark.parametrize(
        ("option", "path"),
        [
            ("--weights", "nowhere/clip.safetensors"),
            ("--samples", "nowhere/val"),
            ("--calibration", "nowhere/photos.csv"),
        ],
    )
    def test_what_is_not_there_is_said_not_to_be_there(self, tmp_path, option, path):
        weights = () if option == "--weights" else ("--weights", "random")
        more = ("--precision", "int8") if option == "--calibration" else ()
        found = self.run(
            *("--model", "RN26@64px", "--repository", tmp_path / "models"),
            *(*weights, option, path, *more),
        )
        assert found.returncode == 1
        assert "Traceback" not in found.stdout + found.stderr
        assert path in found.stderr
        assert "does not exist" in found.stderr or "no checkpoint file" in found.stderr

    def test_weights_of_unknown_activation_need_the_option(self, tmp_path):
        checkpoint = tmp_path / "clip.safetensors"
        save_file(tiny.make(tiny.VIT).state_dict(), checkpoint)
        found = self.run("--model", "ViT-B/32", "--weights", checkpoint)
        assert found.returncode == 1
        assert "Pass --activation quick_gelu or --activation gelu" in found.stderr
        asked = self.run("--model", "ViT-B/32", "--weights", checkpoint, "--activation", "gelu")
        assert "does not fit ViT-B/32" in asked.stderr

    def test_publishes_a_checkpoint(self, tmp_path):
        clip = random_clip(MODELS["RN26@64px"], seed=3)
        checkpoint = tmp_path / "clip.safetensors"
        save_file(clip.state_dict(), checkpoint)
        found = self.run(
            *("--model", "RN26@64px", "--weights", checkpoint, "--name", "shop-v3"),
            *("--repository", tmp_path / "models", "--precision", "fp16_weights"),
            *("--cache", tmp_path / "cache"),
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
        files = (tmp_path / "models").rglob("model.onnx")
        size_bytes = sum(path.stat().st_size for path in files)
        assert size_bytes < 40e6

    def test_errors_end_with_status_1_and_no_traceback(self, tmp_path):
        found = self.run("--model", "ViT-B/31", "--weights", "random", "--repository", tmp_path)
        assert found.returncode == 1
        assert found.stderr.startswith("error: unknown architecture 'ViT-B/31'")
        assert "Traceback" not in found.stdout + found.stderr
        assert not list(tmp_path.iterdir())


def test_failed_parity_ends_with_status_1_and_shows_the_table(
    tiny_spec, tmp_path, monkeypatch, capsys
):
    tolerance = parity_report.Tolerance(
        min_cosine=1.1,
        max_difference=0,
        top1_agreement=1,
        max_batch_difference=0,
        max_top1_lost=0,
    )
    monkeypatch.setitem(parity_report.TOLERANCES, "fp32", tolerance)
    with pytest.raises(SystemExit) as ended, command():
        export(config(tmp_path))
    printed, said = capsys.readouterr()
    assert ended.value.code == 1
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    # The worst of those that drift, and where all of them are.
    assert len(re.findall(r"drifts +[^ ]$", printed, re.MULTILINE)) == console.MAX_FAILED
    assert len(printed.splitlines()) < 50
    kept = Path(printed.split("every case: ")[1].split("\n")[0])
    assert kept.parent == tmp_path / "cache"
    assert not json.loads(kept.read_text("utf-8"))["passed"]
    assert not (tmp_path / "models").exists()
