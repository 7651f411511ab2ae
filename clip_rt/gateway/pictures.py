"""Images as requests hold them, base64 or a URL, made encoded bytes."""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import unquote_to_bytes, urlsplit

import httpx

from clip_rt.gateway.problems import ProblemError

FETCH_TIMEOUT_S = 10.0
MAX_FETCHES = 16
"""Images fetched at a time, of all requests."""
LARGE_BYTES = 256 * 1024
_TRANSLATED = tuple(map(ipaddress.ip_network, ("2002::/16", "64:ff9b::/96", "::/96")))
"""Addresses of IPv6 that stand for one of IPv4, which may be private."""


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
        self._client = client
        self._hosts = frozenset(host.lower() for host in hosts)
        self._max_bytes = max_bytes
        self._fetches = asyncio.Semaphore(MAX_FETCHES)

    async def read(self, source: str, param: str) -> bytes:
        """Return the bytes of an image: a data URI, base64, or a URL of a host that is allowed.

        Raises:
            ProblemError: it is none of these, or cannot be fetched.
        """
        if source[:8].lower().startswith(("http://", "https://")):
            async with self._fetches:
                return await self._fetch(source, param)
        decode = _read_data_uri if is_data_uri(source) else _decode
        if len(source) < LARGE_BYTES:
            return decode(source, param)
        # In a thread: the event loop has others to answer.
        return await asyncio.to_thread(decode, source, param)

    async def _fetch(self, url: str, param: str) -> bytes:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError as error:
            raise _refuse(f"is no URL: {error}", param) from error
        if host not in self._hosts:
            raise _refuse(
                f"is at {host[:80]!r}, which images are not fetched from. Send the image itself as "
                "a data URI, or have the operator allow its host with --image-host",
                param,
                code="url_not_allowed",
            )
        try:
            return await asyncio.wait_for(
                self._read_url(url, parts.scheme.lower(), host, port, param), FETCH_TIMEOUT_S
            )
        except (httpx.HTTPError, httpx.InvalidURL, OSError, asyncio.TimeoutError) as error:
            raise _refuse(
                f"cannot be fetched from {host}: {type(error).__name__}", param, code="url_failed"
            ) from error

    async def _read_url(
        self, url: str, scheme: str, host: str, port: int | None, param: str
    ) -> bytes:
        address = await _resolve(host, port or (443 if scheme == "https" else 80), param)
        # The address that was checked is the one that is asked: a name may point elsewhere a
        # moment later. Redirects, which lead anywhere, are not followed. Nothing compressed is
        # taken: a few bytes may become gigabytes.
        request = self._client.build_request(
            "GET",
            httpx.URL(url).copy_with(host=address),
            headers={
                "Host": host if port is None else f"{host}:{port}",
                "Accept-Encoding": "identity",
            },
            extensions={"sni_hostname": host},
        )
        answer = await self._client.send(request, stream=True, follow_redirects=False)
        try:
            if answer.status_code != 200 or "content-encoding" in answer.headers:
                raise _refuse(
                    f"cannot be fetched from {host}: it answers {answer.status_code}"
                    f" {answer.headers.get('content-encoding', '')[:40]}".rstrip(),
                    param,
                    code="url_failed",
                )
            content = bytearray()
            async for part in answer.aiter_raw():
                content += part
                if len(content) > self._max_bytes:
                    raise _refuse(
                        f"at {host} is larger than {self._max_bytes} bytes",
                        param,
                        code="url_failed",
                    )
            return bytes(content)
        finally:
            await answer.aclose()


async def _resolve(host: str, port: int, param: str) -> str:
    """Return a public address of a host.

    Raises:
        ProblemError: one of its addresses is of a private network.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(each[4][0]) for each in found]
    for address in addresses:
        if not _is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise _refuse(f"is at {host}, in a private network", param, code="url_not_allowed")
    return addresses[0]


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    return address.version == 4 or not any(address in each for each in _TRANSLATED)


def _read_data_uri(uri: str, param: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise _refuse("is a data URI without a comma", param)
    if head.lower().endswith(";base64"):
        return _decode(body, param)
    return unquote_to_bytes(body)


def _decode(text: str, param: str) -> bytes:
    try:
        # Lines of 76 letters are as common as one long one.
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refuse(
            "is neither base64, nor a data URI, nor a URL: send data:image/png;base64, and "
            "behind it the image in base64",
            param,
        ) from error


def _refuse(why: str, param: str, *, code: str = "invalid_image") -> ProblemError:
    return ProblemError(f"The image {param} {why.rstrip('.')}.", code=code, param=param)
