"""Images of any kind in, the squares that CLIP reads out, in order and on several threads.

What happens to one image is `transform.prepare`'s.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clip_rt import telemetry
from clip_rt.errors import ImageError, InputError
from clip_rt.inputs.decoding import (
    BYTES_LIKE,
    MAX_BYTES,
    MAX_PIXELS,
    Decode,
    ImageInput,
    check_decode,
    check_limits,
    is_array_like,
    is_file,
)
from clip_rt.inputs.items import check_list, check_whole_number, count_axes
from clip_rt.inputs.transform import Square, check_resizing, check_side, is_square, prepare
from clip_rt.specs import CLIP_RESIZING, Resizing

if TYPE_CHECKING:
    from clip_rt.inputs.items import OnError

Images: TypeAlias = ImageInput | Iterable[ImageInput]
"""A batch: any list of images, see `items`, or generator; one image alone is a batch of one."""

MAX_THREADS = 8
"""Threads that decode unless the caller asks for more: other work wants the cores as well."""

# Nobody can change these while they wait for a thread.
_FROZEN = (str, bytes, os.PathLike)
# In these an item stays what it is when the next one is asked for.
_COLLECTIONS = (list, tuple, np.ndarray)


def preprocess(
    images: Images,
    *,
    side_px: int = 224,
    resizing: Resizing = CLIP_RESIZING,
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
        resizing: How an image becomes that square; that of a served model is
            `client.manifest.resizing`.
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
            resizing=resizing,
            exif=exif,
            decode=decode,
            num_threads=num_threads,
            max_pixels=max_pixels,
            max_bytes=max_bytes,
        )
    )
    if not squares:
        side_px = check_side(side_px)
        return np.empty((0, side_px, side_px, 3), dtype=np.uint8)
    return np.stack(cast("list[Square]", squares))


def prepare_each(
    images: Images,
    *,
    side_px: int = 224,
    resizing: Resizing = CLIP_RESIZING,
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
        resizing: How an image becomes that square.
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
    side_px = check_side(side_px)
    check_resizing(resizing, side_px)
    num_threads = check_whole_number(num_threads, "num_threads")
    check_decode(decode)
    check_limits(max_pixels=max_pixels, max_bytes=max_bytes)

    def try_to_prepare(index: int, image: ImageInput) -> Square | ImageError:
        try:
            return prepare(
                image,
                side_px=side_px,
                resizing=resizing,
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
        return (stays or isinstance(image, _FROZEN)) and not is_square(image, side_px, resizing)

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
        ImageError: `images` is neither an image nor a list of images, as `items` has it.
    """
    if _is_one(images):
        return iter((cast("ImageInput", images),))
    if isinstance(images, Iterable) and count_axes(images) == 4:
        return iter(cast("Iterable[ImageInput]", images))
    return iter(check_list(images, "images", "images", ImageError))


def _is_one(images: object) -> bool:
    if isinstance(images, np.ndarray) or (
        is_array_like(images) and not hasattr(images, "__dataframe__")
    ):
        return count_axes(images) not in (1, 4)
    # An open file is iterable too, but line by line.
    is_single = isinstance(images, (Image.Image, str, os.PathLike, *BYTES_LIKE))
    return is_single or is_file(images)


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


def _begin_anew() -> None:
    """Forget the parent's threads in a forked child, where they are dead."""
    _threads.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
