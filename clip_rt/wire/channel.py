"""An address in, a channel to it out: TLS, names of many servers, proxies, sizes of messages.

Source: grpc/grpc `doc/naming.md` and `doc/load-balancing.md`.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from clip_rt.errors import InputError

MAX_SEND_BYTES = 256 * 1024**2
MAX_RECEIVE_BYTES = 64 * 1024**2
"""Largest answer read: 16 million numbers, where a batch of 32 has some 32 thousand."""
_DNS = r"dns://[^/\s@]*/"
"""Before the name of many servers, as gRPC writes it: dns:///NAME, or dns://DNS_SERVER/NAME."""
_ROUND_ROBIN = '{"loadBalancingConfig": [{"round_robin": {}}]}'


@dataclass(frozen=True, kw_only=True)
class TLS:
    """How a server is trusted and a client shows who it is; PEM files.

    Raises:
        InputError: a file cannot be read, or is no PEM.
    """

    root_certificates: Path | str | None = None
    """Whom to trust; None is whom this system trusts."""
    certificate_chain: Path | str | None = None
    """The client's own, for servers that ask for one."""
    private_key: Path | str | None = None
    """Of `certificate_chain`."""

    def __post_init__(self) -> None:
        if (self.certificate_chain is None) != (self.private_key is None):
            raise InputError("certificate_chain and private_key belong together; pass both.")
        self.read()

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Return root certificates, private key and certificate chain, as gRPC wants them."""
        return (
            _read_pem(self.root_certificates, "root_certificates"),
            _read_pem(self.private_key, "private_key"),
            _read_pem(self.certificate_chain, "certificate_chain"),
        )


def parse_url(url: str) -> tuple[str, bool]:
    """Split a url into what gRPC dials and whether it is TLS.

    Raises:
        InputError: it is no host:port.
    """
    pattern = rf"(grpcs?://)?((?:{_DNS})?[^/\s@]+:\d{{1,5}})"
    match = re.fullmatch(pattern, url) if isinstance(url, str) else None
    if match is None or int(match[2].rpartition(":")[2]) > 65535:
        raise InputError(
            f"url {url!r:.80} is not host:port. Name Triton's gRPC endpoint, like localhost:8001, "
            "or grpcs://host:port for TLS."
        )
    return match[2], match[1] == "grpcs://"


def is_loopback(target: str) -> bool:
    """Whether what gRPC dials is this machine, by the name of its host."""
    host = re.sub(f"^{_DNS}", "", target).rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_channel(target: str, *, tls: TLS | None) -> Any:
    """Return a channel of gRPC, which has no types, to a target of `parse_url`; None is no TLS."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        _wait_like_greenlets()
    options: tuple[tuple[str, int | str], ...] = (
        ("grpc.max_send_message_length", MAX_SEND_BYTES),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # Or closing one client's connection would be felt by another's.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", int(not is_loopback(target))),
    )
    if target.startswith("dns://"):
        # One name for many servers: a connection to each, used in turn.
        options += (("grpc.service_config", _ROUND_ROBIN),)
    if tls is not None:
        return grpc.secure_channel(target, grpc.ssl_channel_credentials(*tls.read()), options)
    return grpc.insecure_channel(target, options)


def stops_greenlets() -> bool:
    """Whether a wait of gRPC's stops all else: eventlet's greenlets take the place of threads."""
    patcher = sys.modules.get("eventlet.patcher")
    return patcher is not None and bool(patcher.is_monkey_patched("thread"))


@functools.cache
def _wait_like_greenlets() -> None:
    """Have gRPC wait in a thread pool of gevent's, whose greenlets take the place of threads.

    Else its waits stop all greenlets, those included that are to notice that a deadline is over.
    """
    from grpc.experimental.gevent import init_gevent

    init_gevent()


def _read_pem(path: Path | str | None, name: str) -> bytes | None:
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error}.") from error
    if b"-----BEGIN " not in content:
        raise InputError(f"{name}, {str(path)!r}, is no PEM file.")
    return content


def split_urls(url: str | Sequence[str]) -> tuple[str, ...]:
    """Return one or several addresses, checked.

    Raises:
        InputError: one is none, or is named twice.
    """
    if not isinstance(url, Iterable) or isinstance(url, bytes):
        raise InputError(f"url is a {type(url).__name__}; pass host:port, or a list of them.")
    urls = tuple(part.strip() for part in url.split(",")) if isinstance(url, str) else tuple(url)
    if not urls:
        raise InputError("url names no server; name at least one.")
    for index, each in enumerate(urls):
        parse_url(each)
        if each in urls[:index]:
            raise InputError(f"url names {each!r} twice; name each server once.")
    return urls


def check_headers(headers: Mapping[str, str] | None) -> None:
    """Make sure that headers can be sent.

    Raises:
        InputError: one cannot.
    """
    if not isinstance(headers, Mapping | None):
        raise InputError(f"headers is a {type(headers).__name__}; pass a dict of strings.")
    for name, value in (headers or {}).items():
        is_name = isinstance(name, str) and re.fullmatch(r"(?!grpc-)[a-z0-9_.-]+(?<!-bin)", name)
        is_value = isinstance(value, str) and value.isascii() and value.isprintable()
        if not is_name or not is_value:
            raise InputError(
                f"header {name!r:.40} cannot be sent: names are strings of lower-case letters, "
                "digits and _ . -, not grpc-... nor ...-bin; values are strings of printable ASCII."
            )
