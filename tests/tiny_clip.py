"""Two CLIPs of a few thousand parameters beside the token table, for tests of the real code."""

from __future__ import annotations

from dataclasses import replace

import torch

from clip_rt.specs import ModelSpec, ResNetSpec, TextSpec, ViTSpec
from training.model import CLIP

VIT = ModelSpec(
    name="tiny-ViT",
    side_px=32,
    image=ViTSpec(patch_px=8, width=64, layers=2, heads=2),
    text=TextSpec(width=64, layers=2, heads=2),
    embedding_dim=48,
)
RESNET = replace(VIT, name="tiny-RN", side_px=64, image=ResNetSpec(layers=(1, 1, 1, 1), width=16))


def make(spec: ModelSpec, *, seed: int = 0) -> CLIP:
    """Build `spec` with random weights; normalisations are random too, so that none is idle."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIP(spec)
        with torch.no_grad():
            for module in clip.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    for scale in (module.weight, module.running_var):
                        scale.uniform_(0.5, 1.5)
                    for shift in (module.bias, module.running_mean):
                        shift.normal_(std=0.1)
                elif isinstance(module, torch.nn.LayerNorm):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(std=0.1)
    return clip.requires_grad_(False).eval()
