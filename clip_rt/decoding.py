"""One image of any kind in, a Pillow image within the limits out, its pixels not yet decoded.

Nothing is fetched, guessed or executed: strings are paths, only regular files are opened, only five
decoders are offered to the bytes, and sizes are checked from the header before pixels are decoded.
No setting of Pillow is changed. A large JPEG can be told to decode to fewer pixels than it has. The
errors hold the rest of a sentence that begins with the name of the image; `images.prepare` puts it
in front.
"""

from __future__ import annotations

import io
import os
import stat
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from clip_rt.errors import ImageError, InputError

MAX_PIXELS = 64_000_000
"""Largest width x height accepted, checked before decoding; about 256 MB once decoded."""
MAX_BYTES = 32 * 1024 * 1024
"""Largest encoded image accepted; one byte more than this is the most that is read of a file."""
MAX_ASPECT_RATIO = 200
"""Long side over short side; bounds the intermediate image whose short side is the model's."""

DECODERS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
"""Pillow's decoders that bytes and files may reach, of the 40 and more that it has."""

ImageInput: TypeAlias = (
    Image.Image | str | os.PathLike[str] | bytes | bytearray | memoryview | NDArray[np.uint8]
)
"""One image: opened with Pillow, a path, an encoded file's bytes, or uint8 (H, W, 3) RGB."""

Decode: TypeAlias = Literal["exact", "fast"]
"""How JPEGs are decoded: whole, or large ones no larger than the model needs."""

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of an image, in pixels."""

BYTES_LIKE = (bytes, bytearray, memoryview)
READABLE_FORMATS = "JPEG, PNG, GIF, BMP or WebP"
# Phone photos: Pillow's JPEG decoder itself turns into this one for a file with several pictures.
_FORMATS = (*DECODERS, "MPO")


def check_decode(decode: str) -> None:
    """Refuse what is not a `Decode`.

    Raises:
        InputError: it is not.
    """
    if decode not in get_args(Decode):
        raise InputError(f"decode is {decode!r:.40}; it must be 'exact' or 'fast'.")


def open_image(image: ImageInput, *, max_pixels: int, max_bytes: int) -> Image.Image:
    """Open one image and check its size.

    Args:
        image: What a caller may pass as an image.
        max_pixels: Largest width x height.
        max_bytes: Largest encoded size.

    Returns:
        A Pillow image of any mode. A Pillow image comes back as it is.

    Raises:
        ImageError: it cannot be opened, has no area, or is over a limit. Damaged bytes may also
            raise what Pillow's decoders raise, which is nearly anything.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, max_pixels=max_pixels)
    if isinstance(image, (str, os.PathLike)):
        image = _read_file(image, max_bytes=max_bytes)
    if isinstance(image, BYTES_LIKE):
        _check_length(memoryview(image).nbytes, max_bytes=max_bytes)
        opened: Image.Image = _open_bytes(bytes(image), max_pixels=max_pixels)
    elif isinstance(image, Image.Image):
        opened = image
    else:
        raise ImageError(
            "is no image. Pass a path, an encoded file's bytes, a PIL image, or a uint8 array "
            "(height, width, 3)."
        )
    if isinstance(opened, ImageFile.ImageFile) and opened.format not in _FORMATS:
        raise ImageError(
            f"is a file opened as {opened.format}, and such decoders are not run here. "
            "Pass image.copy() if you trust the file."
        )
    _check_size(*opened.size, max_pixels=max_pixels)
    return opened


def shrink(opened: Image.Image, *, short_px: int) -> Box | None:
    """Have a JPEG decoded at an eighth, a quarter or half its size; any other image is left alone.

    libjpeg leaves out the frequencies that the smaller picture cannot show, before it turns them
    into pixels. The smallest size is taken whose short side is `short_px` or more.

    Args:
        opened: What `open_image` opened, not yet loaded. It is changed.
        short_px: Shortest side that is enough.

    Returns:
        The part of the decoded image that is the picture; libjpeg fills up the last row and column
        where its size is not divisible. None: the image is decoded whole.
    """
    if not isinstance(opened, JpegImagePlugin.JpegImageFile):
        return None
    whole = opened.size
    drafted = opened.draft(None, (short_px, short_px))
    return None if drafted is None or opened.size == whole else drafted[1]


