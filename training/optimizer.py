"""A model in, its AdamW out: what is decayed, what is locked, what learns slower."""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor, nn

from clip_rt.errors import InputError
from clip_rt.specs import Tower
from training.dual_encoder import SCALARS, DualEncoder

Lock = Literal["none", "image", "text"]

_RESNET_STAGE = re.compile(r"visual\.layer(\d)\.")
_BLOCK = re.compile(r"\b(?:resblocks|layers?|blocks?|stages)\.(\d+)\.")
_POOLING = re.compile(r"attn_?pool")
_BELOW_BLOCKS = re.compile(
    r"embed|class_|cls_token|\bconv[123]\.|\bbn[123]\.|(?:ln|norm)_pre|pre_|stem"
)
"""Our names and those of open_clip, timm and transformers."""


class AdamW(torch.optim.AdamW):
    """An AdamW that can be told on the device to leave everything as it is."""

    # What torch.amp.GradScaler sets, and the fused kernels read.
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def step_unless(self, is_skipped: Tensor) -> None:
        """Make a step; where `is_skipped`, a bool () on the device of the weights, make none.

        The host need not know which.
        """
        self.found_inf = is_skipped.float()
        self.step()
        self.found_inf = None


def adamw(
    model: DualEncoder, *, peak_lr: float, weight_decay: float, layer_decay: float = 1.0
) -> AdamW:
    """Make AdamW with the betas of the paper's table 18.

    Args:
        model: A dual encoder; parameters that take no gradient are left out.
        peak_lr: Learning rate of the parameters nearest to the embeddings.
        weight_decay: Of matrices; gains, biases and the temperature are not decayed.
        layer_decay: Factor on the learning rate for every layer further from the embeddings
            (BEiT, Bao et al. 2021, appendix); 1 is the same rate for all.

    Returns:
        The optimiser; each of its groups carries `lr_scale`, the factor on the scheduled rate.
    """
    tops = count_layers(model)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            tower = model.tower_of(name)
            top = 0 if tower is None else tops[tower]
            lr_scale = layer_decay ** (top - layer_of(name, top))
            # Scalars by themselves: they stay whole where FSDP shards the others.
            groups.setdefault((decay, lr_scale, parameter.ndim == 0), []).append(parameter)
    if not groups:
        raise InputError("every parameter of the model is locked; nothing is left to train.")
    return AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr_scale": lr_scale}
            for (decay, lr_scale, _), parameters in groups.items()
        ],
        lr=peak_lr,
        betas=(0.9, 0.98),
        eps=1e-6,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """Give each group its share of the scheduled learning rate, a number or float32 ()."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def lock_tower(model: DualEncoder, lock: Lock) -> None:
    """Freeze one tower, so that the other learns to read or to be read by it (LiT, Zhai 2022).

    The temperature stays free. Call `train_unlocked` where `model.train()` would be called.
    """
    for name, parameter in model.named_parameters():
        tower = model.tower_of(name)
        parameter.requires_grad_(tower not in (None, lock) or name in SCALARS)


def train_unlocked(model: DualEncoder, lock: Lock) -> None:
    """Put the model into training mode, but a locked tower into evaluation mode.

    Or its batch normalisation would go on following the data, and patches and neurons be dropped.
    """
    model.train()
    if lock != "none":
        for module in model.tower_modules(lock):
            module.eval()


def count_layers(model: DualEncoder) -> dict[Tower, int]:
    """Count the layers of each tower, the embeddings below them being layer 0."""
    tops: dict[Tower, int] = {"image": 0, "text": 0}
    for name, _ in model.named_parameters():
        if (tower := model.tower_of(name)) is None:
            continue
        if match := _BLOCK.search(name):
            tops[tower] = max(tops[tower], int(match[1]) + 2)
        elif match := _RESNET_STAGE.search(name):
            tops[tower] = max(tops[tower], int(match[1]) + 1)
    return tops


def layer_of(name: str, top: int) -> int:
    """Say how far up its tower a parameter is: 0 at the input, `top` at the embedding."""
    if match := _BLOCK.search(name):
        return int(match[1]) + 1
    if match := _RESNET_STAGE.search(name):
        return int(match[1])
    is_below = _BELOW_BLOCKS.search(name) and not _POOLING.search(name)
    return 0 if is_below else top
