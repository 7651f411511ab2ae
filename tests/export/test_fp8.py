"""FP8 image towers: what is quantised, what it costs, and that TensorRT's compiler takes them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import external_models
import onnx
import pytest
import tiny_clip as tiny
from exported import export_towers
from onnx import numpy_helper

from clip_rt.embedded.bundled import find_sample
from clip_rt.errors import ExportError, InputError, ParityError
from clip_rt.specs import MODELS, ViTSpec
from clip_rt.wire.manifest import Manifest
from export import fp8, half, parity, probes
from export.engine import BuildOptions, check_fp8
from export.parity_report import TOLERANCES, tower_precision
from export.trt import TrtConfig, export

OPENMOJI = find_sample() / "styles/openmoji.tar"
RANDOM = {"model": "ViT-B/32", "weights": "random"}
# Wide enough that an embedding sums many products, as those of real models do.
WIDE = replace(tiny.VIT, name="wide-ViT", image=ViTSpec(patch_px=8, width=256, layers=3, heads=4))


@pytest.fixture(scope="module")
def tower(exported_wide, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "image.onnx"
    images = [row[None] for row in probes.images(WIDE.side_px)]
    fp8.write_fp8(exported_wide.image, images, path)
    assert [each.name for each in path.parent.iterdir()] == ["image.onnx"]
    return path


@pytest.fixture(scope="module")
def exported_wide(tmp_path_factory):
    return export_towers(tiny.make(WIDE), tmp_path_factory.mktemp("wide"))


def test_products_are_fp8_but_for_the_first_and_the_last(tower):
    graph = onnx.load(tower).graph
    made = {name: node for node in graph.node for name in node.output}
    types = {each.name: each.data_type for each in graph.initializer}

    def is_fp8(name: str) -> bool:
        node = made.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return node is not None and node.op_type == "Transpose" and is_fp8(node.input[0])
        return types[node.input[2]] == onnx.TensorProto.FLOAT8E4M3FN

    products = [node for node in graph.node if node.op_type in half.PRODUCTS]
    quantised = [node for node in products if all(map(is_fp8, node.input[:2]))]
    # Four of each block's layers, and in both whole blocks the two products of attention.
    assert len(quantised) >= 2 * 6
    assert products[0].op_type == "Conv"
    assert products[0] not in quantised
    assert products[-1] not in quantised
    attention = [
        node for node in quantised if not any(each in types for each in _sources(made, node))
    ]
    assert len(attention) == 2 * 2
    # The residual stream is not.
    sums = {name for node in graph.node if node.op_type == "Add" for name in node.output}
    blocks = {name for name in sums if _is_residual(made, name)}
    quantisers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert blocks
    assert not blocks.intersection(node.input[0] for node in quantisers)


def test_attention_may_stay_fp16(exported_wide, tower, tmp_path):
    path = tmp_path / "image.onnx"
    images = [row[None] for row in probes.images(WIDE.side_px)]
    fp8.write_fp8(exported_wide.image, images, path, has_fp8_attention=False)
    with_it, without = (
        sum(node.op_type == "QuantizeLinear" for node in onnx.load(file).graph.node)
        for file in (tower, path)
    )
    # Four operands in each of two blocks; the last attends from one token, which is no product.
    assert with_it - without == 2 * 4


def _sources(made, node):
    """Return what quantisers of a product's operands read, behind transposes."""
    for name in node.input[:2]:
        while name in made and made[name].op_type in (
            "DequantizeLinear",
            "QuantizeLinear",
            "Transpose",
            "Cast",
        ):
            name = made[name].input[0]
        yield name


def _is_residual(made, name):
    return any(made[each].op_type == "Add" for each in made[name].input if each in made)


