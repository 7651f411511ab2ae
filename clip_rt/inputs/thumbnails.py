"""Small pictures of images, for people to look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL_PX = (232, 174)
"""Width and height that an image is fitted into."""


def make_thumbnail(
    read: Callable[[], Path | bytes], size_px: tuple[int, int] = THUMBNAIL_PX
) -> Image.Image | None:
    """Return an image as people see it, RGB, fitted into a size; None if it cannot be.

    Args:
        read: Returns its path or its content.
        size_px: Largest width and height; a smaller image keeps its size.
    """
    # Only here: what needs no pictures does without Pillow.
    from PIL import Image, ImageOps

    from clip_rt.inputs.decoding import MAX_BYTES, MAX_PIXELS, open_image

    try:
        image = open_image(read(), max_pixels=MAX_PIXELS, max_bytes=MAX_BYTES)
        # A JPEG is decoded no larger than needed.
        image.draft("RGB", (2 * size_px[0], 2 * size_px[1]))
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.new("RGBA", rgba.size, "white")
            image.alpha_composite(rgba)
        image = image.convert("RGB")
        image.thumbnail(size_px)
    # On damaged bytes Pillow's decoders raise nearly anything.
    except Exception:
        return None
    return image
