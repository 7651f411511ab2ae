"""Images by URL, from hosts that were allowed: never from a private network, no redirects."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urlsplit

import httpx

FETCH_TIMEOUT_S = 10.0
_TRANSLATED = tuple(map(ipaddress.ip_network, ("2002::/16", "64:ff9b::/96", "::/96")))
"""Addresses of IPv6 that stand for one of IPv4, which may be private."""


class FetchError(Exception):
    """An image is not fetched, or could not be; the rest of a sentence that begins with it."""

    def __init__(self, why: str, *, code: str = "url_failed", is_other_host: bool = False) -> None:
        super().__init__(why)
        self.code = code
        """Of the gateway's problem: invalid_image, url_not_allowed, url_failed."""
        self.is_other_host = is_other_host
        """Whether its host is none of those that are allowed."""


def is_url(text: str) -> bool:
    """Return whether a string is the URL of something that is fetched."""
    return text[:8].lower().startswith(("http://", "https://"))


class Fetcher:
    """Fetches images.

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

    async def fetch(self, url: str) -> bytes:
        """Return the bytes at a URL within `FETCH_TIMEOUT_S`.

        Raises:
            FetchError: its host is not allowed, or it cannot be fetched.
        """
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError as error:
            raise FetchError(f"is no URL: {error}", code="invalid_image") from error
        if host not in self._hosts:
            raise FetchError(
                f"is at {host[:80]!r}, which images are not fetched from",
                code="url_not_allowed",
                is_other_host=True,
            )
        try:
            return await asyncio.wait_for(
                self._read_url(url, parts.scheme.lower(), host, port), FETCH_TIMEOUT_S
            )
        except (httpx.HTTPError, httpx.InvalidURL, OSError, asyncio.TimeoutError) as error:
            raise FetchError(f"cannot be fetched from {host}: {type(error).__name__}") from error

    async def _read_url(self, url: str, scheme: str, host: str, port: int | None) -> bytes:
        address = await _resolve(host, port or (443 if scheme == "https" else 80))
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
                raise FetchError(
                    f"cannot be fetched from {host}: it answers {answer.status_code}"
                    f" {answer.headers.get('content-encoding', '')[:40]}".rstrip()
                )
            content = bytearray()
            async for part in answer.aiter_raw():
                content += part
                if len(content) > self._max_bytes:
                    raise FetchError(f"at {host} is larger than {self._max_bytes} bytes")
            return bytes(content)
        finally:
            await answer.aclose()


async def _resolve(host: str, port: int) -> str:
    """Return a public address of a host.

    Raises:
        FetchError: one of its addresses is of a private network.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(each[4][0]) for each in found]
    for address in addresses:
        if not is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise FetchError(f"is at {host}, in a private network", code="url_not_allowed")
    return addresses[0]


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an address is of the public internet."""
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    return address.version == 4 or not any(address in each for each in _TRANSLATED)
