"""The torch model is OpenAI's CLIP: its numbers, its names, its sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_clip as tiny
import torch

from clip_rt.specs import END_OF_TEXT, MODELS, START_OF_TEXT, find_spec
from training.model import CLIP

NUM_PARAMETERS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
}
"""Of OpenAI's published checkpoints."""

REFERENCES = {
    "ViT-B-32-quickgelu": ("ViT-B/32", "quick_gelu"),
    "ViT-B-32": ("ViT-B/32", "gelu"),
    "RN50-quickgelu": ("RN50", "quick_gelu"),
}
"""Our architecture and activation by open_clip's name for the same model."""


@pytest.fixture(scope="module")
def tiny_clip():
    return tiny.make(tiny.VIT)


def random_tokens(num_texts: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    tokens = np.zeros((num_texts, 77), np.int64)
    for row, length in enumerate(rng.integers(1, 75, num_texts)):
        tokens[row, 0] = START_OF_TEXT
        tokens[row, 1 : 1 + length] = rng.integers(1, START_OF_TEXT, length)
        tokens[row, 1 + length] = END_OF_TEXT
    return torch.from_numpy(tokens)


@pytest.fixture(scope="module", params=REFERENCES.items(), ids=REFERENCES)
def pair(request, open_clip):
    """Our model and open_clip's, with the same random weights."""
    reference_name, (name, activation) = request.param
    torch.manual_seed(0)
    reference = open_clip.create_model(reference_name).eval()
    # Fresh residual branches of a ResNet are multiplied by zero, and would hide any mistake.
    for key, tensor in reference.state_dict().items():
        if "bn" in key or "downsample.1" in key:
            if key.endswith(("weight", "running_var")):
                tensor.uniform_(0.5, 1.0)
            elif key.endswith(("bias", "running_mean")):
                tensor.normal_(std=0.1)
    with torch.device("meta"):
        clip = CLIP(replace(find_spec(name), activation=activation))
    clip.load_state_dict(reference.state_dict(), strict=True, assign=True)
    clip.causal_mask_LL = reference.attn_mask.clone()
    return clip.eval(), reference


@torch.inference_mode()
def test_image_tower_equals_open_clip(pair):
    clip, reference = pair
    image = torch.randn(2, 3, clip.spec.side_px, clip.spec.side_px)
    found, expected = clip.encode_image(image), reference.encode_image(image)
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_text_tower_equals_open_clip(pair):
    clip, reference = pair
    tokens = random_tokens(3)
    found, expected = clip.encode_text(tokens), reference.encode_text(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_published_architectures_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        clip = CLIP(find_spec(name))
    assert sum(parameter.numel() for parameter in clip.parameters()) == NUM_PARAMETERS[name]


def test_every_architecture_can_be_built():
    for spec in MODELS.values():
        with torch.device("meta"):
            CLIP(spec)


@torch.inference_mode()
def test_cutting_after_the_last_end_of_text_changes_nothing(tiny_clip):
    tokens = random_tokens(8)
    longest = int((tokens == END_OF_TEXT).int().argmax(dim=1).max()) + 1
    torch.testing.assert_close(
        tiny_clip.encode_text(tokens[:, :longest]), tiny_clip.encode_text(tokens), rtol=0, atol=1e-6
    )


@torch.inference_mode()
def test_what_stands_after_the_first_end_of_text_is_not_read(tiny_clip):
    tokens = random_tokens(8)
    end = (tokens == END_OF_TEXT).int().argmax(dim=1, keepdim=True)
    padded = torch.where(torch.arange(77) > end, END_OF_TEXT, tokens)
    torch.testing.assert_close(
        tiny_clip.encode_text(padded), tiny_clip.encode_text(tokens), rtol=0, atol=1e-6
    )


@torch.inference_mode()
def test_forward_normalises_both_towers(tiny_clip):
    side = tiny_clip.spec.side_px
    image_BE, text_BE = tiny_clip(torch.randn(4, 3, side, side), random_tokens(4))
    for embeddings_BE in (image_BE, text_BE):
        torch.testing.assert_close(embeddings_BE.norm(dim=1), torch.ones(4))


def test_temperature_is_clamped_to_the_range_of_the_paper(tiny_clip):
    saved = tiny_clip.logit_scale.detach().clone()
    for value in (9.0, -1.0):
        tiny_clip.logit_scale.data.fill_(value)
        tiny_clip.clamp_logit_scale()
        assert 1.0 <= float(tiny_clip.logit_scale.exp()) <= 100.001
    tiny_clip.logit_scale.data.copy_(saved)
