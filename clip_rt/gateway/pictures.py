"""Images as requests hold them, base64 or a URL, made encoded bytes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Collection
from urllib.parse import unquote_to_bytes

import httpx
import pybase64

from clip_rt.gateway.problems import ProblemError
from clip_rt.inputs.fetching import Fetcher, FetchError, is_url

MAX_FETCHES = 16
"""Images fetched at a time, of all requests."""
LARGE_BYTES = 256 * 1024


def is_data_uri(text: str) -> bool:
    """Return whether a string is an image by itself, and no text."""
    return text[:11].lower() == "data:image/"


class ImageSource:
    """Reads the images of requests.

    Args:
        client: That fetches them.
        hosts: Whose URLs are fetched.
        max_bytes: Largest image fetched.
    """

    def __init__(
        self, client: httpx.AsyncClient, hosts: Collection[str], *, max_bytes: int
    ) -> None:
        self._fetcher = Fetcher(client, hosts, max_bytes=max_bytes)
        self._fetches = asyncio.Semaphore(MAX_FETCHES)

    async def read(self, source: str, param: str) -> bytes:
        """Return the bytes of an image: a data URI, base64, or a URL of a host that is allowed.

        Raises:
            ProblemError: it is none of these, or cannot be fetched.
        """
        if is_url(source):
            async with self._fetches:
                return await self._fetch(source, param)
        decode = _read_data_uri if is_data_uri(source) else _decode
        if len(source) < LARGE_BYTES:
            return decode(source, param)
        # In a thread: the event loop has others to answer.
        return await asyncio.to_thread(decode, source, param)

    async def _fetch(self, url: str, param: str) -> bytes:
        try:
            return await self._fetcher.fetch(url)
        except FetchError as error:
            way_out = (
                ". Send the image itself as a data URI, or have the operator allow its host with "
                "--image-host"
                if error.is_other_host
                else ""
            )
            raise _refuse(f"{error}{way_out}", param, code=error.code) from error


def _read_data_uri(uri: str, param: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise _refuse("is a data URI without a comma", param)
    if head.lower().endswith(";base64"):
        return _decode(body, param)
    return unquote_to_bytes(body)


def _decode(text: str, param: str) -> bytes:
    with contextlib.suppress(ValueError):
        return pybase64.b64decode(text, validate=True)
    try:
        # Lines of 76 letters are as common as one long one, and padding may be too long.
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise _refuse(
            "is neither base64, nor a data URI, nor a URL: send data:image/png;base64, and "
            "behind it the image in base64",
            param,
        ) from error


def _refuse(why: str, param: str, *, code: str = "invalid_image") -> ProblemError:
    return ProblemError(f"The image {param} {why.rstrip('.')}.", code=code, param=param)
