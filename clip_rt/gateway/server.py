"""Runs the gateway by uvicorn until it is told to end, then drains.

uvicorn on h11, which limits the size of headers as its faster parser does not. The time it takes is
small beside a model's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from clip_rt.embedded import runtimes
from clip_rt.errors import InputError
from clip_rt.gateway.application import make_application
from clip_rt.gateway.config import GatewayConfig
from clip_rt.gateway.service import Service
from clip_rt.gateway.tracing import exporting

HEADERS_TIMEOUT_S = 10
"""Longest wait for the headers of a request, once it has begun."""
MAX_HEADERS_BYTES = 64 * 1024
KEEP_ALIVE_S = 75
"""Longer than what clients and proxies keep idle connections for, so that they hang up first."""
MAX_CONNECTIONS = 2048

_log = logging.getLogger(__name__)


def serve(config: GatewayConfig, make: Callable[[Service], ASGIApp] = make_application) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is under way; the second time end at once.

    Args:
        config: What is served, and how.
        make: Returns the application; its service is opened later.

    Raises:
        ClipRTError: a model or its server cannot be used, or the tokens cannot be read.
        OSError: the port is taken, or the certificate cannot be read.
    """
    asyncio.run(_serve(config, make))


async def _serve(config: GatewayConfig, make: Callable[[Service], ASGIApp]) -> None:
    runtimes.set_idle_unload_s(config.idle_unload_s)
    service = Service(config)
    # First: what can be wrong with them is known before a server has loaded its models.
    settings = _configure(config, make(service))
    with exporting(), contextlib.closing(_listen(config)) as listener:
        try:
            await service.open()
            await _Server(settings, service).serve([listener])
        finally:
            await service.close()


def _listen(config: GatewayConfig) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    # By number, as `create_server` does not: asyncio turns Nagle's algorithm off by it, which holds
    # back the body of each answer for 40 ms.
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # On Windows it would let two share a port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _configure(config: GatewayConfig, application: ASGIApp) -> uvicorn.Config:
    settings = uvicorn.Config(
        application,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(config.timeout_s) + 1,
        h11_max_incomplete_event_size=MAX_HEADERS_BYTES,
        ssl_certfile=config.certificate,
        ssl_keyfile=config.private_key,
    )
    try:
        settings.load()
    except OSError as error:
        raise InputError(
            f"TLS cannot be spoken with the certificate {config.certificate} and the key "
            f"{config.private_key}: {error}."
        ) from error
    return settings


class _Server(uvicorn.Server):
    """Says when it is ready, and drains when it is told to end."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so on standard output."""
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()[:2]
        scheme = "https" if self.config.is_ssl else "http"
        at = f"[{host}]" if ":" in host else host
        # Standard output may have been closed, or nobody reads it.
        with contextlib.suppress(OSError, AttributeError):
            sys.stdout.write(
                f"serving {', '.join(self._service.names)} on {scheme}://{at}:{port}\n"
            )
            sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or end at once when told so again."""
        if self._service.is_draining:
            self.should_exit = self.force_exit = True
            return
        self._service.is_draining = True
        _log.info("told to end: requests under way are answered first")
        asyncio.get_running_loop().call_later(self._service.config.drain_s, self._exit)

    def _exit(self) -> None:
        self.should_exit = True


class _Protocol(H11Protocol):
    """HTTP/1.1 that does not wait forever for headers."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Wait on as long as headers are not complete."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._stop_waiting()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADERS_TIMEOUT_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
