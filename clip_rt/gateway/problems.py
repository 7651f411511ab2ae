"""An error in, what a caller is told: status, message, which item, and when to try again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from http import HTTPStatus

from clip_rt.errors import (
    ClientClosedError,
    ClipRTError,
    ImageError,
    InferenceError,
    InputError,
    MessageTooLongError,
    ServerOverloadedError,
    ServerStartError,
    ServerTimeoutError,
    ServerUnavailableError,
    TextError,
    TextTooLongError,
    UnknownModelError,
)

RETRY_AFTER_S = 1

_log = logging.getLogger(__name__)


class ProblemError(Exception):
    """A request cannot be answered; what its caller is told."""

    def __init__(
        self,
        message: str,
        *,
        status: int = HTTPStatus.BAD_REQUEST,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = int(status)
        self.code = code
        self.param = param
        """Path of the part of the request it is about, such as input[3]."""
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


@dataclass(frozen=True)
class _Told:
    status: HTTPStatus
    code: str
    message: str = ""
    """Instead of the error's own, which may name addresses inside the deployment."""


_SERVER_PROBLEMS: tuple[tuple[type[ClipRTError], _Told], ...] = (
    (
        ServerOverloadedError,
        _Told(HTTPStatus.TOO_MANY_REQUESTS, "overloaded", "The model server's queue is full."),
    ),
    (
        ServerTimeoutError,
        _Told(HTTPStatus.GATEWAY_TIMEOUT, "timeout", "The model server did not answer in time."),
    ),
    (
        MessageTooLongError,
        _Told(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "item_too_large"),
    ),
    (
        ServerUnavailableError,
        _Told(HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", "The model server cannot be reached."),
    ),
    (
        ServerStartError,
        _Told(HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", "The model server does not start."),
    ),
    (
        ClientClosedError,
        _Told(HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", "This server is shutting down."),
    ),
    (
        InferenceError,
        _Told(HTTPStatus.BAD_GATEWAY, "inference_failed", "The model server failed."),
    ),
)
_INPUT_CODES: tuple[tuple[type[InputError], str], ...] = (
    (ImageError, "invalid_image"),
    (TextTooLongError, "context_length_exceeded"),
    (TextError, "invalid_text"),
)
_RETRIED = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


def find_problem(error: Exception, param: str | None = None) -> ProblemError:
    """Return what a caller is told of an error; what it is not told is logged.

    Args:
        error: Of a call of a client.
        param: Path of the item the error is about.
    """
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, UnknownModelError):
        _log.warning("%s", error)
        return ProblemError(
            "There is no such model here; /v1/models lists those there are.",
            status=HTTPStatus.NOT_FOUND,
            code="model_not_found",
            param="model",
        )
    if isinstance(error, InputError):
        code = next((code for kind, code in _INPUT_CODES if isinstance(error, kind)), "")
        return ProblemError(str(error), code=code or "invalid_request", param=param)
    for kind, told in _SERVER_PROBLEMS:
        if isinstance(error, kind):
            if told.message:
                _log.warning("%s", error)
            return ProblemError(
                told.message or str(error),
                status=told.status,
                code=told.code,
                param=param,
                retry_after_s=RETRY_AFTER_S if told.status in _RETRIED else None,
            )
    _log.error("a request failed", exc_info=error)
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    if isinstance(error, ClipRTError):
        status = HTTPStatus.BAD_GATEWAY
    return ProblemError(
        f"Something went wrong here ({type(error).__name__}); the server's log says what.",
        status=status,
        code="server_error",
    )
