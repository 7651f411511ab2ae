"""Images of any kind in, the uint8 square that CLIP reads out; pixels are never normalised here.

Source: open_clip 3.3.0 `transform.py`, `image_transform` (which is openai/CLIP `clip/clip.py`,
`_transform`) with torchvision 0.28.0 `Resize` and `CenterCrop`. `prepare` states the deviations.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clip_rt.decoding import (
    BYTES_LIKE,
    MAX_BYTES,
    MAX_PIXELS,
    READABLE_FORMATS,
    ImageInput,
    open_image,
)
from clip_rt.errors import ImageError, InputError

MAX_SIDE_PX = 2048
"""Largest square made; more than any CLIP reads."""

Images: TypeAlias = ImageInput | Iterable[ImageInput]
"""A batch: any iterable of images; one image alone is a batch of one."""

_ORIENTATION = 0x0112
# Exif 2.3, section 4.6.4, Orientation: what undoes each value; 1 is upright already.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def preprocess(
    images: Images,
    *,
    side_px: int = 224,
    exif: bool = True,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> NDArray[np.uint8]:
    """Turn a batch of images into the array an image tower reads.

    Args:
        images: Any iterable of images, or one image. It is read once, in order.
        side_px: Side of the square the model reads; 224 for ViT-L/14.
        exif: Turn photographs upright as their EXIF orientation says.
        max_pixels: Largest width x height of one image.
        max_bytes: Largest encoded size of one image.

    Returns:
        uint8 (N, side_px, side_px, 3), RGB, not normalised. N = 0 gives an empty array.

    Raises:
        ImageError: an image cannot be used; carries its index.
        InputError: `side_px` is not a side.
    """
    squares = list(
        prepare_each(images, side_px=side_px, exif=exif, max_pixels=max_pixels, max_bytes=max_bytes)
    )
    if not squares:
        side_px = _check_side(side_px)
        return np.empty((0, side_px, side_px, 3), dtype=np.uint8)
    return np.stack(squares)


def prepare_each(
    images: Images,
    *,
    side_px: int = 224,
    exif: bool = True,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Iterator[NDArray[np.uint8]]:
    """Yield the square of each image as it is asked for, holding one at a time.

    The arguments and errors are those of `preprocess`; each item is uint8 (side_px, side_px, 3).
    The iterator ends at the first error. To go on past a bad image, loop over `iterate` and
    call `prepare`.
    """
    for index, image in enumerate(iterate(images)):
        yield prepare(
            image,
            side_px=side_px,
            exif=exif,
            index=index,
            max_pixels=max_pixels,
            max_bytes=max_bytes,
        )


def iterate(images: Images) -> Iterator[ImageInput]:
    """Iterate over a batch without looking at its items; one image alone becomes a batch of one.

    An array is one image unless it has four axes, (N, H, W, 3), or is a list of objects.

    Raises:
        ImageError: `images` is neither an image nor an ordered collection of images.
    """
    is_one = isinstance(images, (Image.Image, str, os.PathLike, *BYTES_LIKE))
    if isinstance(images, np.ndarray):
        is_one = images.ndim not in (1, 4)
    # An open file is iterable too, but line by line.
    if is_one or hasattr(images, "read"):
        return iter((cast("ImageInput", images),))
    if isinstance(images, (Mapping, Set)) or not isinstance(images, Iterable):
        raise ImageError(
            f"images is a {type(images).__name__}, which is no ordered collection of images. "
            "Pass a list or a generator."
        )
    return iter(cast("Iterable[ImageInput]", images))


def prepare(
    image: ImageInput,
    *,
    side_px: int = 224,
    exif: bool = True,
    index: int | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> NDArray[np.uint8]:
    """Resize the shortest side with Pillow's bicubic filter, crop the centre, convert to RGB.

    Equal bit for bit to open_clip's validation transform before its normalisation, except that

    * palette and 1-bit images become RGB before the resize, because Pillow would resize them
      with nearest neighbour; transparent pixels keep their palette's colour;
    * the EXIF orientation is applied, so that a photograph is seen as a person sees it; `exif`
      turns that off, and damaged EXIF counts as none;
    * 16-bit greys are scaled to 8 bits, round(value / 257); Pillow would clip them to white.
      Mode I holds 16-bit greys as well, as it does where Pillow reads and writes PNG. Floating
      point pixels have no defined range and are refused.

    Alpha is dropped after the resize and colour profiles are ignored, as open_clip does. Of an
    animation the first frame is read; of a Pillow image the frame it stands at.

    Args:
        image: One image. A Pillow image is only read; loading a lazy one is its own affair.
        side_px: Side of the square the model reads.
        exif: Turn photographs upright as their EXIF orientation says.
        index: Position in the caller's batch, for the error.
        max_pixels: Largest width x height.
        max_bytes: Largest encoded size.

    Returns:
        uint8 (side_px, side_px, 3), RGB, writable and not shared with the input.

    Raises:
        ImageError: the image cannot be read or decoded, has no area, or is over a limit.
        InputError: `side_px` is not a side.
    """
    side_px = _check_side(side_px)
    try:
        opened = open_image(image, max_pixels=max_pixels, max_bytes=max_bytes)
        opened.load()
        upright = _turn_upright(opened, exif=exif)
        return np.array(_crop_square(upright, side_px), dtype=np.uint8)
    except ImageError as error:
        message = f"{_describe(image, index)} {error}"
        raise ImageError(message, index=index) from error.__cause__
    # On damaged bytes Pillow's decoders raise nearly anything: OSError, SyntaxError, ValueError,
    # struct.error, zlib.error, EOFError, OverflowError, MemoryError, warnings made errors.
    except Exception as error:
        raise ImageError(
            f"{_describe(image, index)} cannot be decoded: {_shorten(error)}. "
            f"Check that it is complete, or save it again as {READABLE_FORMATS}.",
            index=index,
        ) from error


def _check_side(side_px: int) -> int:
    try:
        side = operator.index(side_px)
    except TypeError:
        side = 0
    if not 1 <= side <= MAX_SIDE_PX:
        raise InputError(f"side_px is {side_px!r}; it must be a whole number 1 to {MAX_SIDE_PX}.")
    return side


def _turn_upright(image: Image.Image, *, exif: bool) -> Image.Image:
    turn = None
    if exif:
        try:
            turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
        # Pillow parses EXIF from the file's own offsets; whatever goes wrong means there is none.
        except Exception:
            turn = None
    return image if turn is None else image.transpose(turn)


def _crop_square(image: Image.Image, side_px: int) -> Image.Image:
    """Do what torchvision's `Resize(side_px)` and `CenterCrop(side_px)` do, then make it RGB."""
    image = _make_resizable(image)
    width, height = image.size
    if width <= height:
        size = side_px, int(side_px * height / width)
    else:
        size = int(side_px * width / height), side_px
    image = image.resize(size, Image.Resampling.BICUBIC)
    # Half a pixel rounds to the even one, in torchvision as in Python.
    left = round((size[0] - side_px) / 2.0)
    top = round((size[1] - side_px) / 2.0)
    # Cropped before it is converted: the same pixels, and fewer of them.
    return image.crop((left, top, left + side_px, top + side_px)).convert("RGB")


