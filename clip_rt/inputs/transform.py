"""One image of any kind in, the uint8 square a model reads out; pixels are never normalised here.

Source: open_clip 3.3.0 `transform.py`, `image_transform` (which is openai/CLIP `clip/clip.py`,
`_transform`, for CLIP's own models) with torchvision 0.28.0 `Resize` and `CenterCrop`; transformers
5.23 `image_processing_backends.py`. `prepare` states the deviations.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from clip_rt import telemetry
from clip_rt.errors import ImageError, InputError
from clip_rt.inputs.decoding import (
    MAX_BYTES,
    MAX_PIXELS,
    READABLE_FORMATS,
    Box,
    Decode,
    ImageInput,
    check_decode,
    check_limits,
    is_file,
    open_image,
    shrink,
)
from clip_rt.inputs.items import check_whole_number
from clip_rt.specs import CLIP_RESIZING, MAX_SIDE_PX, Resizing

MAX_ASPECT_RATIO = 200
"""Long side over short side that is resized whatever `max_pixels` is."""

Square: TypeAlias = NDArray[np.uint8]
"""uint8 (side_px, side_px, 3), RGB, not normalised."""

FAST_OVERSAMPLING = 1.5
"""A JPEG decoded fast has at least this many pixels for one of the square, along each side.

The filter of the resize, not libjpeg's coarser one, must have the last word. At 1 it has not, and
pixels are up to four times as far from the exact ones; at 2, photographs of 12 megapixels take a
quarter longer. `benchmarks.studies.decoding` measures all three.
"""

# Held while a Pillow image of the caller's is loaded, which one it is by its address. Reentrant,
# since loading reads a file object, which may be of anyone's making.
_loading = [threading.RLock() for _ in range(64)]

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Pillow's, by their names in `Resizing.interpolation`."""

_log = logging.getLogger("clip_rt.inputs.images")
_num_left_as_they_are = itertools.count()

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


