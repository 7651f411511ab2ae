"""Images of any kind in, the uint8 square that CLIP reads out; pixels are never normalised here.

One image at a time, or a stream of them on several threads.

Source: open_clip 3.3.0 `transform.py`, `image_transform` (which is openai/CLIP `clip/clip.py`,
`_transform`) with torchvision 0.28.0 `Resize` and `CenterCrop`. `prepare` states the deviations.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Set, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, TypeAlias, cast, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clip_rt import telemetry
from clip_rt.decoding import (
    BYTES_LIKE,
    MAX_BYTES,
    MAX_PIXELS,
    READABLE_FORMATS,
    Box,
    Decode,
    ImageInput,
    check_decode,
    open_image,
    shrink,
)
from clip_rt.errors import ImageError, InputError

if TYPE_CHECKING:
    from clip_rt.encoded import OnError

MAX_SIDE_PX = 2048
"""Largest square made; more than any CLIP reads."""

Images: TypeAlias = ImageInput | Iterable[ImageInput]
"""A batch: any iterable of images; one image alone is a batch of one."""

Square: TypeAlias = NDArray[np.uint8]
"""uint8 (side_px, side_px, 3), RGB, not normalised."""

MAX_THREADS = 8
"""Threads that decode unless the caller asks for more: other work wants the cores as well."""

FAST_OVERSAMPLING = 1.5
"""A JPEG decoded fast has at least this many pixels for one of the square, along each side.