def test_the_gate_measures_it_and_refuses_ranges_that_do_not_fit(exported_wide, tower, tmp_path):
    def check(image: Path):
        return parity.check_files(
            exported_wide.clip, image=image, text=exported_wide.text, precision="fp8"
        )

    report = check(tower)
    cosines = [case.min_cosine for case in report.cases if case.tower == "image"]
    assert 0.995 <= min(cosines) < 0.9999
    model = onnx.load(tower)
    scales = {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    activations = [
        each for each in model.graph.initializer if each.name in scales and not each.dims
    ]
    assert activations
    for each in activations:
        array = numpy_helper.to_array(each)
        each.CopyFrom(numpy_helper.from_array((array / 256).astype(array.dtype), each.name))
    onnx.save(model, tmp_path / "image.onnx")
    with pytest.raises(ParityError, match="worst is the image tower"):
        check(tmp_path / "image.onnx")


def test_the_text_tower_is_held_to_the_tolerance_of_fp16():
    assert (tower_precision("fp8", "image"), tower_precision("fp8", "text")) == ("fp8", "fp16")
    assert tower_precision("int8", "text") == "int8"
    assert TOLERANCES["fp8"].min_cosine < TOLERANCES["fp16"].min_cosine


def config(tmp_path, **changes) -> TrtConfig:
    places = {"cache": tmp_path / "cache", "engines": tmp_path / "engines"}
    values = {"name": "shop", "runtime": "rtx", "precision": "fp8", "weights": "random"}
    return TrtConfig(**{**values, **places, **changes})


def test_engines_compile_and_the_manifest_says_what_made_them(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, WIDE.name, WIDE)
    report = export(config(tmp_path, model=WIDE.name))
    assert report.precision == "fp8"
    made = json.loads((tmp_path / "engines/shop/export.json").read_text())
    manifest = Manifest.from_parameters(made["manifest"], served="shop")
    assert manifest.precision == "fp8"
    assert manifest.libraries["modelopt"] == fp8.library_versions()["modelopt"]
    assert manifest.canary["min_cosine"] == TOLERANCES["fp8"].min_cosine
    images = [case for case in report.cases if case.tower == "image"]
    texts = [case for case in report.cases if case.tower == "text"]
    assert (
        min(case.min_cosine for case in texts) > 0.99999 > max(case.min_cosine for case in images)
    )


@pytest.mark.torch
@pytest.mark.usefixtures("open_clip")
def test_a_siglip_of_another_library_is_calibrated_on_given_images(tmp_path):
    folder = external_models.write_open_clip(
        tmp_path / "siglip",
        tokenizer=external_models.sentencepiece_bpe(),
        text={"no_causal_mask": True, "pool_type": "last"},
        vision={"width": 256, "head_width": 64, "layers": 3},
        bias=-10.0,
    )
    report = export(
        config(
            tmp_path,
            model=f"open_clip:{folder}",
            weights="openai",
            calibration=(OPENMOJI,),
            samples=(OPENMOJI,),
            num_images=32,
        )
    )
    assert report.passed
    assert report.choices[0].num_images == 32


def test_a_resnet_is_refused(exported_resnet, tmp_path):
    images = [row[None] for row in probes.images(exported_resnet.clip.spec.side_px)]
    with pytest.raises(InputError, match="convolutions, and FP8 is for vision transformers"):
        fp8.write_fp8(exported_resnet.image, images, tmp_path / "image.onnx")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "clip.safetensors"}, "fp8 needs --calibration"),
        ({"find_islands": True}, "islands are of fp16 only"),
        ({"precision": "fp16", "calibration": (OPENMOJI,)}, "only fp8 is calibrated"),
    ],
)
def test_what_it_needs_is_said_before_any_work(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        config(tmp_path, **RANDOM | changes)


@pytest.mark.parametrize(("target", "has_fp8"), [("8.6", False), ("8.9", True), ("12.0", True)])
def test_gpus_without_fp8_are_refused(target, has_fp8):
    options = BuildOptions(runtime="rtx", compute_capabilities=(target,))
    if has_fp8:
        check_fp8(options)
        return
    with pytest.raises(InputError, match=r"8\.6 have no FP8; those of 8\.9 and newer"):
        check_fp8(options)


def test_without_modelopt_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelopt", None)
    monkeypatch.setitem(sys.modules, "modelopt.onnx", None)
    with pytest.raises(ExportError, match=r"ModelOpt.*pip install 'clip-rt\[fp8\]'"):
        fp8.library_versions()


def test_a_dry_run_tells_what_is_calibrated_on_what(tmp_path, capsys):
    plan = config(tmp_path, **RANDOM, dry_run=True, calibration=(Path("photos"),))
    assert export(plan) is None
    printed = capsys.readouterr().out
    assert "FP8, calibrated on photos" in printed
    assert "cosine at least 0.995" in printed
    assert not list(tmp_path.iterdir())


def test_it_prints_nothing_of_its_own(exported_wide, tmp_path):
    script = (
        "import sys; from pathlib import Path; from export import fp8, probes\n"
        "rows = [row[None] for row in probes.images(int(sys.argv[3]))]\n"
        "fp8.write_fp8(Path(sys.argv[1]), rows, Path(sys.argv[2]))\n"
    )
    arguments = [str(exported_wide.image), str(tmp_path / "image.onnx"), str(WIDE.side_px)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(fp8.__file__).parents[1],
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