def _check_size(width: int, height: int, *, max_pixels: int) -> None:
    short, long = sorted((width, height))
    if short < 1:
        raise ImageError(f"is {width} x {height} px and has no area. Leave it out.")
    if width * height > max_pixels:
        raise ImageError(
            f"is {width} x {height} px, {width * height:,} pixels; at most {max_pixels:,} are "
            "read. Make it smaller or raise max_pixels."
        )
    if long > MAX_ASPECT_RATIO * short:
        raise ImageError(
            f"is {width} x {height} px; the long side may be at most {MAX_ASPECT_RATIO} times the "
            "short one. Crop or pad it."
        )


def _from_array(array: NDArray[np.uint8], *, max_pixels: int) -> Image.Image:
    is_chw = array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] != 3
    if array.dtype != np.uint8:
        raise ImageError(
            f"is an array of {array.dtype}; only uint8 (height, width, 3) is read. Scale it to "
            "0..255 and convert it: (x * 255).round().astype('uint8') for values in 0..1."
        )
    if array.ndim != 3 or array.shape[2] != 3:
        way_out = (
            "Its channels come first: pass array.transpose(1, 2, 0)."
            if is_chw
            else "Pass RGB: array[..., :3] drops alpha, np.stack([grey] * 3, axis=-1) adds colour."
        )
        raise ImageError(
            f"is a uint8 array of shape {array.shape}; it must be (height, width, 3). {way_out}"
        )
    _check_size(array.shape[1], array.shape[0], max_pixels=max_pixels)
    return Image.fromarray(np.ascontiguousarray(array))


def _read_file(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes`; never waits for a pipe or a device."""
    try:
        # Before opening, because opening some devices does something; and after, because what
        # the name stands for may have changed.
        _check_file(os.stat(path), max_bytes=max_bytes)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
        try:
            _check_file(os.fstat(descriptor), max_bytes=max_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        with open(descriptor, "rb") as file:
            return file.read(max_bytes + 1)
    except ImageError:
        raise
    # ValueError: a NUL in the name, or one that the file system's encoding lacks.
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(
            f"cannot be read: {reason}. A string is the path of a file; the bytes of an image are "
            "passed as bytes, and URLs are not fetched."
        ) from error


def _check_file(status: os.stat_result, *, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("is no regular file but a folder, pipe or device. Pass an image file.")
    _check_length(status.st_size, max_bytes=max_bytes)


def _check_length(length_bytes: int, *, max_bytes: int) -> None:
    if length_bytes > max_bytes:
        raise ImageError(
            f"has {length_bytes:,} bytes or more; at most {max_bytes:,} are read. "
            "Make it smaller or raise max_bytes."
        )


def _open_bytes(encoded: bytes, *, max_pixels: int) -> ImageFile.ImageFile:
    # Pillow loads every decoder it has when it misses one of those offered, so load it here.
    from PIL import WebPImagePlugin  # noqa: F401

    if not encoded:
        raise ImageError("is empty. Leave it out.")
    try:
        return Image.open(io.BytesIO(encoded), formats=DECODERS)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"is no readable {READABLE_FORMATS}; it begins with {encoded[:12]!r}. "
            "Convert it to one of these, or check that it is complete."
        ) from error
    # Pillow's own limit, Image.MAX_IMAGE_PIXELS, which is above ours unless the caller raised it;
    # it is an error at twice that number, or where warnings are errors.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"has too many pixels: {error} At most {max_pixels:,} are read. Make it smaller."
        ) from error
