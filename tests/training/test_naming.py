"""Every published naming of the same weights loads as the same weights."""

from __future__ import annotations

import importlib

import pytest
import tiny_clip as tiny
import torch
from references import as_hugging_face
from safetensors.torch import save_file

from clip_rt.errors import CheckpointError
from training.weights.load import load_clip
from training.weights.naming import to_openai_names


@pytest.fixture(scope="module")
def clip():
    return tiny.make(tiny.VIT)


@pytest.fixture(scope="module")
def hugging_face(open_clip):  # open_clip's fixture makes torchvision importable.
    torch.manual_seed(0)
    return as_hugging_face(importlib.import_module("transformers"), tiny.VIT)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_custom_text_clip_of_open_clip(open_clip, clip, tmp_path):
    image, text = tiny.VIT.image, tiny.VIT.text
    reference = open_clip.CustomTextCLIP(
        embed_dim=tiny.VIT.embedding_dim,
        vision_cfg={"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
        text_cfg={"width": text.width, "heads": text.heads, "layers": text.layers},
        quick_gelu=True,
        init_logit_bias=-10,
    ).eval()
    assert image.heads == 2
    assert "text.transformer.resblocks.0.ln_1.weight" in reference.state_dict()
    save_file(reference.state_dict(), tmp_path / "clip.safetensors")
    loaded = load_clip(tiny.VIT, tmp_path / "clip.safetensors")
    assert loaded.logit_bias.item() == -10
    tokens = torch.tensor([[49406, 320, 49407, *[0] * 74], [49406, 1125, 49407, *[0] * 74]])
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.encode_text(tokens), reference.encode_text(tokens))
        torch.testing.assert_close(loaded.encode_image(pixels), reference.encode_image(pixels))


def test_hugging_face_names_become_exactly_ours(hugging_face, clip):
    renamed = to_openai_names(hugging_face.state_dict())
    assert {n: t.shape for n, t in renamed.items()} == {
        n: t.shape for n, t in clip.state_dict().items()
    }


def test_position_ids_of_older_files_are_ignored(hugging_face):
    extra = {
        f"{tower}_model.embeddings.position_ids": torch.arange(77) for tower in ("text", "vision")
    }
    expected = to_openai_names(hugging_face.state_dict())
    assert_equal(to_openai_names(hugging_face.state_dict() | extra), expected)


def test_a_missing_projection_of_hugging_face_is_listed(hugging_face, tmp_path):
    tensors = dict(hugging_face.state_dict())
    del tensors["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_clip(tiny.VIT, tmp_path / "clip.safetensors")
    assert "Missing: visual.transformer.resblocks.1.attn.in_proj_weight." in str(caught.value)
    assert "visual.transformer.resblocks.1.attn.q_proj.weight" in str(caught.value)


@pytest.mark.parametrize(
    "wrap",
    [
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "_fsdp_wrapped_module.{}",
    ],
)
def test_prefixes_of_wrappers_are_removed(clip, wrap):
    wrapped = {wrap.format(name): tensor for name, tensor in clip.state_dict().items()}
    assert_equal(to_openai_names(wrapped), clip.state_dict())


def test_wrappers_inside_a_name_are_removed(clip):
    name = "visual.transformer.resblocks.0.ln_1.weight"
    wrapped = "visual._orig_mod.transformer.resblocks.0._checkpoint_wrapped_module.ln_1.weight"
    assert to_openai_names({wrapped: torch.ones(1)}).keys() == {name}


def test_a_name_that_stands_twice_is_refused():
    with pytest.raises(CheckpointError, match=r"holds 'ln_final\.bias' twice"):
        to_openai_names({"ln_final.bias": torch.ones(1), "module.ln_final.bias": torch.zeros(1)})
