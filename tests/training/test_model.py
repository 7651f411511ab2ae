"""The torch model is OpenAI's CLIP: its numbers, its names, its sizes."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import tiny_clip as tiny
import torch
from references import as_hugging_face, as_open_clip, empty_open_clip, unsettle

from clip_rt.errors import InputError
from clip_rt.specs import END_OF_TEXT, MODELS, START_OF_TEXT, ResNetSpec, ViTSpec, find_spec
from training.model import CLIP
from training.weights.load import load_clip

NUM_PARAMETERS = {
    # Of OpenAI's published checkpoints.
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
    # Of LAION's; mlfoundations/open_clip `docs/model_profile.csv` has them in millions:
    # 986.11, 1366.68 and 2539.57.
    "ViT-H/14": 986_109_441,
    "ViT-g/14": 1_366_678_273,
    "ViT-bigG/14": 2_539_567_105,
}

RESNETS = ("RN50", "RN101", "RN50x4")
VITS = ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")
"""Those whose numbers are compared; the others would not fit into a small machine's memory."""


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


@torch.no_grad()
def settle(clip: CLIP) -> None:
    """Set the statistics of batch normalisation to those of real activations.

    With any others, random weights let every image vanish on the way through a deep ResNet.
    """
    norms = [m for m in clip.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    clip.train().encode_image(pairs(clip.spec)[0])
    clip.eval()


@pytest.fixture(scope="module")
def transformers(open_clip):  # open_clip's fixture makes torchvision importable.
    return importlib.import_module("transformers")


def assert_same_embeddings(found, expected) -> None:
    """Compare (image, text) embeddings of norm 1 to 1e-5 of their largest element."""
    for tower, (found_BE, expected_BE) in enumerate(zip(found, expected, strict=True)):
        difference = (found_BE - expected_BE).abs().max() / expected_BE.abs().max()
        assert difference <= 1e-5, f"{('image', 'text')[tower]}: {difference:.2e}"
        # Vectors of different items must differ, or the comparison proves nothing.
        assert (expected_BE[0] - expected_BE[1]).abs().max() > 1e-3


def pairs(spec) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Coarse structure: noise looks the same everywhere.
    coarse = torch.randn(2, 3, 5, 5, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=spec.side_px, mode="bicubic")
    return image, random_tokens(2)


@torch.inference_mode()
def embeddings_of_open_clip(reference, image, tokens):
    return (
        reference.encode_image(image, normalize=True),
        reference.encode_text(tokens, normalize=True),
    )


@pytest.mark.parametrize(
    ("name", "activation"), [*((name, "quick_gelu") for name in RESNETS), ("RN50", "gelu")]
)
def test_resnets_equal_open_clip(open_clip, name, activation):
    spec = replace(find_spec(name), activation=activation)
    torch.manual_seed(0)
    clip = CLIP(spec)
    unsettle(clip)
    settle(clip)
    image, tokens = pairs(spec)
    with torch.inference_mode():
        found = clip(image, tokens)
    reference = as_open_clip(open_clip, clip)
    assert_same_embeddings(found, embeddings_of_open_clip(reference, image, tokens))


@pytest.mark.parametrize(
    ("name", "activation"), [*((name, "quick_gelu") for name in VITS), ("ViT-B/32", "gelu")]
)
@pytest.mark.timeout(600)
def test_vits_equal_hugging_face_and_open_clip(open_clip, transformers, name, activation, tmp_path):
    spec = replace(find_spec(name), activation=activation)
    torch.manual_seed(0)
    reference = as_hugging_face(transformers, spec)
    image, tokens = pairs(spec)
    with torch.inference_mode():
        output = reference(input_ids=tokens, pixel_values=image)
    reference.save_pretrained(tmp_path)
    del reference
    clip = load_clip(find_spec(name), tmp_path)
    assert clip.spec.activation == activation
    with torch.inference_mode():
        found = clip(image, tokens)
    assert_same_embeddings(found, (output.image_embeds, output.text_embeds))
    reference = as_open_clip(open_clip, clip)
    assert_same_embeddings(found, embeddings_of_open_clip(reference, image, tokens))


@pytest.mark.parametrize("name", [name for name in MODELS if name in NUM_PARAMETERS])
def test_architectures_have_the_published_number_of_parameters_and_open_clips_shapes(
    open_clip, name
):
    spec = find_spec(name)
    with torch.device("meta"):
        clip = CLIP(spec)
    assert sum(parameter.numel() for parameter in clip.parameters()) == NUM_PARAMETERS[name]
    reference = empty_open_clip(open_clip, spec)
    expected = {key: tensor.shape for key, tensor in reference.state_dict().items()}
    assert {key: tensor.shape for key, tensor in clip.state_dict().items()} == expected
    if isinstance(spec.image, ViTSpec):
        assert reference.visual.transformer.resblocks[0].attn.num_heads == spec.image.heads
    assert reference.transformer.resblocks[0].attn.num_heads == spec.text.heads


def test_every_architecture_is_published_or_of_this_project():
    assert set(MODELS) - set(NUM_PARAMETERS) == {"RN26@64px"}
    with torch.device("meta"):
        CLIP(MODELS["RN26@64px"])


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


def test_the_bias_of_the_sigmoid_loss_is_a_parameter_only_if_asked_for():
    assert "logit_bias" not in CLIP(tiny.VIT).state_dict()
    clip = CLIP(tiny.VIT, logit_bias=-10.0)
    assert dict(clip.named_parameters())["logit_bias"].item() == -10.0


@pytest.mark.parametrize(
    ("spec", "side_px"), [(tiny.VIT, 64), (tiny.VIT, 24), (tiny.RESNET, 96), (tiny.RESNET, 32)]
)
def test_towers_work_at_any_side_that_divides(spec, side_px):
    spec = replace(spec, side_px=side_px)
    found = CLIP(spec).encode_image(torch.randn(2, 3, side_px, side_px))
    assert found.shape == (2, spec.embedding_dim)


@pytest.mark.parametrize(("spec", "side_px"), [(tiny.VIT, 36), (tiny.VIT, 0), (tiny.RESNET, 80)])
def test_a_side_that_does_not_divide_is_refused(spec, side_px):
    with pytest.raises(InputError, match=rf"side_px is {side_px}.*multiple of"):
        CLIP(replace(spec, side_px=side_px))


class TestPatchDropout:
    @pytest.mark.parametrize(("fraction", "num_patches"), [(0.5, 8), (0.75, 4), (0.9999, 1)])
    def test_blocks_see_the_class_token_and_the_share_that_is_kept(self, fraction, num_patches):
        clip = CLIP(tiny.VIT, patch_dropout=fraction).train()
        seen = []
        clip.visual.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        image = torch.randn(2, 3, 32, 32)
        clip.encode_image(image)
        (x_BLD,) = seen
        assert x_BLD.shape[1] == 1 + num_patches
        everything = clip.visual.embed_patches(image)
        assert torch.equal(x_BLD[:, 0], everything[:, 0])
        for kept_LD, all_LD in zip(x_BLD[:, 1:], everything[:, 1:], strict=True):
            matches = (kept_LD[:, None] == all_LD[None]).all(dim=-1)
            # Each is one of the patches, and none is there twice.
            assert matches.any(dim=1).all()
            assert matches.sum(dim=0).max() == 1

    def test_every_patch_is_kept_as_often_as_any_other_and_items_differ(self):
        clip = CLIP(tiny.VIT, patch_dropout=0.5).train()
        seen = []
        clip.visual.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        image = torch.randn(1, 3, 32, 32).expand(2000, -1, -1, -1)
        with torch.no_grad():
            torch.manual_seed(0)
            clip.encode_image(image)
            all_LD = clip.visual.embed_patches(image[:1])[0, 1:]
        matches = (seen[0][:, 1:, None] - all_LD).abs().amax(dim=-1) < 1e-5
        counts = matches.sum(dim=(0, 1))
        assert counts.sum() == 2000 * 8
        assert (counts - 1000).abs().max() < 5 * 22.4  # Five standard deviations.
        assert not torch.equal(matches[0].any(dim=0), matches[1].any(dim=0))

    def test_evaluation_sees_every_patch(self):
        clip = CLIP(tiny.VIT, patch_dropout=0.5)
        plain = CLIP(tiny.VIT)
        plain.load_state_dict(clip.state_dict())
        image = torch.randn(2, 3, 32, 32)
        assert torch.equal(clip.eval().encode_image(image), plain.eval().encode_image(image))

    def test_a_resnet_has_no_patches(self):
        with pytest.raises(InputError, match=r"patch_dropout is 0\.5.*ResNet"):
            CLIP(tiny.RESNET, patch_dropout=0.5)

    @pytest.mark.parametrize("fraction", [1.0, -0.1, float("nan")])
    def test_a_share_out_of_range_is_refused(self, fraction):
        with pytest.raises(InputError, match="patch_dropout"):
            CLIP(tiny.VIT, patch_dropout=fraction)


def one_step(spec, *, grad_checkpointing, patch_dropout=0.0, compiled=False, bf16=False):
    """Gradients and buffers after one forward and backward pass from a fixed start."""
    torch.manual_seed(0)
    clip = CLIP(spec, patch_dropout=patch_dropout).train()
    unsettle(clip)
    clip.set_grad_checkpointing(grad_checkpointing)
    forward = torch.compile(clip, backend="aot_eager") if compiled else clip
    image, tokens = torch.randn(4, 3, spec.side_px, spec.side_px), random_tokens(4)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        image_BE, text_BE = forward(image, tokens)
    (image_BE @ text_BE.T).sin().sum().backward()
    grads = {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}
    return grads | dict(clip.named_buffers())


class TestGradCheckpointing:
    @pytest.mark.parametrize("bf16", [False, True])
    @pytest.mark.parametrize(
        ("spec", "patch_dropout"), [(tiny.VIT, 0.0), (tiny.VIT, 0.5), (tiny.RESNET, 0.0)]
    )
    def test_gradients_and_running_statistics_are_the_same(self, spec, patch_dropout, bf16):
        plain = one_step(spec, grad_checkpointing=False, patch_dropout=patch_dropout, bf16=bf16)
        found = one_step(spec, grad_checkpointing=True, patch_dropout=patch_dropout, bf16=bf16)
        assert found.keys() == plain.keys()
        for name, tensor in plain.items():
            torch.testing.assert_close(found[name], tensor, msg=name)

    @pytest.mark.parametrize("spec", [tiny.VIT, tiny.RESNET], ids=lambda spec: spec.name)
    def test_compiled_too(self, spec):
        plain = one_step(spec, grad_checkpointing=False)
        found = one_step(spec, grad_checkpointing=True, compiled=True)
        for name, tensor in plain.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)

    def test_compiles_together_with_patch_dropout(self):
        found = one_step(tiny.VIT, grad_checkpointing=True, patch_dropout=0.5, compiled=True)
        assert all(t.isfinite().all() for name, t in found.items() if name != "causal_mask_LL")

    @pytest.mark.parametrize("spec", [tiny.VIT, tiny.RESNET], ids=lambda spec: spec.name)
    def test_keeps_fewer_activations(self, spec):
        if isinstance(spec.image, ResNetSpec):
            spec = replace(spec, image=replace(spec.image, layers=(3, 3, 3, 3)))
        image = torch.randn(4, 3, spec.side_px, spec.side_px)
        clip = CLIP(spec).train()

        def kept_bytes() -> int:
            storages = {}

            def pack(tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = clip.encode_image(image)
            assert output.requires_grad
            return sum(storages.values())

        plain = kept_bytes()
        clip.set_grad_checkpointing(True)
        assert kept_bytes() < 0.6 * plain
        clip.set_grad_checkpointing(False)
        assert kept_bytes() == plain
