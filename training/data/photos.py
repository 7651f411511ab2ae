"""An image of any kind in, a random crop of it out, as CLIP and open_clip train: uint8, RGB.

Evaluation never comes here: it uses `clip_rt.preprocess`, as serving does.

Source: torchvision 0.28.0 `RandomResizedCrop.get_params` and `ColorJitter` for what is drawn, with
the defaults of open_clip 3.3.0 `transform.py` (`AugmentationCfg`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from clip_rt.errors import ImageError, InputError
from clip_rt.inputs.decoding import DEFAULT_LIMITS, Limits, open_image

_CROP_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class PhotoAugmentation:
    """What may happen to a photograph. The defaults are a crop of nearly all, and nothing else."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Least and largest share of the area that is kept."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width over height of what is kept."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Largest change of brightness, contrast, saturation (as factors) and hue (turns, to 0.5)."""
    jitter_probability: float = 1.0
    """Of changing colours at all; without effect while `jitter` is zero."""
    grey_probability: float = 0.0
    """Of losing all colour."""
    flip_probability: float = 0.0
    """Of being mirrored; captions that say left or right, and letters, become wrong."""
    limits: Limits = DEFAULT_LIMITS
    """How large an image may be."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"scale is {self.scale}; it must rise within 0 and 1.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(f"ratio is {self.ratio}; it must rise from above 0.")
        if not (min(self.jitter) >= 0 and max(self.jitter[:3]) <= 1 and self.jitter[3] <= 0.5):
            raise InputError(f"jitter is {self.jitter}; it must be within 0 and 1, hue 0.5.")
        for name in ("jitter_probability", "grey_probability", "flip_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be within 0 and 1.")

    def __call__(
        self, image: bytes | Path, *, side_px: int, rng: np.random.Generator
    ) -> NDArray[np.uint8]:
        """Decode, crop, resize and recolour one image; uint8 (side_px, side_px, 3), RGB.

        Raises:
            ImageError: it cannot be decoded or is over a limit of `clip_rt.inputs.decoding`.
        """
        upright = decode(image, self.limits)
        box = random_box(*upright.size, scale=self.scale, ratio=self.ratio, rng=rng)
        # Cropped before it is resized, so that no pixel outside bleeds in.
        square = upright.crop(box).resize((side_px, side_px), Image.Resampling.BICUBIC)
        square = square.convert("RGB")
        if rng.random() < self.flip_probability:
            square = ImageOps.mirror(square)
        if any(self.jitter) and rng.random() < self.jitter_probability:
            square = jitter_colours(square, self.jitter, rng)
        if rng.random() < self.grey_probability:
            square = square.convert("L").convert("RGB")
        return np.array(square, dtype=np.uint8)


def decode(image: bytes | Path, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Open an image within the limits, turn it upright, make it a mode that resizes smoothly.

    The same as `clip_rt.preprocess` does before it resizes; a test holds the two together.

    Raises:
        ImageError: it cannot be decoded or is over a limit.
    """
    try:
        opened = open_image(image, max_pixels=limits.max_pixels, max_bytes=limits.max_bytes)
        opened.load()
        try:
            upright = ImageOps.exif_transpose(opened)
        except Exception:  # damaged EXIF counts as none
            upright = opened
        return _make_resizable(upright)
    except ImageError:
        raise
    # On damaged bytes Pillow's decoders raise nearly anything.
    except Exception as error:
        raise ImageError(f"cannot be decoded: {str(error)[:120]}") from error


def _make_resizable(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    if image.mode in ("1", "P", "PA"):
        return image.convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray(((grey.clip(0, 65535) + 128) // 257).astype(np.uint8))
    return image


def random_box(
    width: int,
    height: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draw the part of an image to keep: (left, top, right, bottom) in pixels.

    Area uniform in `scale`, logarithm of width over height uniform in `ratio`, place uniform. After
    ten that do not fit: the largest part in the middle whose ratio is within bounds.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        kept_width = round(math.sqrt(area * aspect))
        kept_height = round(math.sqrt(area / aspect))
        if 0 < kept_width <= width and 0 < kept_height <= height:
            left = int(rng.integers(width - kept_width + 1))
            top = int(rng.integers(height - kept_height + 1))
            return left, top, left + kept_width, top + kept_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    kept_width = min(width, max(1, round(height * aspect)))
    kept_height = min(height, max(1, round(width / aspect)))
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return left, top, left + kept_width, top + kept_height


def jitter_colours(
    image: Image.Image, jitter: tuple[float, float, float, float], rng: np.random.Generator
) -> Image.Image:
    """Change brightness, contrast, saturation and hue, in random order."""
    brightness, contrast, saturation, hue = jitter
    changes: list[Callable[[Image.Image], Image.Image]] = []
    turn = rng.uniform(-hue, hue)
    for enhance, strength in (
        (ImageEnhance.Brightness, brightness),
        (ImageEnhance.Contrast, contrast),
        (ImageEnhance.Color, saturation),
    ):
        factor = rng.uniform(1 - strength, 1 + strength)
        if strength:
            changes.append(partial(_enhance, enhance, factor))
    if hue:
        changes.append(partial(_turn_hue, turn))
    for number in rng.permutation(len(changes)):
        image = changes[number](image)
    return image


def _enhance(
    enhance: Callable[[Image.Image], ImageEnhance._Enhance], factor: float, image: Image.Image
) -> Image.Image:
    return enhance(image).enhance(factor)


def _turn_hue(turns: float, image: Image.Image) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int16) + round(turns * 255)) % 256
    return Image.merge(
        "HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)
    ).convert("RGB")
