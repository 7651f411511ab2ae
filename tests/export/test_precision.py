"""FP16 graphs: what is rounded, what is not, what overflows, and which islands help."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tiny_clip as tiny
import torch

from clip_rt.errors import CheckpointError, InputError, ParityError
from export import parity, probes
from export.graphs import ImageGraph, TextGraph
from export.islands import propose_islands
from export.onnx_writer import write_onnx
from export.precision import Fp16Arithmetic, bake_fp16, match_islands

MLP = "visual.transformer.resblocks.0.mlp"
OVERFLOW = 2.5e5
"""Enough, times the tiny model's weights, for sums beyond 65,504 out of weights below it."""


def write_fp16(clip, folder, islands=()):
    paths = {}
    for tower, make in (("image", ImageGraph), ("text", TextGraph)):
        graph = make(clip)
        baked = bake_fp16(graph, [name for name in islands if name in graph.layers()])
        paths[tower] = folder / f"{tower}.onnx"
        write_onnx(baked, clip.facts, paths[tower])
    return paths


def plant(scale):
    """Scale up what one layer adds to the residual stream."""
    clip = tiny.make(tiny.VIT)
    clip.visual.transformer.resblocks[0].mlp.c_proj.weight *= scale
    return clip


@pytest.mark.parametrize("kind", [tiny.VIT, tiny.RESNET], ids=["vit", "resnet"])
def test_both_towers_in_fp16_pass_the_gate_and_halve(kind, tmp_path, request):
    clip = tiny.make(kind)
    paths = write_fp16(clip, tmp_path)
    report = parity.check_files(clip, **paths, precision="fp16")
    # Rounding must be visible, or nothing was rounded.
    assert max(case.max_difference for case in report.cases) > 2e-5
    exported = request.getfixturevalue("exported_vit" if kind is tiny.VIT else "exported_resnet")
    for tower, path in paths.items():
        assert path.stat().st_size < 0.6 * getattr(exported, tower).stat().st_size
        onnx.checker.check_model(str(path), full_check=True)


def test_normalisations_projection_and_pixels_stay_fp32(tmp_path):
    path = write_fp16(tiny.make(tiny.VIT), tmp_path)["image"]
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    dtypes = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    dtypes |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    float32, float16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    found = {}
    for node in model.graph.node:
        found.setdefault(node.op_type, []).append(dtypes.get(node.input[0]))
    assert set(found["LayerNormalization"]) == {float32}
    assert set(found["Softmax"]) == {float16}
    # The last product is the projection to embeddings.
    products = found["MatMul"] + found.get("Gemm", [])
    assert products.count(float32) == 1
    assert len(products) > 8
    assert set(found["Sub"]) == {float32}


@pytest.mark.parametrize("make", [ImageGraph, TextGraph])
def test_emulated_fp16_arithmetic_is_that_of_onnx_runtime(make, tmp_path):
    clip = tiny.make(tiny.VIT)
    inputs = probes.images(clip.spec.side_px) if make is ImageGraph else probes.tokens(77)
    baked = bake_fp16(make(clip))
    with torch.inference_mode(), Fp16Arithmetic():
        emulated = baked(torch.from_numpy(inputs)).numpy()
    with torch.inference_mode():
        fp32 = make(clip)(torch.from_numpy(inputs)).numpy()
    write_onnx(baked, clip.facts, tmp_path / "model.onnx")
    found = parity.onnx_encoder(tmp_path / "model.onnx")(inputs)
    error = np.abs(fp32 - found).max()
    assert error > 2e-5
    assert np.abs(emulated - found).max() < 2 * error


def test_an_overflow_is_caught_by_the_gate_and_mended_by_the_islands_found(tmp_path):
    clip = plant(OVERFLOW)
    with pytest.raises(ParityError, match=r"worst is the image tower.*[1-9][0-9]* not finite"):
        parity.check_files(clip, **write_fp16(clip, tmp_path), precision="fp16")
    pixels = torch.from_numpy(probes.images(clip.spec.side_px))
    proposal = propose_islands(ImageGraph(clip), pixels, min_cosine=0.9995, progress=False)
    assert proposal.islands == (MLP,)
    assert proposal.min_cosine_without == -1
    assert proposal.min_cosine >= 0.9995
    assert next(iter(proposal.drift_by_layer)) == MLP
    islands = proposal.islands
    assert parity.check_files(clip, **write_fp16(clip, tmp_path, islands), precision="fp16").passed


def test_large_residual_streams_that_fit_pass_without_islands(tmp_path):
    clip = plant(1e4)
    assert parity.check_files(clip, **write_fp16(clip, tmp_path), precision="fp16").passed


def test_a_weight_beyond_the_range_needs_its_layer_to_be_an_island():
    clip = plant(1e8)
    with pytest.raises(CheckpointError, match=rf"{MLP}\.c_proj\.weight.*--fp32-island '{MLP}'"):
        bake_fp16(ImageGraph(clip))
    pixels = torch.from_numpy(probes.images(clip.spec.side_px))
    assert propose_islands(
        ImageGraph(clip), pixels, min_cosine=0.9995, progress=False
    ).islands == (MLP,)  # fmt: skip


def test_nothing_is_proposed_where_nothing_is_needed():
    clip = tiny.make(tiny.RESNET)
    tokens = torch.from_numpy(probes.tokens(77))
    proposal = propose_islands(TextGraph(clip), tokens, min_cosine=0.9995, progress=False)
    assert proposal.islands == ()
    assert set(proposal.drift_by_layer) == set(TextGraph(clip).layers())
    assert max(proposal.drift_by_layer.values()) > 0


def test_islands_are_named_by_patterns():
    names = ["visual.conv1", "visual.transformer.resblocks.1.mlp", MLP]
    assert match_islands(names, ["*.mlp"]) == set(names[1:])
    assert match_islands(names, ()) == set()
    with pytest.raises(InputError, match=r"no layer is called 'x'. The layers are visual\.conv1"):
        match_islands(names, ["*.mlp", "x"])


def test_baking_leaves_the_model_as_it_was():
    clip = tiny.make(tiny.RESNET)
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    bake_fp16(ImageGraph(clip))
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())


def test_the_final_projection_of_a_resnet_keeps_every_bit(exported_resnet):
    clip = exported_resnet.clip
    baked = bake_fp16(ImageGraph(clip))
    assert torch.equal(baked.visual.attnpool.c_proj.weight, clip.visual.attnpool.c_proj.weight)
    assert baked.visual.attnpool.q_proj.weight.dtype == torch.float16
