"""The files of the page: read once, answered with a tag by which a browser keeps them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from clip_rt.gateway.application import Endpoint, Handler
from clip_rt.gateway.service import Service

FOLDER = Path(__file__).with_name("static")
PAGE = "index.html"
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


def list_static_endpoints() -> Iterator[Endpoint]:
    """Yield a path for each file; the page itself is at the root.

    They need no token: the page asks for it, and holds no data.
    """
    for path in sorted(each for each in FOLDER.iterdir() if each.suffix in TYPES):
        yield Endpoint(
            method="GET",
            path="/" if path.name == PAGE else f"/ui/static/{path.name}",
            handler=_make_handler(path.read_bytes(), TYPES[path.suffix]),
            summary=f"The page's {path.name}",
            is_public=True,
        )


def _make_handler(content: bytes, media_type: str) -> Handler:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    # Asked for each time, so that a page is never of two versions.
    headers = {"ETag": tag, "Cache-Control": "no-cache"}

    async def answer(service: Service, request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return answer
