"""Random changes of hand: what a drawing may look like without ceasing to be what it is.

Works on whole batches of RGBA drawings with torch, so that a machine with few cores keeps up.
Nothing is mirrored or turned far: left arrows and letters would change their names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from clip_rt.specs import CLIP_MEAN, CLIP_STD, Channels

_LUMA = (0.299, 0.587, 0.114)


class Dice:
    """Random numbers for some rows of a batch.

    They are drawn for all rows, so that a row gets the same ones wherever the batch is split.
    """

    def __init__(
        self, generator: torch.Generator, *, batch_size: int, rows: slice = slice(None)
    ) -> None:
        self._generator = generator
        self._batch_size = batch_size
        self._rows = rows

    def rand(self, *shape: int) -> Tensor:
        """Draw from [0, 1); float32 (B, *shape)."""
        return torch.rand(self._batch_size, *shape, generator=self._generator)[self._rows]

    def randn(self, *shape: int) -> Tensor:
        """Draw from the normal distribution; float32 (B, *shape)."""
        return torch.randn(self._batch_size, *shape, generator=self._generator)[self._rows]

    def uniform(self, low: float, high: float) -> Tensor:
        """Draw from [low, high); float32 (B,)."""
        return self.rand() * (high - low) + low

    def chance(self, probability: float) -> Tensor:
        """Be true with a probability; bool (B, 1, 1, 1)."""
        return (self.rand() < probability)[:, None, None, None]


def _affine(rgba_BCSS: Tensor, dice: Dice) -> Tensor:
    """Rotate by up to 15 degrees, scale each axis, shear and shift."""
    count = len(rgba_BCSS)
    angle = dice.uniform(-15, 15) * (math.pi / 180)
    zoom = dice.uniform(0.9, 1.45)
    stretch = dice.uniform(0.87, 1.15)
    shear = dice.uniform(-0.15, 0.15)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = zoom * stretch * angle.cos()
    theta[:, 0, 1] = zoom * (shear - angle.sin())
    theta[:, 1, 0] = zoom * angle.sin()
    theta[:, 1, 1] = zoom / stretch * angle.cos()
    room = (zoom - 0.8).clamp(min=0.05)
    theta[:, 0, 2] = dice.uniform(-1, 1) * room * 0.6
    theta[:, 1, 2] = dice.uniform(-1, 1) * room * 0.6
    grid = functional.affine_grid(theta, list(rgba_BCSS.shape), align_corners=False)
    return functional.grid_sample(rgba_BCSS, grid, align_corners=False)


def _embolden(rgba_BCSS: Tensor, dice: Dice) -> Tensor:
    """Thicken the strokes of some one-colour drawings."""
    thick = functional.max_pool2d(rgba_BCSS[:, 3:], 3, stride=1, padding=1)
    alpha = torch.where(dice.chance(0.15), thick, rgba_BCSS[:, 3:])
    return torch.cat([rgba_BCSS[:, :3], alpha], dim=1)


def _recolour(rgb_BCSS: Tensor, dice: Dice) -> Tensor:
    """Turn the hue a little, change saturation, contrast and brightness; drain some to grey."""
    luma = torch.tensor(_LUMA)[None, :, None, None]
    grey = (rgb_BCSS * luma).sum(dim=1, keepdim=True)
    saturation = dice.uniform(0.4, 1.6)[:, None, None, None]
    saturation = saturation.masked_fill(dice.chance(0.1), 0.0)
    rgb = grey + saturation * (rgb_BCSS - grey)
    mix = torch.eye(3)[None] + 0.08 * dice.randn(3, 3)
    mix = mix / mix.sum(dim=2, keepdim=True)  # whites and greys stay what they are
    rgb = torch.einsum("bij,bjhw->bihw", mix, rgb)
    contrast = dice.uniform(0.7, 1.3)[:, None, None, None]
    brightness = dice.uniform(-0.12, 0.12)[:, None, None, None]
    return ((rgb - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


def _restyle(rgb_BCSS: Tensor, dice: Dice, probability: float) -> Tensor:
    """Pass some pictures through a random convolution, mixed with what they were.

    It changes colours, edges and textures and keeps shapes, so that what a thing is called does not
    come to depend on them.

    Source: Xu et al. 2021, "Robust and Generalizable Visual Representation Learning via Random
    Convolutions", the mixing variant. Kernels of 1, 3 and 5 pixels.
    """
    kernel_BCCKK = dice.randn(3, 3, 5, 5)
    width = dice.rand()
    share_B111 = dice.rand()[:, None, None, None]
    rows = dice.chance(probability).flatten().nonzero().flatten()
    if not len(rows):
        return rgb_BCSS
    # A smaller kernel is the middle of a large one.
    distance_K = torch.arange(5).sub(2).abs()
    distance_KK = torch.maximum(distance_K[:, None], distance_K[None, :])
    reach_B = (3 * width[rows]).long()
    inside = (distance_KK <= reach_B[:, None, None]).float()
    kernel = kernel_BCCKK[rows] * inside[:, None, None]
    kernel = kernel / (3 * inside.sum(dim=(1, 2))).sqrt()[:, None, None, None, None]
    # One by one: in a batch the last bits of a picture would depend on how many others there are.
    mixed = torch.stack(
        [
            functional.conv2d(centred_CSS, each_CCKK, padding=2) + 0.5
            for centred_CSS, each_CCKK in zip(rgb_BCSS[rows] - 0.5, kernel, strict=True)
        ]
    )
    share = share_B111[rows]
    restyled = rgb_BCSS.clone()
    restyled[rows] = (share * rgb_BCSS[rows] + (1 - share) * mixed).clamp(0, 1)
    return restyled


def _paper(dice: Dice) -> Tensor:
    """Choose a background for each drawing: mostly white, some light, a few dark."""
    kind = dice.rand(1)
    colour = dice.rand(3)
    light, dark = 1 - 0.35 * colour, 0.3 * colour
    paper = torch.where(kind < 0.6, torch.ones(()), torch.where(kind < 0.88, light, dark))
    return paper[:, :, None, None]


def _ink(paper_BC11: Tensor, dice: Dice) -> Tensor:
    """Choose a colour that stands out from the paper; black on white more often than not."""
    colour = dice.rand(3, 1, 1)
    colour = colour.masked_fill(dice.chance(0.5), 0.0)
    luma = torch.tensor(_LUMA)[None, :, None, None]
    dark_paper = (paper_BC11 * luma).sum(dim=1, keepdim=True) < 0.5
    return torch.where(dark_paper, 1 - 0.5 * colour, 0.7 * colour)


def augment(
    rgba_BSSC: Tensor, palette_B: Tensor, dice: Dice, *, random_convolutions: float = 0.2
) -> Tensor:
    """Redraw each picture at random.

    Args:
        rgba_BSSC: uint8 (B, S, S, 4) drawings on nothing.
        palette_B: bool (B,); which have colours of their own. The others are re-inked in one.
        dice: Source of all randomness, of as many rows.
        random_convolutions: Share of the pictures that go through one.

    Returns:
        float32 (B, 3, S, S) as the image tower takes them: mean and std applied.
    """
    rgba = rgba_BSSC.permute(0, 3, 1, 2).float().div_(255)
    # Colour premultiplied by alpha: edges do not bleed the colour of what is transparent.
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    one_colour = ~palette_B[:, None, None, None]
    rgba = _affine(torch.where(one_colour, _embolden(rgba, dice), rgba), dice)
    alpha = rgba[:, 3:].clamp(0, 1)
    paper = _paper(dice)
    coloured = _recolour(rgba[:, :3] + (1 - alpha) * paper, dice)
    inked = _ink(paper, dice) * alpha + (1 - alpha) * paper
    image = torch.where(one_colour, inked, coloured)
    inverted = dice.chance(0.05)
    image = torch.where(inverted, 1 - image, image)
    return normalise(_restyle(image, dice, random_convolutions))


def normalise(image_BCSS: Tensor, mean: Channels = CLIP_MEAN, std: Channels = CLIP_STD) -> Tensor:
    """Apply mean and standard deviation, CLIP's where none are given, to images in [0, 1]."""
    mean_C11, std_C11 = (torch.tensor(each)[:, None, None] for each in (mean, std))
    return (image_BCSS - mean_C11) / std_C11
