"""A request's body in, a checked structure out; a structure in, the bytes of an answer out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from clip_rt.gateway.problems import ProblemError

Body = TypeVar("Body")
Result = TypeVar("Result")

LARGE_BYTES = 256 * 1024
"""A body or vectors from which on they are read or written in a thread: the event loop has others
to answer."""

_encoder = msgspec.json.Encoder()


async def read_json(request: Request, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Return what a request says.

    Raises:
        ProblemError: it is not JSON, or not what the decoder expects; says where.
    """
    content = await request.body()
    try:
        return await off_the_loop(partial(decoder.decode, content), num_bytes=len(content))
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        raise ProblemError(f"{what}.", param=path.rstrip("`").lstrip(".") or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProblemError(f"The request is not JSON: {error}.", code="invalid_json") from error


async def off_the_loop(work: Callable[[], Result], *, num_bytes: int) -> Result:
    """Return what `work` returns, which is done in a thread where that many bytes take long."""
    if num_bytes < LARGE_BYTES:
        return work()
    return await asyncio.to_thread(work)


def answer_json(
    content: Any, *, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None
) -> Response:
    """Return an answer of JSON."""
    return Response(
        _encoder.encode(content), status, headers=headers, media_type="application/json"
    )
