import pytest
import torch

from clip_rt.errors import InputError
from clip_rt.specs import ModelSpec, ResNetSpec, TextSpec, ViTSpec
from training.model import CLIP
from training.optimizer import adamw, layer_of, lock_tower, set_lr, train_unlocked

TEXT = TextSpec(width=32, layers=2, heads=2, context_length=16, vocab_size=64)
VIT = ModelSpec(
    name="tiny-vit", side_px=32, embedding_dim=16, text=TEXT,
    image=ViTSpec(patch_px=16, width=32, layers=3, heads=2),
)  # fmt: skip
RESNET = ModelSpec(
    name="tiny-resnet", side_px=32, embedding_dim=16, text=TEXT,
    image=ResNetSpec(layers=(1, 1, 1, 1), width=8),
)  # fmt: skip


def groups_by_name(model: CLIP, **options: float) -> dict[str, dict[str, float]]:
    optimizer = adamw(model, peak_lr=1.0, weight_decay=0.1, **options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_matrices_are_decayed_and_gains_biases_and_the_temperature_are_not() -> None:
    groups = groups_by_name(CLIP(VIT))
    assert groups["visual.transformer.resblocks.0.mlp.c_fc.weight"]["weight_decay"] == 0.1
    for name in ("logit_scale", "ln_final.weight", "visual.transformer.resblocks.0.mlp.c_fc.bias"):
        assert groups[name]["weight_decay"] == 0.0


def test_every_parameter_is_in_exactly_one_group() -> None:
    for spec in (VIT, RESNET):
        model = CLIP(spec)
        optimizer = adamw(model, peak_lr=1.0, weight_decay=0.1, layer_decay=0.5)
        grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_layers_further_from_the_embedding_learn_slower() -> None:
    groups = groups_by_name(CLIP(VIT), layer_decay=0.5)
    scales = {
        "visual.conv1.weight": 0.5**4, "visual.positional_embedding": 0.5**4,
        "visual.transformer.resblocks.0.attn.in_proj_weight": 0.5**3,
        "visual.transformer.resblocks.2.attn.in_proj_weight": 0.5, "visual.proj": 1.0,
        "token_embedding.weight": 0.5**3, "transformer.resblocks.1.ln_1.weight": 0.5,
        "text_projection": 1.0, "logit_scale": 1.0,
    }  # fmt: skip
    assert {name: groups[name]["lr_scale"] for name in scales} == scales
    groups = groups_by_name(CLIP(RESNET), layer_decay=0.5)
    assert groups["visual.layer4.0.conv1.weight"]["lr_scale"] == 0.5
    assert groups["visual.bn1.weight"]["lr_scale"] == 0.5**5
    assert layer_of("visual.attnpool.q_proj.weight", 5) == 5


def test_the_schedule_reaches_each_group_in_its_share() -> None:
    optimizer = adamw(CLIP(VIT), peak_lr=1.0, weight_decay=0.1, layer_decay=0.5)
    set_lr(optimizer, 0.3)
    assert all(
        group["lr"] == pytest.approx(0.3 * group["lr_scale"]) for group in optimizer.param_groups
    )


def test_a_locked_image_tower_does_not_move_not_even_its_statistics() -> None:
    torch.manual_seed(0)
    model = CLIP(RESNET)
    lock_tower(model, "image")
    train_unlocked(model, "image")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = adamw(model, peak_lr=0.1, weight_decay=0.1)
    image_BE, text_BE = model(torch.randn(4, 3, 32, 32), torch.randint(0, 64, (4, 8)))
    ((image_BE * text_BE).sum() * model.logit_scale).backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert "text_projection" in moved
    assert "logit_scale" in moved
    assert not any(name.startswith("visual.") for name in moved)


def test_a_locked_text_tower_leaves_the_image_tower_free() -> None:
    model = CLIP(VIT)
    lock_tower(model, "text")
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert free == {
        name for name, _ in model.named_parameters() if name.startswith(("visual.", "logit_"))
    }


def test_nothing_left_to_train_is_said() -> None:
    with pytest.raises(InputError, match="nothing is left to train"):
        adamw(CLIP(VIT).requires_grad_(False), peak_lr=1.0, weight_decay=0.1)
