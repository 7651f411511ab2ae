"""Pictures of any size that are as detailed as photographs, made of four that scikit-image brings.

A photograph is enlarged until it covers the picture, twice at most so that it stays sharp, and then
continued by its mirror image. Each picture shows another part of that.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage import data

PHOTOGRAPHS: Mapping[str, Callable[[], NDArray[np.uint8]]] = {
    "astronaut": data.astronaut,
    "chelsea": data.chelsea,
    "coffee": data.coffee,
    "rocket": data.rocket,
}
"""Those scenes in colour that its wheel holds, some 500 px wide."""
SMALL_PX, LARGE_PX = (640, 480), (4000, 3000)
"""Width and height of what most measurements take, and of what cameras take."""
MAX_ENLARGEMENT = 2.0
JPEG_QUALITY = 90


def photo(size: tuple[int, int], index: int) -> Image.Image:
    """Make one picture; the same one for the same arguments.

    Args:
        size: Width and height in pixels.
        index: Which one; four neighbours are of four photographs.

    Returns:
        RGB.
    """
    wide, high = size
    source = _photographs()[index % len(PHOTOGRAPHS)]
    cover = max(wide / source.width, high / source.height)
    factor = min(max(cover, 1.0), MAX_ENLARGEMENT)
    tile = source.resize(
        (round(source.width * factor), round(source.height * factor)), Image.Resampling.BICUBIC
    )
    left, top = np.random.default_rng(index).integers(0, (tile.width, tile.height))
    plane = np.pad(
        np.asarray(tile),
        ((0, max(0, top + high - tile.height)), (0, max(0, left + wide - tile.width)), (0, 0)),
        mode="symmetric",
    )
    return Image.fromarray(plane[top : top + high, left : left + wide].copy())


def jpeg(size: tuple[int, int], index: int) -> bytes:
    """Encode `photo` as a baseline JPEG of `JPEG_QUALITY`, with chroma halved both ways (4:2:0)."""
    file = io.BytesIO()
    photo(size, index).save(file, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return file.getvalue()


@cache
def jpegs(size: tuple[int, int], num: int) -> list[bytes]:
    """Encode the first `num` pictures of a width and height; made once in a process."""
    return [jpeg(size, index) for index in range(num)]


def describe() -> dict[str, Any]:
    """Say for a result where its pictures come from."""
    return {
        "source": "photographs of scikit-image's wheel, enlarged at most "
        f"{MAX_ENLARGEMENT:g} times and continued by their mirror images",
        "photographs": list(PHOTOGRAPHS),
        "jpeg_quality": JPEG_QUALITY,
        "jpeg_subsampling": "4:2:0",
    }


@cache
def _photographs() -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(load()) for load in PHOTOGRAPHS.values())
