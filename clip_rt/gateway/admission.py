"""Who is let in: by token, by how many are in flight, by size and speed of the body."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import math
import os
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from starlette.requests import Request

from clip_rt.errors import InputError
from clip_rt.gateway.config import TOKENS_VARIABLE, GatewayConfig
from clip_rt.gateway.problems import RETRY_AFTER_S, ProblemError

SMOOTHING = 0.1
"""Weight of the newest request in the running mean of how long one takes."""


def read_tokens(config: GatewayConfig) -> frozenset[bytes]:
    """Return digests of the bearer tokens that are let in; none if everybody is.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    if config.token_file is not None:
        return _digest_all(_read_lines(config.token_file), str(config.token_file))
    # One that is there and empty lets nobody in by mistake: it is refused below.
    if (said := os.environ.get(TOKENS_VARIABLE)) is not None:
        return _digest_all(said.split(","), f"${TOKENS_VARIABLE}")
    return frozenset()


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the tokens in {path} cannot be read: {error}.") from error


def _digest_all(tokens: list[str], source: str) -> frozenset[bytes]:
    found = frozenset(_digest(token.strip()) for token in tokens if token.strip())
    if not found:
        raise InputError(f"{source} holds no token; put in one a line, or leave it out.")
    return found


def _digest(token: str) -> bytes:
    # A comparison in constant time needs equal lengths.
    return hashlib.sha256(token.encode()).digest()


class Admission:
    """Keeps the gateway from taking on more than it can do."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._tokens = read_tokens(config)
        self._request_s = 0.0
        self.num_in_flight = 0

    @property
    def has_tokens(self) -> bool:
        """Whether callers must name one."""
        return bool(self._tokens)

    def authorize(self, request: Request) -> None:
        """Let a request pass whose token is known.

        Raises:
            ProblemError: it has none, or another.
        """
        if not self._tokens:
            return
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        digest = _digest(token.strip())
        matches = [hmac.compare_digest(digest, each) for each in self._tokens]
        if kind.lower() != "bearer" or not any(matches):
            raise ProblemError(
                "Send a token that is known here: Authorization: Bearer ...",
                status=HTTPStatus.UNAUTHORIZED,
                code="invalid_api_key",
            )

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request as in flight in a `with` block.

        Raises:
            ProblemError: too many are.
        """
        number = self.num_in_flight + 1
        # A request alone is let in however long the one before it took.
        is_late = number > 1 and number * self._request_s > self._config.max_wait_s
        if number > self._config.max_concurrent_requests or is_late:
            why = "as many as there may be"
            if is_late:
                why = f"and another would take more than {self._config.max_wait_s:g} s"
            wait_s = math.ceil(min(number * self._request_s, 60.0))
            raise ProblemError(
                f"{self.num_in_flight} requests are being answered, {why}. Try again later.",
                status=HTTPStatus.TOO_MANY_REQUESTS,
                code="rate_limit_exceeded",
                retry_after_s=max(wait_s, RETRY_AFTER_S),
            )
        self.num_in_flight = number
        try:
            yield
        finally:
            self.num_in_flight -= 1

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Learn from a `with` block how long a request takes, once its body is here.

        One that fails says nothing of the next.
        """
        number, start_s = self.num_in_flight, time.monotonic()
        yield
        share_s = (time.monotonic() - start_s) / number
        weight = SMOOTHING if self._request_s else 1.0
        self._request_s += weight * (share_s - self._request_s)

    async def read_body(self, request: Request) -> bytes:
        """Return a request's body.

        Raises:
            ProblemError: it is too large, or comes too slowly.
            ClientDisconnect: the caller is gone.
        """
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._config.max_body_bytes:
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._read(request), self._config.timeout_s)
        except asyncio.TimeoutError as error:
            raise ProblemError(
                f"The request was not here after {self._config.timeout_s:g} s.",
                status=HTTPStatus.REQUEST_TIMEOUT,
                code="timeout",
            ) from error

    async def _read(self, request: Request) -> bytes:
        parts, size_bytes = [], 0
        async for part in request.stream():
            size_bytes += len(part)
            if size_bytes > self._config.max_body_bytes:
                raise self._too_large()
            parts.append(part)
        return b"".join(parts)

    def _too_large(self) -> ProblemError:
        return ProblemError(
            f"The request is larger than {self._config.max_body_mib:g} MiB. Send fewer or smaller "
            "images in each.",
            status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            code="request_too_large",
        )