The filter of the resize, not libjpeg's coarser one, must have the last word. At 1 it has not, and
pixels are up to four times as far from the exact ones; at 2, photographs of 12 megapixels take a
quarter longer. `benchmarks.decoding` measures all three.
"""

# Nobody can change these while they wait for a thread.
_FROZEN = (str, bytes, os.PathLike)
# In these an item stays what it is when the next one is asked for.
_COLLECTIONS = (list, tuple, np.ndarray)
# Held while a Pillow image of the caller's is loaded, which one it is by its address. Reentrant,
# since loading reads a file object, which may be of anyone's making.
_loading = [threading.RLock() for _ in range(64)]

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
    decode: Decode = "exact",
    num_threads: int = 1,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> NDArray[np.uint8]:
    """Turn a batch of images into the array an image tower reads.

    Args:
        images: Any iterable of images, or one image. It is read once, in order.
        side_px: Side of the square the model reads; 224 for ViT-L/14.
        exif: Turn photographs upright as their EXIF orientation says.
        decode: "exact", or "fast" for large JPEGs, as `prepare` describes it.
        num_threads: Images worked on at the same time.
        max_pixels: Largest width x height of one image.
        max_bytes: Largest encoded size of one image.

    Returns:
        uint8 (N, side_px, side_px, 3), RGB, not normalised. N = 0 gives an empty array.

    Raises:
        ImageError: an image cannot be used; carries its index.
        InputError: another argument cannot be used.
    """
    squares = list(
        prepare_each(
            images,
            side_px=side_px,
            exif=exif,
            decode=decode,
            num_threads=num_threads,
            max_pixels=max_pixels,
            max_bytes=max_bytes,
        )
    )
    if not squares:
        side_px = _check_side(side_px)
        return np.empty((0, side_px, side_px, 3), dtype=np.uint8)
    return np.stack(squares)


@overload
def prepare_each(
    images: Images,
    *,
    side_px: int = ...,
    exif: bool = ...,
    decode: Decode = ...,
    num_threads: int = ...,
    on_error: Literal["raise"] = ...,
    max_pixels: int = ...,
    max_bytes: int = ...,
) -> Generator[Square, None, None]: ...
@overload
def prepare_each(
    images: Images,
    *,
    side_px: int = ...,
    exif: bool = ...,
    decode: Decode = ...,
    num_threads: int = ...,
    on_error: OnError,
    max_pixels: int = ...,
    max_bytes: int = ...,
) -> Generator[Square | ImageError, None, None]: ...
def prepare_each(
    images: Images,
    *,
    side_px: int = 224,
    exif: bool = True,
    decode: Decode = "exact",
    num_threads: int = 1,
    on_error: OnError = "raise",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Generator[Square | ImageError, None, None]:
    """Yield the square of each image in order, in memory that does not grow with their number.

    `images` is read in the calling thread, and only as far ahead as keeps the others busy: at most
    2 x `num_threads` images wait, encoded or as squares. The threads work on paths and bytes, and
    on whatever stands in a list, a tuple or an array of images. Other images of a generator are
    finished before it is asked for the next, because it may draw that one over them.

    The threads belong to the process: calls with the same `num_threads` share them, and that many
    pictures are decoded in memory at most, and one more for each calling thread. A picture takes 4
    bytes a pixel, and as much again while it is turned upright.

    An error of the iterable itself comes out unchanged, after the images before it. Closing the
    generator early drops the images that wait; those begun are finished, and nobody waits for that.

    Args:
        images: As for `preprocess`.
        side_px: Side of the square the model reads.
        exif: Turn photographs upright as their EXIF orientation says.
        decode: "exact", or "fast" for large JPEGs, as `prepare` describes it.
        num_threads: Images worked on at the same time; 1 does all the work in the calling thread.
        on_error: "raise" ends at the first image that cannot be used; "skip" yields the error in
            its place.
        max_pixels: Largest width x height of one image.
        max_bytes: Largest encoded size of one image.

    Yields:
        uint8 (side_px, side_px, 3), or with "skip" also ImageError, which carries its index.

    Raises:
        ImageError: an image cannot be used; carries its index.
        InputError: another argument cannot be used, or a forked child goes on with its parent's
            generator.
    """
    side_px = _check_side(side_px)
    num_threads = _check_num_threads(num_threads)
    check_decode(decode)

    def try_to_prepare(index: int, image: ImageInput) -> Square | ImageError:
        try:
            return prepare(
                image,
                side_px=side_px,
                exif=exif,
                decode=decode,
                index=index,
                max_pixels=max_pixels,
                max_bytes=max_bytes,
            )
        except ImageError as error:
            return _forget_frames(error)

    is_one = _is_one(images)
    stays = isinstance(images, _COLLECTIONS)
    if is_one or (isinstance(images, Sized) and len(images) == 1):
        num_threads = 1

    def can_wait(image: ImageInput) -> bool:
        # A square is copied sooner than handed to a thread.
        return (stays or isinstance(image, _FROZEN)) and not _is_square(image, side_px)

    results = _work_ahead(
        try_to_prepare, iterate(images), can_wait=can_wait, num_threads=num_threads
    )
    with contextlib.closing(results):
        for result in results:
            if isinstance(result, ImageError) and on_error == "raise":
                try:
                    raise result
                finally:
                    # Or the error and this frame would hold each other, and the picture.
                    del result
            yield result


def count_threads() -> int:
    """Return a good `num_threads`: the cores this process may use, at most `MAX_THREADS`."""
    # macOS and Windows do not say which.
    may_use = getattr(os, "sched_getaffinity", None)
    cores = len(may_use(0)) if may_use else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


def iterate(images: Images) -> Iterator[ImageInput]:
    """Iterate over a batch without looking at its items; one image alone becomes a batch of one.

    An array is one image unless it has four axes, (N, H, W, 3), or is a list of objects.

    Raises:
        ImageError: `images` is neither an image nor an ordered collection of images.
    """
    if _is_one(images):
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
    decode: Decode = "exact",
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

    With `decode="fast"`, JPEG files that are large are decoded at 1/2, 1/4 or 1/8 of their size,
    whichever leaves the shortest side at least 1.5 x `side_px`, and then resized the same way. It
    takes a fifth of the time for a photograph of 12 megapixels and is no longer exact; see
    `benchmarks.decoding` for what that does to pixels, embeddings and accuracy. Smaller JPEGs,
    other formats and images opened by the caller come out as with "exact".

    Args:
        image: One image. A Pillow image is only read; loading a lazy one is its own affair. Several
            threads may pass the same one.
        side_px: Side of the square the model reads.
        exif: Turn photographs upright as their EXIF orientation says.
        decode: "exact" or "fast".
        index: Position in the caller's batch, for the error.
        max_pixels: Largest width x height.
        max_bytes: Largest encoded size.

    Returns:
        uint8 (side_px, side_px, 3), RGB, writable and not shared with the input.

    Raises:
        ImageError: the image cannot be read or decoded, has no area, or is over a limit.
        InputError: another argument cannot be used.
    """
    side_px = _check_side(side_px)
    check_decode(decode)
    if _is_square(image, side_px) and side_px**2 <= max_pixels:
        return np.array(image, dtype=np.uint8, order="C")
    try:
        with telemetry.stage("decode"):
            opened = open_image(image, max_pixels=max_pixels, max_bytes=max_bytes)
            box = None
            if decode == "fast" and opened is not image:
                box = shrink(opened, short_px=math.ceil(FAST_OVERSAMPLING * side_px))
            with _alone(image):
                opened.load()
                turn = _find_turn(opened) if exif else None
        with telemetry.stage("resize"):
            return np.array(_crop_square(opened, side_px, turn=turn, box=box), dtype=np.uint8)
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


def _check_num_threads(num_threads: int) -> int:
    try:
        number = operator.index(num_threads)
    except TypeError:
        number = 0
    if number < 1:
        raise InputError(f"num_threads is {num_threads!r}; it must be a whole number from 1.")
    return number


def _is_one(images: object) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim not in (1, 4)
    # An open file is iterable too, but line by line.
    return isinstance(images, (Image.Image, str, os.PathLike, *BYTES_LIKE)) or hasattr(
        images, "read"
    )