def prepare(
    image: ImageInput,
    *,
    side_px: int = 224,
    resizing: Resizing = CLIP_RESIZING,
    exif: bool = True,
    decode: Decode = "exact",
    index: int | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> NDArray[np.uint8]:
    """Resize with Pillow's filters, crop the centre or fill the edges, convert to RGB.

    Equal bit for bit to open_clip's validation transform before its normalisation, except that

    * palette and 1-bit images become RGB before the resize, because Pillow would resize them
      with nearest neighbour; transparent pixels keep their palette's colour;
    * the EXIF orientation is applied, so that a photograph is seen as a person sees it; `exif`
      turns that off, and damaged EXIF counts as none. It is that of the stored pixels: it is
      applied to paths, bytes and files, and to what `Image.open` returned, loaded, drafted, shrunk
      in place or pickled as it may be. An image that was made from that one, by `transpose`,
      `rotate`, `copy`, `convert`, `crop` or `resize`, is its owner's and is taken as it is,
      whatever EXIF it carries: nobody can tell whether it is upright by now;
    * 16-bit greys are scaled to 8 bits, round(value / 257); Pillow would clip them to white.
      Mode I holds 16-bit greys as well, as it does where Pillow reads and writes PNG. Floating
      point pixels have no defined range and are refused.

    Alpha is dropped after the resize and colour profiles are ignored, as open_clip does. Of an
    animation the first frame is read; of a Pillow image the frame it stands at.

    With `decode="fast"`, JPEG files that are large are decoded at 1/2, 1/4 or 1/8 of their size,
    whichever leaves the shortest side at least 1.5 x `side_px`, and then resized the same way. It
    takes a fifth of the time for a photograph of 12 megapixels and is no longer exact; see
    `benchmarks.studies.decoding` for what that does to pixels, embeddings and accuracy. Smaller
    JPEGs, other formats and images opened by the caller come out as with "exact".

    Args:
        image: One image. A Pillow image is only read; loading a lazy one is its own affair. An open
            file is read from where it stands to its end, and put back there. Several threads may
            pass the same one.
        side_px: Side of the square the model reads.
        resizing: How the image becomes that square.
        exif: Turn photographs upright as their EXIF orientation says.
        decode: "exact" or "fast".
        index: Position in the caller's batch, for the error.
        max_pixels: Largest width x height; a strip longer than 200 times its width may not have
            more once it is resized, either.
        max_bytes: Largest encoded size.

    Returns:
        uint8 (side_px, side_px, 3), RGB, writable and not shared with the input.

    Raises:
        ImageError: the image cannot be read or decoded, has no area, or is over a limit.
        InputError: another argument cannot be used.
    """
    side_px = check_side(side_px)
    check_decode(decode)
    check_limits(max_pixels=max_pixels, max_bytes=max_bytes)
    resize_px = check_resizing(resizing, side_px)
    if is_square(image, side_px, resizing) and side_px**2 <= max_pixels:
        return np.array(image, dtype=np.uint8, order="C")
    try:
        with telemetry.stage("decode"):
            with _alone(image):
                opened = open_image(image, max_pixels=max_pixels, max_bytes=max_bytes)
            if resizing.mode == "shortest":
                _check_strip(*opened.size, short_px=resize_px, max_pixels=max_pixels)
            box = None
            if decode == "fast" and opened is not image:
                box = shrink(opened, short_px=math.ceil(FAST_OVERSAMPLING * resize_px))
            with _alone(image):
                opened.load()
                turn = _find_turn(opened) if exif else None
        with telemetry.stage("resize"):
            square = _make_square(opened, side_px, resizing, turn=turn, box=box)
            return np.array(square, dtype=np.uint8)
    except ImageError as error:
        raise _name_error(error, image, index) from error.__cause__
    # On damaged bytes Pillow's decoders raise nearly anything: OSError, SyntaxError, ValueError,
    # struct.error, zlib.error, EOFError, OverflowError, MemoryError, warnings made errors.
    except Exception as error:
        raise _name_error(error, image, index) from error


def open_upright(
    image: ImageInput,
    *,
    exif: bool = True,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Image.Image:
    """Return one image as a person sees it, whole: upright, RGB.

    Args:
        image: As for `prepare`; a Pillow image is only read.
        exif: Turn a photograph upright as its EXIF orientation says.
        max_pixels: Largest width x height.
        max_bytes: Largest encoded size.

    Raises:
        ImageError: see `prepare`.
    """
    try:
        with telemetry.stage("decode"), _alone(image):
            opened = open_image(image, max_pixels=max_pixels, max_bytes=max_bytes)
            opened.load()
            turn = _find_turn(opened) if exif else None
        return _turn(_make_resizable(opened), turn).convert("RGB")
    except ImageError as error:
        raise _name_error(error, image, None) from error.__cause__
    # As above.
    except Exception as error:
        raise _name_error(error, image, None) from error


def _name_error(error: Exception, image: ImageInput, index: int | None) -> ImageError:
    """Return an error that begins with what the image is."""
    if isinstance(error, ImageError):
        return ImageError(f"{describe(image, index)} {error}", index=index)
    return ImageError(
        f"{describe(image, index)} cannot be decoded: {_shorten(error)}. "
        f"Check that it is complete, or save it again as {READABLE_FORMATS}.",
        index=index,
    )


def check_side(side_px: int) -> int:
    """Return the side of a square as a number.

    Raises:
        InputError: it is none, or too large.
    """
    return check_whole_number(side_px, "side_px", most=MAX_SIDE_PX)


def check_resizing(resizing: Resizing, side_px: int) -> int:
    """Return the length that images are resized to.

    Raises:
        InputError: there would be nothing to crop.
    """
    resize_px = resizing.resize_px or side_px
    if resize_px < side_px:
        raise InputError(
            f"images are resized to {resize_px} px, and {side_px} px are cropped of them. Resize "
            f"them to {side_px} px at least."
        )
    return resize_px


def is_square(image: object, side_px: int, resizing: Resizing = CLIP_RESIZING) -> bool:
    """Whether there is nothing to do; resizing to the same size would change no pixel either."""
    return (
        resizing.resize_px in (None, side_px)
        and isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.shape == (side_px, side_px, 3)
    )


def _check_strip(width: int, height: int, *, short_px: int, max_pixels: int) -> None:
    """Bound the image whose shortest side becomes `short_px`, of which only the centre is kept."""
    short, long = sorted((width, height))
    num_pixels = short_px * int(short_px * long / short)
    if long > MAX_ASPECT_RATIO * short and num_pixels > max_pixels:
        raise ImageError(
            f"is {width} x {height} px; with its short side resized to {short_px} it has "
            f"{num_pixels:,} pixels, and at most {max_pixels:,} are made. Crop or pad it, or raise "
            "max_pixels=."
        )


def _alone(image: ImageInput) -> contextlib.AbstractContextManager[object]:
    """Let only one thread at a time read what the caller has opened, and may pass to several.

    Pillow loads pixels and EXIF when they are first asked for, and two threads that both do so
    damage each other's. A file has one position.
    """
    if isinstance(image, Image.Image) or is_file(image):
        return _loading[id(image) // 64 % len(_loading)]
    return contextlib.nullcontext()


def _begin_anew() -> None:
    """Forget the parent's locks in a forked child, where they may be held."""
    _loading[:] = [threading.RLock() for _ in _loading]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _find_turn(image: Image.Image) -> Image.Transpose | None:
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    # Pillow parses EXIF from the file's own offsets; whatever goes wrong means there is none.
    except Exception:
        return None
    # Pillow gives every image that it makes from another one the EXIF of that one.
    if turn is None or isinstance(image, ImageFile.ImageFile):
        return turn
    if next(_num_left_as_they_are) == 0:
        _log.warning(
            "an image that was made from an opened one still carries its EXIF orientation. It is "
            "taken as it is: it may be upright by now. If not, pass what Image.open returned, the "
            "file itself, or ImageOps.exif_transpose(image). Others are not reported."
        )
    return None


def _make_square(
    image: Image.Image,
    side_px: int,
    resizing: Resizing,
    *,
    turn: Image.Transpose | None,
    box: Box | None,
) -> Image.Image:
    """Do what torchvision's `Resize` and `CenterCrop` do, then make it RGB.

    Args:
        image: As it was decoded.
        side_px: Side of the square.
        resizing: How it is made.
        turn: What makes it upright.
        box: The part of it that is the picture; None is all of it.
    """
    image = _make_resizable(image)
    if box is None:
        # Turned first: after the resize it would be the same but for a rounding.
        image = _resize(_turn(image, turn), side_px, resizing, None)
    else:
        image = _turn(_resize(image, side_px, resizing, box), turn)
    if resizing.mode == "longest":
        return _fill_square(image, side_px, resizing.fill)
    left = _begin_crop(image.width - side_px, resizing)
    top = _begin_crop(image.height - side_px, resizing)
    # Cropped before it is converted: the same pixels, and fewer of them.
    return image.crop((left, top, left + side_px, top + side_px)).convert("RGB")


def _resize(image: Image.Image, side_px: int, resizing: Resizing, box: Box | None) -> Image.Image:
    width, height = image.size if box is None else box[2:]
    length_px = resizing.resize_px or side_px
    if resizing.mode == "squash":
        size = length_px, length_px
    elif resizing.mode == "longest":
        ratio = max(width, height) / side_px
        size = max(1, round(width / ratio)), max(1, round(height / ratio))
    elif width <= height:
        size = length_px, int(length_px * height / width)
    else:
        size = int(length_px * width / height), length_px
    return image.resize(size, FILTERS[resizing.interpolation], box)


def _begin_crop(num_left_out: int, resizing: Resizing) -> int:
    # Python rounds half a pixel to the even one, as torchvision does.
    return round(num_left_out / 2) if resizing.crop_rounding == "even" else num_left_out // 2


def _fill_square(image: Image.Image, side_px: int, fill: tuple[int, int, int]) -> Image.Image:
    square = Image.new("RGB", (side_px, side_px), fill)
    square.paste(
        image.convert("RGB"), ((side_px - image.width) // 2, (side_px - image.height) // 2)
    )
    return square


def _turn(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


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


def describe(image: object, index: int | None) -> str:
    """Return what an `ImageError` about an image begins with."""
    position = "image" if index is None else f"image {index}"
    if isinstance(image, str):
        return f"{position} ({_shorten(repr(str(image)))})"
    if isinstance(image, os.PathLike):
        return f"{position} ({_shorten(repr(image))})"
    return f"{position} ({type(image).__name__})"


def _shorten(value: object, max_chars: int = 120) -> str:
    text = str(value).rstrip(".")
    return text if len(text) <= max_chars else f"{text[:max_chars]}..."
