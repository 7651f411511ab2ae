"""Random changes of hand: what a drawing may look like without ceasing to be what it is.

Works on whole batches of RGBA drawings with torch, so that a machine with few cores keeps up.
Nothing is mirrored or turned far: left arrows and letters would change their names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from clip_rt.specs import CLIP_MEAN, CLIP_STD

_LUMA = (0.299, 0.587, 0.114)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def _chance(count: int, probability: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(count, generator=generator) < probability)[:, None, None, None]


def _affine(rgba_BCSS: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 15 degrees, scale each axis, shear and shift."""
    count = len(rgba_BCSS)
    angle = _uniform(count, -15, 15, generator) * (math.pi / 180)
    zoom = _uniform(count, 0.9, 1.45, generator)
    stretch = _uniform(count, 0.87, 1.15, generator)
    shear = _uniform(count, -0.15, 0.15, generator)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = zoom * stretch * angle.cos()
    theta[:, 0, 1] = zoom * (shear - angle.sin())
    theta[:, 1, 0] = zoom * angle.sin()
    theta[:, 1, 1] = zoom / stretch * angle.cos()
    room = (zoom - 0.8).clamp(min=0.05)
    theta[:, 0, 2] = _uniform(count, -1, 1, generator) * room * 0.6
    theta[:, 1, 2] = _uniform(count, -1, 1, generator) * room * 0.6
    grid = functional.affine_grid(theta, list(rgba_BCSS.shape), align_corners=False)
    return functional.grid_sample(rgba_BCSS, grid, align_corners=False)


def _embolden(rgba_BCSS: Tensor, generator: torch.Generator) -> Tensor:
    """Thicken the strokes of some one-colour drawings."""
    thick = functional.max_pool2d(rgba_BCSS[:, 3:], 3, stride=1, padding=1)
    alpha = torch.where(_chance(len(rgba_BCSS), 0.15, generator), thick, rgba_BCSS[:, 3:])
    return torch.cat([rgba_BCSS[:, :3], alpha], dim=1)


def _recolour(rgb_BCSS: Tensor, generator: torch.Generator) -> Tensor:
    """Turn the hue a little, change saturation, contrast and brightness; drain some to grey."""
    count = len(rgb_BCSS)
    luma = torch.tensor(_LUMA)[None, :, None, None]
    grey = (rgb_BCSS * luma).sum(dim=1, keepdim=True)
    saturation = _uniform(count, 0.4, 1.6, generator)[:, None, None, None]
    saturation = saturation.masked_fill(_chance(count, 0.1, generator), 0.0)
    rgb = grey + saturation * (rgb_BCSS - grey)
    mix = torch.eye(3)[None] + 0.08 * torch.randn(count, 3, 3, generator=generator)
    mix = mix / mix.sum(dim=2, keepdim=True)  # whites and greys stay what they are
    rgb = torch.einsum("bij,bjhw->bihw", mix, rgb)
    contrast = _uniform(count, 0.7, 1.3, generator)[:, None, None, None]
    brightness = _uniform(count, -0.12, 0.12, generator)[:, None, None, None]
    return ((rgb - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


def _paper(count: int, generator: torch.Generator) -> Tensor:
    """Choose a background for each drawing: mostly white, some light, a few dark."""
    kind = torch.rand(count, 1, generator=generator)
    colour = torch.rand(count, 3, generator=generator)
    light, dark = 1 - 0.35 * colour, 0.3 * colour
    paper = torch.where(kind < 0.6, torch.ones(()), torch.where(kind < 0.88, light, dark))
    return paper[:, :, None, None]


def _ink(paper_BC11: Tensor, generator: torch.Generator) -> Tensor:
    """Choose a colour that stands out from the paper; black on white more often than not."""
    count = len(paper_BC11)
    colour = torch.rand(count, 3, 1, 1, generator=generator)
    colour = colour.masked_fill(_chance(count, 0.5, generator), 0.0)
    luma = torch.tensor(_LUMA)[None, :, None, None]
    dark_paper = (paper_BC11 * luma).sum(dim=1, keepdim=True) < 0.5
    return torch.where(dark_paper, 1 - 0.5 * colour, 0.7 * colour)


def augment(rgba_BSSC: Tensor, palette_B: Tensor, generator: torch.Generator) -> Tensor:
    """Redraw each picture at random.

    Args:
        rgba_BSSC: uint8 (B, S, S, 4) drawings on nothing.
        palette_B: bool (B,); which have colours of their own. The others are re-inked in one.
        generator: Source of all randomness, so that a run can be repeated.

    Returns:
        float32 (B, 3, S, S) as the image tower takes them: mean and std applied.
    """
    rgba = rgba_BSSC.permute(0, 3, 1, 2).float().div_(255)
    # Colour premultiplied by alpha: edges do not bleed the colour of what is transparent.
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    one_colour = ~palette_B[:, None, None, None]
    rgba = _affine(torch.where(one_colour, _embolden(rgba, generator), rgba), generator)
    alpha = rgba[:, 3:].clamp(0, 1)
    paper = _paper(len(rgba), generator)
    coloured = _recolour(rgba[:, :3] + (1 - alpha) * paper, generator)
    inked = _ink(paper, generator) * alpha + (1 - alpha) * paper
    image = torch.where(one_colour, inked, coloured)
    inverted = _chance(len(image), 0.05, generator)
    image = torch.where(inverted, 1 - image, image)
    return normalise(image)


def normalise(image_BCSS: Tensor) -> Tensor:
    """Apply CLIP's mean and standard deviation to float images in [0, 1]."""
    mean = torch.tensor(CLIP_MEAN)[None, :, None, None]
    std = torch.tensor(CLIP_STD)[None, :, None, None]
    return (image_BCSS - mean) / std
