"""How a call failed, as gRPC and Triton say it, in; our error for it out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc

from clip_rt.errors import (
    InferenceError,
    MessageTooLongError,
    ProtocolError,
    ServerError,
    ServerOverloadedError,
    ServerTimeoutError,
    ServerUnavailableError,
)

ERROR_BY_CODE: Mapping[Any, type[ServerError]] = {
    grpc.StatusCode.OK: ProtocolError,
    grpc.StatusCode.CANCELLED: ServerUnavailableError,
    grpc.StatusCode.UNKNOWN: InferenceError,
    grpc.StatusCode.INVALID_ARGUMENT: InferenceError,
    grpc.StatusCode.DEADLINE_EXCEEDED: ServerTimeoutError,
    grpc.StatusCode.NOT_FOUND: InferenceError,
    grpc.StatusCode.ALREADY_EXISTS: InferenceError,
    grpc.StatusCode.PERMISSION_DENIED: InferenceError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: InferenceError,
    grpc.StatusCode.FAILED_PRECONDITION: InferenceError,
    grpc.StatusCode.ABORTED: ServerUnavailableError,
    grpc.StatusCode.OUT_OF_RANGE: InferenceError,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
    grpc.StatusCode.INTERNAL: InferenceError,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
    grpc.StatusCode.DATA_LOSS: ProtocolError,
    grpc.StatusCode.UNAUTHENTICATED: InferenceError,
}
"""Our error for every status of gRPC."""

ERROR_BY_MESSAGE: tuple[tuple[Any, str, type[ServerError]], ...] = (
    (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size", ServerOverloadedError),
    (grpc.StatusCode.UNAVAILABLE, "Request timeout expired", ServerOverloadedError),
    (grpc.StatusCode.UNAVAILABLE, "protocol is restricted", InferenceError),
    # Bytes were damaged on the way; gRPC gives up the connection and the next is another.
    (grpc.StatusCode.INTERNAL, "Failed parsing HTTP/2", ServerUnavailableError),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max", MessageTooLongError),
    # It is being loaded or, by a server that was told to end, put away.
    (grpc.StatusCode.NOT_FOUND, "has no available versions", ServerUnavailableError),
    # The python backend lost its process and starts another at the next request.
    (grpc.StatusCode.INTERNAL, "Stub process", ServerUnavailableError),
)
"""Where Triton gives one status to unlike things, and only its words tell them apart."""

_NEVER_REACHED = "failed to connect"
"""gRPC's words where no byte of a request has left."""
_OF_ITEMS = {
    *(grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.UNKNOWN),
    *(grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED),
}
"""Refusals that may be one row's fault, or a message's that is too long: less of it may pass."""


def read_code(error: object) -> Any:
    """Return the status of gRPC that a call ended with; a call that was given up has CANCELLED."""
    code = getattr(error, "code", None)
    return code() if callable(code) else grpc.StatusCode.CANCELLED


def find_error_type(error: object) -> type[ServerError]:
    """Return which of our errors a call's is."""
    code, details = read_code(error), _read_details(error)
    found = ERROR_BY_CODE.get(code, InferenceError)
    for its_code, words, its_type in ERROR_BY_MESSAGE:
        if code is its_code and words in details:
            found = its_type
    return found


def make_error(error: object, url: str) -> ServerError:
    """Return our error, with the server's own words and, where there is one, the way out."""
    error_type, details = find_error_type(error), _read_details(error)
    message = f"{url}: {details or read_code(error)}"
    if issubclass(error_type, ServerUnavailableError):
        return error_type(message, url=url, was_reached=_NEVER_REACHED not in details)
    if issubclass(error_type, InferenceError):
        return error_type(message, url=url, may_be_one_item=read_code(error) in _OF_ITEMS)
    if error_type is ProtocolError:
        message += " Is this the gRPC port (8001) of a Triton server?"
    if "shared memory" in details:
        message += " Give the server more of it: docker run --shm-size=1g."
    return error_type(message, url=url)


def _read_details(error: object) -> str:
    details = getattr(error, "details", None)
    text = details() if callable(details) else None
    return (text or "").strip()[:1000]
