"""One image and one text that every model is asked, and what its FP32 reference answers.

An export writes the answers into the manifest (`export/canary.py`). Whoever sends the same image
and text through a client and gets other answers has found a fault somewhere on the way: decoding,
resizing, tokens, the weights that are served, or the arithmetic that runs them.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import ContractError

TEXT = "A drawing of a RED circle &amp; a blue caf\u00e9 table."
"""Capitals, an HTML entity, punctuation and a letter beyond ASCII, so that cleaning shows too."""
HEIGHT_PX = 90
WIDTH_PX = 130


def draw_image() -> bytes:
    """Draw the image: a disc and stripes on a slope of colours, neither square nor small.

    Returns:
        A PNG file, (HEIGHT_PX, WIDTH_PX), RGB; the pixels are the same everywhere.
    """
    from PIL import Image

    y, x = np.mgrid[:HEIGHT_PX, :WIDTH_PX]
    pixels = np.stack([x, y + 60, 200 - x], axis=2)
    pixels[y // 6 % 5 == 0] = (240, 240, 220)
    pixels[(y - 40) ** 2 + (x - 75) ** 2 < 30**2] = (220, 40, 30)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()


def write(
    image: NDArray[np.float32], text: NDArray[np.float32], *, min_cosine: float
) -> dict[str, str | float]:
    """Make the value of `Manifest.canary`.

    Args:
        image: float32 (D,), the reference's embedding of `draw_image()`, of length 1.
        text: float32 (D,), that of `TEXT`.
        min_cosine: The least that a served model's embedding may have with it.

    Returns:
        `min_cosine`, and both as base64 of little-endian float16: half as long in a config.pbtxt
        as float32, and off by less than 1e-7 in the cosine.
    """
    encoded = {
        name: base64.b64encode(vector.astype("<f2").tobytes()).decode("ascii")
        for name, vector in (("image", image), ("text", text))
    }
    return {**encoded, "min_cosine": min_cosine}


def compare(
    canary: Mapping[str, Any], *, image: NDArray[np.float32], text: NDArray[np.float32]
) -> tuple[dict[str, float], float]:
    """Hold a server's answers against those of the reference.

    Args:
        canary: `Manifest.canary`.
        image: float32 (D,), what the server makes of `draw_image()`.
        text: float32 (D,), what it makes of `TEXT`.

    Returns:
        The cosines of `image` and `text`, and the least they should be.

    Raises:
        ContractError: the canary cannot be read.
    """
    try:
        cosines = {
            name: _cosine(np.frombuffer(base64.b64decode(canary[name], validate=True), "<f2"), mine)
            for name, mine in (("image", image), ("text", text))
        }
        return cosines, float(canary["min_cosine"])
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ContractError(
            f"the canary of the model cannot be read ({type(error).__name__}: {error}). Export the "
            "model again.",
            expected="image, text and min_cosine",
            found=sorted(canary) if isinstance(canary, Mapping) else type(canary).__name__,
        ) from error


def _cosine(expected: NDArray[Any], found: NDArray[np.float32]) -> float:
    """Return the cosine of two vectors of one shape; float64, as it is near 1."""
    if expected.shape != found.shape:
        raise ValueError(f"{expected.shape} numbers for embeddings of {found.shape}")
    a, b = expected.astype(np.float64), found.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