def _make_resizable(image: Image.Image) -> Image.Image:
    """Leave a mode that Pillow resizes with a filter alone; convert the others."""
    mode = image.mode
    if mode == "P" and "transparency" in image.info:
        # The same pixels as at one go, without Pillow's warning about the alpha it drops.
        return image.convert("RGBA").convert("RGB")
    if mode in ("1", "P", "PA"):
        return image.convert("RGB")
    if mode == "I" or mode.startswith("I;16"):
        return _scale_grey(image)
    if mode == "F":
        raise ImageError(
            "has floating point pixels (mode F), whose range is not defined. Scale them to 0..255 "
            "and pass image.convert('L')."
        )
    return image


def _scale_grey(image: Image.Image) -> Image.Image:
    grey = np.asarray(image)
    if image.mode == "I" and not 0 <= int(grey.min()) <= int(grey.max()) <= 65535:
        raise ImageError(
            f"has greys {grey.min()} to {grey.max()} in mode I; 0 to 65535 are read. Scale them."
        )
    scaled = grey.astype(np.uint32)
    scaled += 128
    scaled //= 257
    return Image.fromarray(scaled.astype(np.uint8))


def _describe(image: object, index: int | None) -> str:
    position = "image" if index is None else f"image {index}"
    if isinstance(image, str):
        return f"{position} ({_shorten(repr(str(image)))})"
    if isinstance(image, os.PathLike):
        return f"{position} ({_shorten(repr(image))})"
    return f"{position} ({type(image).__name__})"


def _shorten(value: object, max_chars: int = 120) -> str:
    text = str(value).rstrip(".")
    return text if len(text) <= max_chars else f"{text[:max_chars]}..."
