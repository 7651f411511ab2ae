"""SVG in, square pictures out: as they are, as line drawings, or inked over."""

from __future__ import annotations

import hashlib
import io
import re
from typing import Any

from PIL import Image

SIDE_PX = 64


def iconify_svg(icon: dict[str, Any], collection: dict[str, Any]) -> str:
    """Assemble the SVG document of an entry of an Iconify collection."""
    box = [
        icon.get(key, collection.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box[0]} {box[1]} {box[2]} {box[3]}" width="{box[2]}" height="{box[3]}">'
        f"{icon['body']}</svg>"
    )


def line_svg(svg: str, *, over: bool = False) -> str:
    """Redraw a coloured picture as its outlines: every shape stroked black, none filled.

    With `over`, the outlines lie on the picture, as an illustrator would ink it.
    """
    view_box = re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', svg)
    width = float(view_box[1]) if view_box else 1.0
    stroke = width * (0.02 + 0.02 * (hashlib.sha256(svg.encode()).digest()[0] / 255))
    head, body = svg.split(">", 1)
    picture = body.rsplit("</svg>", 1)[0]
    body = re.sub(
        r"<(defs|mask|linearGradient|radialGradient|filter)\b.*?</\1>", "", picture, flags=re.S
    )
    body = re.sub(
        r'\s(fill|stroke|stroke-width|opacity|fill-opacity|mask|filter|clip-path|style)="[^"]*"',
        "",
        body,
    )
    pen = (
        f'stroke="#000" stroke-width="{stroke:.3f}" stroke-linejoin="round" stroke-linecap="round"'
    )
    return f'{head}>{picture if over else ""}<g fill="none" {pen}>{body}</g></svg>'


def render(svg: str, *, background: str | None) -> bytes:
    """Draw an SVG in the middle of a square of SIDE_PX, as lossless WebP bytes."""
    view_box = re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', svg)
    landscape = view_box is None or float(view_box[1]) >= float(view_box[2])
    # Here, because whoever trains on data of their own needs no renderer.
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        skip_system_fonts=True,
        width=SIDE_PX if landscape else None,
        height=None if landscape else SIDE_PX,
    )
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (SIDE_PX, SIDE_PX), background or (0, 0, 0, 0))
    image.thumbnail((SIDE_PX, SIDE_PX))  # a rounded-up side may be one pixel over
    corner = ((SIDE_PX - image.width) // 2, (SIDE_PX - image.height) // 2)
    canvas.alpha_composite(image, dest=corner)
    out = io.BytesIO()
    (canvas.convert("RGB") if background else canvas).save(out, "WEBP", lossless=True)
    return out.getvalue()