def _is_square(image: object, side_px: int) -> bool:
    """Whether there is nothing to do; resizing to the same size would change no pixel either."""
    return (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.shape == (side_px, side_px, 3)
    )


def _work_ahead(
    work: Callable[[int, ImageInput], Square | ImageError],
    images: Iterator[ImageInput],
    *,
    can_wait: Callable[[ImageInput], bool],
    num_threads: int,
) -> Generator[Square | ImageError, None, None]:
    """Yield what `work` makes of each image, in order, with threads where images can wait."""
    process_id = os.getpid()
    window: deque[Future[Square | ImageError]] = deque()
    source, failure, is_at_end = enumerate(images), None, False
    try:
        while True:
            # Nothing is read ahead while a result is ready: the next image may take its time.
            while not (is_at_end or len(window) == 2 * num_threads or _is_ready(window)):
                try:
                    index, image = next(source)
                except StopIteration:
                    is_at_end = True
                except Exception as error:
                    is_at_end, failure = True, error
                else:
                    has_thread = num_threads > 1 and can_wait(image)
                    window.append(_start(work, index, image, num_threads if has_thread else 0))
                    del image
            if not window:
                break
            yield window.popleft().result()
            if os.getpid() != process_id:
                raise InputError(
                    f"process {os.getpid()} goes on with images that its parent {process_id} began "
                    "to prepare on threads of its own. Begin anew after the fork."
                )
        if failure is not None:
            try:
                raise failure
            finally:
                del failure
    finally:
        # Not waited for: whoever closes this may be one of the threads, collecting garbage. And not
        # touched in a forked child, where a lock in there may be held for ever.
        if os.getpid() == process_id:
            for future in window:
                future.cancel()


def _forget_frames(error: ImageError) -> ImageError:
    """Let go of where it was raised: those frames hold the picture as long as the error is kept.

    And they hold the frames that called them, in which the error itself is.
    """
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = each.__context__ = None
        each = each.__cause__
    return error


def _is_ready(window: deque[Future[Square | ImageError]]) -> bool:
    return bool(window) and window[0].done()


def _start(
    work: Callable[[int, ImageInput], Square | ImageError],
    index: int,
    image: ImageInput,
    num_threads: int,
) -> Future[Square | ImageError]:
    """Begin the work on one of `num_threads` threads; with 0, do it here."""
    if num_threads:
        # At the end of the process, and at its limit of threads, there are no new ones.
        with contextlib.suppress(RuntimeError):
            return _threads(num_threads).submit(_report_to, telemetry.current(), work, index, image)
    done: Future[Square | ImageError] = Future()
    done.set_result(work(index, image))
    return done


def _report_to(
    listeners: telemetry.Listeners,
    work: Callable[[int, ImageInput], Square | ImageError],
    index: int,
    image: ImageInput,
) -> Square | ImageError:
    with telemetry.within(listeners):
        return work(index, image)


@functools.cache
def _threads(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="clip_rt-decode")


def _alone(image: ImageInput) -> contextlib.AbstractContextManager[object]:
    """Let only one thread at a time load a Pillow image of the caller, who may pass it to several.

    Pillow loads pixels and EXIF when they are first asked for, and two threads that both do so
    damage each other's.
    """
    if isinstance(image, Image.Image):
        return _loading[id(image) // 64 % len(_loading)]
    return contextlib.nullcontext()


def _begin_anew() -> None:
    """Forget the parent's threads and locks in a forked child, where they are dead or held."""
    _threads.cache_clear()
    _loading[:] = [threading.RLock() for _ in _loading]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _find_turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    # Pillow parses EXIF from the file's own offsets; whatever goes wrong means there is none.
    except Exception:
        return None


def _crop_square(
    image: Image.Image, side_px: int, *, turn: Image.Transpose | None, box: Box | None
) -> Image.Image:
    """Do what torchvision's `Resize(side_px)` and `CenterCrop(side_px)` do, then make it RGB.

    Args:
        image: As it was decoded.
        side_px: Side of the square.
        turn: What makes it upright.
        box: The part of it that is the picture; None is all of it.
    """
    image = _make_resizable(image)
    if box is None:
        # Turned first: after the resize it would be the same but for a rounding.
        image = _resize(_turn(image, turn), side_px, None)
    else:
        image = _turn(_resize(image, side_px, box), turn)
    # Half a pixel rounds to the even one, in torchvision as in Python.
    left = round((image.width - side_px) / 2.0)
    top = round((image.height - side_px) / 2.0)
    # Cropped before it is converted: the same pixels, and fewer of them.
    return image.crop((left, top, left + side_px, top + side_px)).convert("RGB")


def _resize(image: Image.Image, side_px: int, box: Box | None) -> Image.Image:
    width, height = image.size if box is None else box[2:]
    if width <= height:
        size = side_px, int(side_px * height / width)
    else:
        size = int(side_px * width / height), side_px
    return image.resize(size, Image.Resampling.BICUBIC, box)


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
