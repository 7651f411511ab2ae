"""One image of any kind in, a Pillow image within the limits out, its pixels not yet decoded.

Nothing is fetched, guessed or executed: strings are paths, only regular files are opened, only five
decoders are offered to the bytes, and sizes are checked from the header before pixels are decoded.
Files that the caller has opened are read from where they stand, and put back there. No setting of
Pillow is changed; its own limit of pixels gives way to `max_pixels`. A large JPEG can be told to
decode to fewer pixels than it has. The errors hold the rest of a sentence that begins with the name
of the image; `images.prepare` puts it in front.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import numbers
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from clip_rt.errors import ImageError, InputError
from clip_rt.inputs.items import count_axes

MAX_PIXELS = 64_000_000
"""Largest width x height accepted, checked before decoding; about 256 MB once decoded."""
MAX_BYTES = 32 * 1024 * 1024
"""Largest encoded image accepted; one byte more than this is the most that is read of a file."""

PART_BYTES = 1024**2
"""Read at a time."""

DECODERS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
"""Pillow's decoders that bytes and files may reach, of the 40 and more that it has."""


class BinaryFile(Protocol):
    """An open file, or what stands for one: BytesIO, an upload of a web framework."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""


class ArrayLike(Protocol):
    """What gives itself as a NumPy array: a torch tensor in the machine's memory, a JAX array."""

    def __array__(self) -> NDArray[Any]:
        """Return it."""


ImageInput: TypeAlias = (
    Image.Image
    | str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | NDArray[np.uint8]
    | BinaryFile
    | ArrayLike
)
"""One image: opened with Pillow, a path, an encoded file or its bytes, or uint8 (H, W, 3) RGB."""

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


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large an image may be; also the part of a command's options that says so."""

    max_pixels: int = MAX_PIXELS
    """Largest width x height of an image, read from its header."""
    max_bytes: int = MAX_BYTES
    """Largest encoded size of an image."""

    def __post_init__(self) -> None:
        """Refuse what bounds nothing; see `check_limits`."""
        check_limits(max_pixels=self.max_pixels, max_bytes=self.max_bytes)


def check_limits(*, max_pixels: int, max_bytes: int) -> None:
    """Refuse what bounds nothing.

    Raises:
        InputError: one is no number from 1.
    """
    for name, limit in (("max_pixels", max_pixels), ("max_bytes", max_bytes)):
        if not (isinstance(limit, numbers.Real) and limit >= 1):
            raise InputError(f"{name} is {limit!r:.40}; it must be a number from 1.")


DEFAULT_LIMITS = Limits()


def is_file(image: object) -> bool:
    """Whether it is to be read, as an open file is; it may be iterated over too, line by line."""
    return not isinstance(image, (type, Image.Image, os.PathLike)) and callable(
        getattr(image, "read", None)
    )


def is_array_like(image: object) -> bool:
    """Whether it is no NumPy array, and gives itself as one with an axis or more."""
    ways = ("__array__", "__array_interface__", "__dlpack__")
    return (
        not isinstance(image, (np.ndarray, type, Image.Image))
        and any(hasattr(image, way) for way in ways)
        and bool(count_axes(image))
    )


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
    opened: Image.Image
    if isinstance(image, np.ndarray):
        return _from_array(image, max_pixels=max_pixels)
    if isinstance(image, (str, os.PathLike)):
        image = read_path(image, max_bytes=max_bytes)
    if isinstance(image, BYTES_LIKE):
        check_length(memoryview(image).nbytes, max_bytes=max_bytes)
        opened = _open_bytes(bytes(image), max_pixels=max_pixels)
    elif isinstance(image, Image.Image):
        opened = image
    elif is_file(image):
        opened = _open_file(image, max_pixels=max_pixels, max_bytes=max_bytes)
    elif is_array_like(image):
        array, is_tensor = _to_array(image), hasattr(image, "permute")
        return _from_array(array, max_pixels=max_pixels, is_tensor=is_tensor)
    else:
        raise ImageError(f"is no image. Pass {_describe_way(image)}.")
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
    if min(width, height) < 1:
        raise ImageError(f"is {width} x {height} px and has no area. Leave it out.")
    if width * height > max_pixels:
        raise ImageError(
            f"is {width} x {height} px, {width * height:,} pixels; at most {max_pixels:,} are "
            "read. Make it smaller or raise max_pixels=."
        )


def _from_array(
    array: NDArray[np.uint8], *, max_pixels: int, is_tensor: bool = False
) -> Image.Image:
    is_chw = array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] != 3
    turned = "tensor.permute(1, 2, 0)" if is_tensor else "array.transpose(1, 2, 0)"
    if array.dtype != np.uint8:
        as_uint8 = "(x * 255).round().byte()" if is_tensor else "(x * 255).round().astype('uint8')"
        raise ImageError(
            f"is an array of {array.dtype}; only uint8 (height, width, 3) is read. Scale it to "
            f"0..255 and convert it: {as_uint8} for values in 0..1."
            + (f" And its channels come first: {turned}." if is_chw else "")
        )
    if array.ndim != 3 or array.shape[2] != 3:
        if is_chw:
            way_out = f"Its channels come first: pass {turned}."
        elif array.ndim == 1:
            way_out = "If these are the bytes of a file, pass array.tobytes()."
        elif array.ndim == 4:
            way_out = "It is a batch: pass it in place of the list, or its images one by one."
        else:
            way_out = (
                "Pass RGB: array[..., :3] drops alpha, np.stack([grey] * 3, axis=-1) adds colour."
            )
        raise ImageError(
            f"is a uint8 array of shape {array.shape}; it must be (height, width, 3). {way_out}"
        )
    _check_size(array.shape[1], array.shape[0], max_pixels=max_pixels)
    return Image.fromarray(np.ascontiguousarray(array))


