"""Adapted weights are those open_clip would have made, and a change of colours changes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_clip as tiny
import torch
from safetensors.torch import save_file

from clip_rt.errors import CheckpointError, InputError
from clip_rt.specs import CLIP_MEAN, CLIP_STD
from training.weights.adapt import read_our_colours, resize_image_positions, resize_text_positions
from training.weights.load import load_clip

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit") / "clip.safetensors"
    save_file(tiny.make(tiny.VIT).state_dict(), path)
    return path


@pytest.mark.parametrize("cells", [2, 3, 5, 7, 8])
def test_image_positions_are_resized_as_open_clip_does(open_clip, cells):
    positions = torch.randn(1 + 5 * 5, 24)
    state_dict = {"visual.positional_embedding": positions}
    model = SimpleNamespace(visual=SimpleNamespace(grid_size=(cells, cells)))
    open_clip.model.resize_pos_embed(state_dict, model)
    found = resize_image_positions(positions, 1 + cells * cells)
    expected = state_dict["visual.positional_embedding"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [8, 32, 76, 77, 128])
def test_text_positions_are_resized_as_open_clip_does(open_clip, length):
    positions = torch.randn(77, 24)
    state_dict = {"positional_embedding": positions}
    model = SimpleNamespace(positional_embedding=torch.empty(length, 24))
    open_clip.model.resize_text_pos_embed(state_dict, model)
    found = resize_text_positions(positions, length)
    torch.testing.assert_close(found, state_dict["positional_embedding"], rtol=0, atol=1e-6)


def test_positions_that_are_no_square_are_refused():
    with pytest.raises(CheckpointError, match="one more than a square"):
        resize_image_positions(torch.zeros(1 + 6, 4), 1 + 9)


def test_a_checkpoint_loads_at_another_side_and_context_on_request(checkpoint):
    clip = load_clip(tiny.VIT, checkpoint, side_px=48, context_length=20)
    assert (clip.spec.side_px, clip.spec.text.context_length) == (48, 20)
    original = tiny.make(tiny.VIT)
    expected = resize_image_positions(original.visual.positional_embedding, 1 + 6 * 6)
    assert torch.equal(clip.visual.positional_embedding, expected)
    assert torch.equal(clip.visual.proj, original.visual.proj)
    tokens = torch.tensor([[49406, 320, 49407, *[0] * 17]])
    image_BE, text_BE = clip(torch.randn(1, 3, 48, 48), tokens)
    assert image_BE.isfinite().all()
    assert text_BE.isfinite().all()


def test_attention_pooling_of_a_resnet_is_resized(tmp_path):
    original = tiny.make(tiny.RESNET)
    save_file(original.state_dict(), tmp_path / "clip.safetensors")
    clip = load_clip(tiny.RESNET, tmp_path / "clip.safetensors", side_px=128)
    expected = resize_image_positions(original.visual.attnpool.positional_embedding, 1 + 4 * 4)
    assert torch.equal(clip.visual.attnpool.positional_embedding, expected)
    assert clip.encode_image(torch.randn(2, 3, 128, 128)).isfinite().all()


def test_asking_for_what_is_there_changes_nothing(checkpoint):
    plain = load_clip(tiny.VIT, checkpoint).state_dict()
    asked = load_clip(tiny.VIT, checkpoint, side_px=32, context_length=77).state_dict()
    assert all(torch.equal(asked[name], tensor) for name, tensor in plain.items())


def test_positions_are_never_resized_unasked(checkpoint, tmp_path):
    larger = load_clip(tiny.VIT, checkpoint, side_px=48)
    save_file(larger.state_dict(), tmp_path / "larger.safetensors")
    with pytest.raises(CheckpointError, match=r"positional_embedding \(37, 64\).*Ask for the side"):
        load_clip(tiny.VIT, tmp_path / "larger.safetensors")
    # A request for the text does not cover the image.
    with pytest.raises(CheckpointError, match=r"positional_embedding \(37, 64\)"):
        load_clip(tiny.VIT, tmp_path / "larger.safetensors", context_length=20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"side_px": 36}, "side_px is 36"), ({"context_length": 0}, "context_length is 0")],
)
def test_sizes_that_cannot_be_are_refused(checkpoint, arguments, message):
    with pytest.raises(InputError, match=message):
        load_clip(tiny.VIT, checkpoint, **arguments)


@torch.inference_mode()
def test_rewritten_weights_see_the_same_image_through_other_colours():
    clip = tiny.make(tiny.VIT)
    pixels = torch.rand(4, 3, 32, 32)

    def normalise(mean, std):
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    expected = clip.encode_image(normalise(MEAN, STD))
    unchanged = clip.encode_image(normalise(CLIP_MEAN, CLIP_STD))
    clip.load_state_dict(read_our_colours(clip.state_dict(), MEAN, STD))
    found = clip.encode_image(normalise(CLIP_MEAN, CLIP_STD))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (unchanged - expected).abs().max() > 1e-2 * expected.abs().max()


def test_a_resnet_cannot_be_rewritten_for_other_colours():
    with pytest.raises(CheckpointError, match="a ResNet cannot be rewritten"):
        read_our_colours(tiny.make(tiny.RESNET).state_dict(), MEAN, STD)
