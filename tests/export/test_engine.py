"""Engines: the real compiler of TensorRT for RTX, which needs no GPU; what is missing is said."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tiny_clip as tiny
import torch
from onnx import numpy_helper

from clip_rt.errors import ExportError, InputError, ParityError
from clip_rt.specs import MODELS, find_spec
from export import engine, engine_runner
from export import trt as trt_command
from export.engine import (
    BuildOptions,
    Profile,
    build_engine,
    engine_key,
    gpu_names,
    image_profiles,
    load_runtime,
    text_lengths,
    text_profiles,
)
from export.engine_runner import count_fused
from export.graphs import ImageGraph, TextGraph
from export.onnx_writer import write_onnx
from export.pipeline import Towers
from export.precision import bake_fp16
from export.trt import TrtConfig, _place

RTX = BuildOptions(runtime="rtx", max_batch_size=16)


@pytest.fixture(scope="module")
def trt():
    return load_runtime("rtx")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp16")
    clip = tiny.make(tiny.VIT)
    for name, make in (("image", ImageGraph), ("text", TextGraph)):
        write_onnx(bake_fp16(make(clip)), clip.facts, folder / f"{name}.onnx")
    return SimpleNamespace(image=folder / "image.onnx", text=folder / "text.onnx", facts=clip.facts)


def test_both_towers_compile(trt, files, tmp_path):
    for onnx_path, profiles in (
        (files.image, image_profiles(files.facts, RTX)),
        (files.text, text_profiles(files.facts, RTX)),
    ):
        path = tmp_path / f"{onnx_path.stem}.engine"
        build_engine(onnx_path, path, profiles=profiles, options=RTX, trt=trt)
        assert path.stat().st_size > 0.5 * onnx_path.stat().st_size


def test_a_resnet_compiles_too(trt, tmp_path):
    clip = tiny.make(tiny.RESNET)
    write_onnx(bake_fp16(ImageGraph(clip)), clip.facts, tmp_path / "image.onnx")
    profiles = image_profiles(clip.facts, RTX)
    path = tmp_path / "image.engine"
    build_engine(tmp_path / "image.onnx", path, profiles=profiles, options=RTX, trt=trt)
    assert path.stat().st_size > 0


def test_a_profile_for_each_length_of_text_and_batches_of_all_sizes():
    facts = find_spec("ViT-L/14@336px").facts
    assert image_profiles(facts, RTX) == (
        Profile((1, 336, 336, 3), (8, 336, 336, 3), (16, 336, 336, 3)),
    )
    assert [profile.largest for profile in text_profiles(facts, RTX)] == [
        (16, 16),
        (16, 32),
        (16, 77),
    ]
    assert {profile.smallest[0] for profile in text_profiles(facts, RTX)} == {1}


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({"context_length": 248}, (16, 32, 77, 248)),
        ({"context_length": 24}, (16, 24)),
        ({"context_length": 64, "is_any_length_exact": False}, (64,)),
    ],
)
def test_the_longest_text_is_the_context_and_the_only_one_where_padding_counts(changes, lengths):
    assert text_lengths(replace(find_spec("ViT-B/32").facts, **changes)) == lengths


def test_a_profile_that_does_not_fit_the_network_is_an_error(trt, files, tmp_path):
    wrong = (Profile((1, 8, 8, 3), (8, 8, 8, 3), (16, 8, 8, 3)),)
    with pytest.raises(ExportError, match=r"cannot build image\.onnx"):
        build_engine(files.image, tmp_path / "x", profiles=wrong, options=RTX, trt=trt)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("damage", ["bytes", "operator", "contract"])
def test_a_damaged_graph_is_refused_in_words(trt, files, tmp_path, damage):
    path = tmp_path / "image.onnx"
    model = onnx.load(files.image)
    if damage == "operator":
        next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "NoSuchOp"
    elif damage == "contract":
        model.graph.output[0].name = "embedding"
        for node in model.graph.node:
            node.output[:] = ["embedding" if each == "embeddings" else each for each in node.output]
    content = model.SerializeToString()
    path.write_bytes(content[: len(content) // 2] if damage == "bytes" else content)
    expected = "tensor contract" if damage == "contract" else r"cannot read image\.onnx: .+"
    profiles = image_profiles(files.facts, RTX)
    with pytest.raises(ExportError, match=expected):
        build_engine(path, tmp_path / "x", profiles=profiles, options=RTX, trt=trt)


def test_gpus_to_compile_for_are_chosen_or_refused_with_the_list(trt, files, tmp_path):
    profiles = image_profiles(files.facts, RTX)
    options = BuildOptions(runtime="rtx", max_batch_size=16, compute_capabilities=("8.9",))
    path = tmp_path / "x"
    build_engine(files.image, path, profiles=profiles, options=options, trt=trt)
    assert path.stat().st_size > 0
    options = BuildOptions(runtime="rtx", compute_capabilities=("9.0",))
    with pytest.raises(InputError, match=r"not compile for 9\.0; it does for .*8\.9"):
        build_engine(files.image, path, profiles=profiles, options=options, trt=trt)


def test_what_an_engine_depends_on_is_in_its_key(trt, files):
    profiles = image_profiles(files.facts, RTX)
    key = engine_key(["a"], profiles, RTX, trt)
    assert key == engine_key(["a"], profiles, RTX, trt)
    assert key["version"] == trt.__version__
    others = (
        engine_key(["b"], profiles, RTX, trt),
        engine_key(["a"], text_profiles(files.facts, RTX), RTX, trt),
        engine_key(["a"], profiles, BuildOptions(runtime="rtx", optimization_level=5), trt),
        engine_key(["a"], profiles, RTX, SimpleNamespace(__version__="9.9")),
    )
    assert all(key != other for other in others)


def test_an_engine_is_of_one_kind_of_gpu(monkeypatch, files):
    options, trt = BuildOptions(), SimpleNamespace(__version__="11.3.0")
    keys = []
    for name in ("NVIDIA L4, 8.9", "NVIDIA L40S, 8.9"):
        monkeypatch.setattr(engine, "gpu_names", lambda name=name: [name])
        keys.append(engine_key(["a"], image_profiles(files.facts, options), options, trt))
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opt_batch_size": 65}, "within 1 and max_batch_size, 64"),
        ({"optimization_level": 6}, "must be 0 to 5"),
        ({"workspace_gib": 0.0}, "above 0"),
        ({"compute_capabilities": ("8.9",)}, "--runtime rtx only"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        BuildOptions(**options)


class TestWhatIsMissing:
    def test_without_tensorrt_the_container_command_is_told(self, monkeypatch):
        monkeypatch.setitem(engine.MODULES, "tensorrt", ("no_such_tensorrt",))
        arguments = ["--model", "ViT-L/14", "--name", "it's $HOME", "`x`"]
        monkeypatch.setattr(sys, "argv", ["trt.py", *arguments])
        with pytest.raises(ExportError) as caught:
            load_runtime("tensorrt")
        command = next(line for line in str(caught.value).splitlines() if "docker run" in line)
        assert "--gpus all" in command
        assert engine.CONTAINER in command
        # As the shell reads it, and then the shell within the container.
        inside = shlex.split(shlex.split(command)[-1])
        assert inside[-6:] == ["export.trt", *arguments]
        assert "--runtime rtx" in str(caught.value)

    def test_without_a_gpu_it_is_told_too(self, monkeypatch):
        present = SimpleNamespace(__version__="11.3.0", __name__="tensorrt")
        monkeypatch.setitem(sys.modules, "tensorrt", present)
        monkeypatch.setattr(engine, "gpu_names", list)
        with pytest.raises(ExportError, match=r"none is visible here(.|\n)*docker run"):
            load_runtime("tensorrt")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
    def test_with_a_torch_that_sees_no_gpu_it_is_told_before_any_work(self, monkeypatch):
        present = SimpleNamespace(__version__="11.3.0", __name__="tensorrt")
        monkeypatch.setitem(sys.modules, "tensorrt", present)
        monkeypatch.setattr(engine, "gpu_names", lambda: ["NVIDIA L4, 8.9"])
        with pytest.raises(ExportError, match=r"torch .* sees no GPU"):
            load_runtime("tensorrt")

    def test_an_old_one_is_refused(self, monkeypatch):
        present = SimpleNamespace(__version__="10.3.0.26", __name__="tensorrt")
        monkeypatch.setitem(sys.modules, "tensorrt", present)
        with pytest.raises(ExportError, match=r"is 10\.3\.0\.26; 10\.12 or newer"):
            load_runtime("tensorrt")

    def test_without_rtx_the_packages_are_named(self, monkeypatch):
        monkeypatch.setitem(engine.MODULES, "rtx", ("no_such_tensorrt",))
        with pytest.raises(ExportError, match="pip install tensorrt-rtx-cu12-libs"):
            load_runtime("rtx")

    def test_gpus_are_listed_or_none(self):
        assert all(re.fullmatch(r".+, \d+\.\d", each) for each in gpu_names())


def test_what_runs_engines_is_asked_for_by_its_name(trt):
    """Nothing is run where there is no GPU, but the API can be asked whether it has such names."""
    owners = {
        "_runtime": trt.Runtime,
        "_engine": trt.ICudaEngine,
        "_context": trt.IExecutionContext,
        "inspector": trt.EngineInspector,
    }
    asked = set()
    for node in ast.walk(ast.parse(Path(engine_runner.__file__).read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
            owner = getattr(node.value, "attr", None) or getattr(node.value, "id", None)
            if owner in owners:
                asked.add((owner, node.attr))
    assert len(asked) > 9
    assert [each for each in sorted(asked) if not hasattr(owners[each[0]], each[1])] == []


def test_fused_attentions_are_counted_in_what_the_inspector_says():
    text = '{"Layers": ["_gemm_mha_v2_0x1", {"Name": "__myl_Fmha_0"}, {"Name": "conv1"}, "x"]}'
    assert (count_fused(text).num_layers, count_fused(text).num_fused_attentions) == (4, 2)
    assert count_fused("{}").num_layers == 0


class TestCommand:
    """`python -m export.trt --runtime rtx`."""

    def test_builds_the_bundled_architecture_and_reuses_what_is_unchanged(self, tmp_path):
        command = [
            *(sys.executable, "-m", "export.trt", "--model", "RN26@64px", "--weights", "random"),
            *("--runtime", "rtx", "--name", "shop", "--cache", str(tmp_path / "cache")),
            *("--engines", str(tmp_path / "engines")),
        ]
        for reused in (0, 4):
            found = subprocess.run(
                command,
                cwd=Path(__file__).parents[2],
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert found.returncode == 0, found.stdout + found.stderr
            assert found.stdout.count("unchanged, reused") == reused
            assert "built, not run" in found.stdout
        made = tmp_path / "engines/shop"
        assert {path.name for path in made.iterdir()} == {
            "image.engine", "text.engine", "export.json",
        }  # fmt: skip
        facts = json.loads((made / "export.json").read_text())
        assert facts["passed"]
        assert facts["engine"].startswith("built, not run")

    def config(self, folder: Path, monkeypatch, **changes: object) -> TrtConfig:
        monkeypatch.setitem(MODELS, tiny.VIT.name, tiny.VIT)
        values = {"model": tiny.VIT.name, "weights": "random", "name": "shop", "runtime": "rtx"}
        folders = {"repository": folder / "models", "cache": folder / "c", "engines": folder / "e"}
        return TrtConfig(**{**values, **folders, **changes})

    def test_a_corrupted_graph_is_not_published(self, tmp_path, monkeypatch):
        config = self.config(tmp_path, monkeypatch)
        trt_command.export(config)
        before = (tmp_path / "e/shop/image.engine").read_bytes()
        honest = trt_command.make_onnx

        def corrupt(*args, **options):
            towers = honest(*args, **options)
            model = onnx.load(towers.image)
            weight = max(model.graph.initializer, key=lambda each: np.prod(each.dims))
            array = numpy_helper.to_array(weight).copy()
            array[::2] *= np.float16(1.5)
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))
            onnx.save(model, tmp_path / "model.onnx")
            return replace(towers, image=tmp_path / "model.onnx")

        monkeypatch.setattr(trt_command, "make_onnx", corrupt)
        with pytest.raises(ParityError, match="worst is the image tower"):
            trt_command.export(config)
        assert (tmp_path / "e/shop/image.engine").read_bytes() == before
        assert not (tmp_path / "models").exists()

    def test_a_folder_of_something_else_is_not_replaced(self, tmp_path, monkeypatch):
        (tmp_path / "e/shop").mkdir(parents=True)
        (tmp_path / "e/shop/thesis.txt").write_text("mine")
        with pytest.raises(InputError, match="holds no engines of this command"):
            trt_command.export(self.config(tmp_path, monkeypatch))
        assert (tmp_path / "e/shop/thesis.txt").read_text() == "mine"

    @pytest.mark.parametrize("failing_move", [1, 2])
    def test_a_failure_leaves_the_engines_there_were(self, tmp_path, monkeypatch, failing_move):
        folder, calls, rename = tmp_path / "engines/shop", [], Path.rename
        engines = {tower: tmp_path / tower for tower in ("image", "text")}
        for path in engines.values():
            path.write_bytes(b"first")
        _place(folder, Towers(**engines), {"run": 1})
        before = {path.name: path.read_bytes() for path in folder.iterdir()}

        def fail(path, target):
            calls.append(path)
            if len(calls) == failing_move:
                raise OSError("the disk is gone")
            return rename(path, target)

        for path in engines.values():
            path.write_bytes(b"second")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", fail)
            with pytest.raises(OSError, match="the disk is gone"):
                _place(folder, Towers(**engines), {"run": 2})
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in folder.parent.iterdir()] == ["shop"]

    def test_a_dry_run_needs_no_tensorrt(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(trt_command, "load_runtime", lambda _: pytest.fail("looked"))
        config = self.config(tmp_path, monkeypatch, runtime="tensorrt", dry_run=True)
        assert trt_command.export(config) is None
        printed = capsys.readouterr().out
        assert "texts of 16, 32, 77 tokens" in printed
        assert "on the GPU, cosine at least 0.9995" in printed
        assert not list(tmp_path.iterdir())