def _to_array(image: Any) -> NDArray[Any]:
    try:
        if hasattr(image, "__array__") or hasattr(image, "__array_interface__"):
            return np.asarray(image)
        return np.from_dlpack(image)
    # On a GPU, of a type that NumPy lacks, or part of a graph: each library has its own error.
    except Exception as error:
        raise ImageError(
            f"cannot be taken as a NumPy array: {str(error)[:120]} Pass uint8 values in this "
            "machine's memory: tensor.detach().cpu().byte().numpy() of torch, array.get() of CuPy."
        ) from error


def _describe_way(image: object) -> str:
    """Say what to pass in place of what is no image."""
    if callable(getattr(image, "read_bytes", None)):
        return "what its .read_bytes() returns"
    if isinstance(getattr(image, "content", None), bytes):
        return "its .content"
    return (
        "a path, an encoded file or its bytes, a PIL image, or a uint8 array or tensor "
        "(height, width, 3)"
    )


def _open_file(file: Any, *, max_pixels: int, max_bytes: int) -> ImageFile.ImageFile:
    """Read a file that the caller has opened, from where it stands, and put it back there."""
    position: int | None = None
    try:
        if file.seekable():
            position = file.tell()
    # A stream that cannot say so is read once.
    except Exception:
        position = None
    try:
        encoded = _read_stream(file, max_bytes=max_bytes)
    finally:
        if position is not None:
            file.seek(position)
    rewind = (
        f" It was read from byte {position:,}, where the file stood; .seek(0) goes to its start."
        if position
        else ""
    )
    if not encoded:
        raise ImageError(f"has nothing to read, empty or at its end.{rewind or ' Leave it out.'}")
    check_length(len(encoded), max_bytes=max_bytes)
    try:
        return _open_bytes(encoded, max_pixels=max_pixels)
    except ImageError as error:
        raise ImageError(f"{error}{rewind}") from error.__cause__


def _read_stream(file: Any, *, max_bytes: int) -> bytes:
    """Read to the end, or one byte more than `max_bytes`."""
    is_text = ImageError(
        "is open as text; an image is bytes. Open the file in mode 'rb', or pass its path."
    )
    is_async = ImageError(
        "is read asynchronously. Pass what it holds, await file.read(), or an upload's file.file."
    )
    if isinstance(file, io.TextIOBase):
        raise is_text
    if inspect.iscoroutinefunction(file.read):
        raise is_async
    parts = []
    try:
        for part in _read_parts(file, max_bytes=max_bytes):
            if isinstance(part, str):
                raise is_text
            if inspect.isawaitable(part):
                getattr(part, "close", lambda: None)()
                raise is_async
            parts.append(bytes(part))
    except ImageError:
        raise
    except UnicodeDecodeError as error:
        raise is_text from error
    # Whatever it is that is open.
    except Exception as error:
        raise ImageError(
            f"cannot be read: {str(error)[:120]} Pass its bytes, what .read() returns."
        ) from error
    return b"".join(parts)


def read_path(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes`; never waits for a pipe or a device.

    Raises:
        ImageError: it is none, or cannot be read; the rest of a sentence that begins with its name.
    """
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
            return b"".join(_read_parts(file, max_bytes=max_bytes))
    except ImageError:
        raise
    # ValueError: a NUL in the name, or one that the file system's encoding lacks.
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(
            f"cannot be read: {reason}. A string is the path of a file; the bytes of an image are "
            "passed as bytes, and URLs are not fetched."
        ) from error


def _read_parts(file: Any, *, max_bytes: float) -> Iterator[Any]:
    """Read to the end, or one byte more than `max_bytes`, without room for all of that."""
    left_bytes = max_bytes + 1
    while left_bytes > 0 and (part := file.read(int(min(left_bytes, PART_BYTES)))):
        yield part
        left_bytes -= len(part)


def _check_file(status: os.stat_result, *, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("is no regular file but a folder, pipe or device. Pass an image file.")
    check_length(status.st_size, max_bytes=max_bytes)


def check_length(length_bytes: int, *, max_bytes: int) -> None:
    """Refuse an encoded image that is too large.

    Raises:
        ImageError: it is; the rest of a sentence that begins with its name.
    """
    if length_bytes > max_bytes:
        raise ImageError(
            f"has {length_bytes:,} bytes or more; at most {max_bytes:,} are read. "
            "Make it smaller or raise max_bytes=."
        )


def _open_bytes(encoded: bytes, *, max_pixels: float) -> ImageFile.ImageFile:
    if not encoded:
        raise ImageError("is empty. Leave it out.")
    try:
        return _identify(encoded)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"is no readable {READABLE_FORMATS}; it begins with {encoded[:12]!r}. "
            "Convert it to one of these, or check that it is complete."
        ) from error
    # The WebP decoder asks for Pillow's own limit before there is an image.
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"has too many pixels: {error} At most {max_pixels:,} are read. Make it smaller or "
            "raise max_pixels=, and PIL.Image.MAX_IMAGE_PIXELS too."
        ) from error


def _identify(encoded: bytes) -> ImageFile.ImageFile:
    """Do what `Image.open` does but for its limit of pixels: `_check_size` has the caller's."""
    # Pillow loads every decoder it has when it misses one of those offered, so load it here.
    from PIL import WebPImagePlugin  # noqa: F401

    Image.preinit()
    for name in DECODERS:
        make, accepts = Image.OPEN[name]
        is_accepted = accepts is None or accepts(encoded[:16])
        # A string says why a decoder is not there.
        if not is_accepted or isinstance(is_accepted, str):
            continue
        # What Pillow takes for another format, too.
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
            return make(io.BytesIO(encoded), "")
    raise UnidentifiedImageError("none of the decoders takes it")
