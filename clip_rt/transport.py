"""Arrays in, checked embeddings out, over gRPC; the only file that speaks Triton's protocol.

Every call ends by its deadline with an answer or one of our errors. Faults that pass by themselves
are retried until then, within a small budget; what the caller got wrong never is.

Source: kserve/open-inference-protocol `specification/protocol/inference_grpc.md`; Triton's
additions in triton-inference-server/common `protobuf/grpc_service.proto`.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from clip_rt.deadline import Answer, Deadline, RetryPolicy
from clip_rt.errors import (
    ClientClosedError,
    ContractError,
    InferenceError,
    InputError,
    NonFiniteEmbeddingError,
    ProtocolError,
    ServerError,
    ServerOverloadedError,
    ServerTimeoutError,
    ServerUnavailableError,
    UnknownModelError,
)
from clip_rt.manifest import Manifest
from clip_rt.specs import EMBEDDINGS

MAX_IN_FLIGHT = 4
"""Requests on their way at once in one call: enough to keep a server busy, few enough to hold."""
MAX_SEND_BYTES = 256 * 1024**2
MAX_RECEIVE_BYTES = 64 * 1024**2
"""Largest answer read: 16 million numbers, where a batch of 32 has some 32 thousand."""
CLOSE_TIMEOUT_S = 1.0
NORM_TOLERANCE = 1e-3
"""How far the length of an embedding may be from 1: FP16 and rounding stay far below."""
MIN_NORM = 1e-6
GRACE_S = 0.05
"""Waited beyond the deadline for gRPC's own notice that it has passed."""
LINGER_S = 30.0
"""How long a server that must not be told goes on with a call that was given up."""
MAX_GIVEN_UP = 256
"""Such calls at a time; beyond, the server is told after all."""

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
    # The python backend lost its process and starts another at the next request.
    (grpc.StatusCode.INTERNAL, "Stub process", ServerUnavailableError),
)
"""Where Triton gives one status to unlike things, and only its words tell them apart."""


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What a server says about itself."""

    name: str
    version: str


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One tower as a server offers it."""

    name: str
    input_name: str
    input_type: str
    """In the words of the protocol: UINT8, INT32."""
    input_dims: tuple[int, ...]
    """Without the batch axis; -1 is any length."""
    embedding_dim: int
    max_batch_size: int
    manifest: Manifest


class Transport:
    """A connection to one server, opened at the first call.

    Thread-safe. In a forked child it opens a connection of its own.

    Args:
        url: host:port of Triton's gRPC endpoint; grpcs://host:port for TLS.
        headers: Sent with every request.
        retry_policy: For faults that pass by themselves.
        may_cancel: Whether the server is told when a call is given up. Triton 2.51 can crash of
            that; such a server finishes in vain instead.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        retry_policy: RetryPolicy | None = None,
        may_cancel: bool = True,
    ) -> None:
        self.url = url
        self._may_cancel = may_cancel
        self._target, self._is_secure = parse_url(url)
        self._headers = tuple((headers or {}).items())
        self._retry_policy = retry_policy or RetryPolicy()
        self._lock = threading.Lock()
        self._channel: Any = None
        self._stub: Any = None
        self._given_up: set[Any] = set()
        self._is_closed = False
        _transports.add(self)

    def read_server(self, *, timeout_s: float) -> ServerFacts:
        """Ask the server for its name and version.

        Raises:
            ServerError: no answer, or none of this protocol.
        """
        request = service_pb2.ServerMetadataRequest()
        answer = self._ask("ServerMetadata", request, Deadline.after(timeout_s))
        return ServerFacts(name=answer.name, version=answer.version)

    def is_ready(self, *, timeout_s: float) -> bool:
        """Ask whether the server and all its models are ready.

        Raises:
            ServerError: no answer.
        """
        request = service_pb2.ServerReadyRequest()
        return bool(self._ask("ServerReady", request, Deadline.after(timeout_s)).ready)

    def list_models(self, deadline: Deadline) -> tuple[str, ...]:
        """List the Triton models that are ready.

        Raises:
            InferenceError: the server does not tell.
            ServerError: no answer.
        """
        request = service_pb2.RepositoryIndexRequest(ready=True)
        answer = self._ask("RepositoryIndex", request, deadline)
        return tuple(sorted(model.name for model in answer.models))

    def describe(self, names: Iterable[str], deadline: Deadline) -> tuple[ServedModel, ...]:
        """Read the configuration and the manifest of Triton models, all at once.

        Raises:
            UnknownModelError: the server has no such model.
            ContractError: a model carries no manifest, or contradicts it.
            ServerError: no answer.
        """
        names = tuple(names)
        pending = [
            self._send("ModelConfig", service_pb2.ModelConfigRequest(name=name), deadline)
            for name in names
        ]
        try:
            answers = [self._receive(future, deadline) for future in pending]
        except InferenceError as error:
            if _code(error.__cause__) is not grpc.StatusCode.NOT_FOUND:
                raise
            raise UnknownModelError(
                f"{self.url} serves no {' with '.join(names)}: {error}", model=None, known=()
            ) from error
        return tuple(_read_config(answer.config) for answer in answers)

    def infer(
        self, model: ServedModel, array: NDArray[Any], deadline: Deadline
    ) -> NDArray[np.float32]:
        """Embed one batch; as `stream`."""
        (embeddings,) = self.stream(model, (array,), deadline)
        return embeddings

    def stream(
        self,
        model: ServedModel,
        batches: Iterable[NDArray[Any]],
        deadline: Deadline,
        *,
        recheck: Callable[[Deadline], None] | None = None,
    ) -> Generator[NDArray[np.float32], None, None]:
        """Embed batches one after another, with at most `MAX_IN_FLIGHT` on their way.

        Args:
            model: As `describe` returned it.
            batches: Arrays the model reads, of at most `max_batch_size` rows; taken as needed.
            deadline: For all of them.
            recheck: Called before a batch is sent again to a server that had been away, which may
                have come back as another.

        Yields:
            float32 (n, D) for each batch of n rows, in order, each row of length 1.

        Raises:
            ServerError: see `ERROR_BY_CODE`; the requests on their way are cancelled.
            ProtocolError: the answer is malformed.
            NonFiniteEmbeddingError: an embedding is no direction; carries its row in the stream.
        """
        in_flight: deque[_Flight] = deque()
        first_row = 0
        try:
            for batch in batches:
                future = self._send("ModelInfer", _make_request(model, batch, deadline), deadline)
                in_flight.append(_Flight(future, batch, first_row))
                first_row += len(batch)
                if len(in_flight) == MAX_IN_FLIGHT:
                    embeddings = self._land(model, in_flight[0], deadline, recheck)
                    in_flight.popleft()
                    yield embeddings
            while in_flight:
                embeddings = self._land(model, in_flight[0], deadline, recheck)
                in_flight.popleft()
                yield embeddings
        finally:
            for flight in in_flight:
                self._give_up(flight.future)

    def close(self) -> None:
        """Close the connection; calls on their way end with `ClientClosedError`."""
        with self._lock:
            self._is_closed = True
            channel, self._channel = self._channel, None
            if channel is not None:
                # It waits until every call has ended, and one whose start was interrupted by
                # Ctrl-C never does.
                closing = threading.Thread(target=channel.close, daemon=True)
                closing.start()
                closing.join(CLOSE_TIMEOUT_S)

    def retry(self, attempt: Callable[[], Answer], deadline: Deadline) -> Answer:
        """Call `attempt` as often as the retry policy allows."""
        return self._retry_policy.call(attempt, deadline)

    def _land(
        self,
        model: ServedModel,
        flight: _Flight,
        deadline: Deadline,
        recheck: Callable[[Deadline], None] | None,
    ) -> NDArray[np.float32]:
        num_tries = itertools.count()

        def attempt() -> NDArray[np.float32]:
            if next(num_tries) > 0:
                if recheck is not None:
                    recheck(deadline)
                request = _make_request(model, flight.batch, deadline)
                flight.future = self._send("ModelInfer", request, deadline)
            answer = self._receive(flight.future, deadline)
            return _read_embeddings(answer, model, flight, self.url)

        return self.retry(attempt, deadline)

    def _ask(self, method: str, request: Any, deadline: Deadline) -> Any:
        return self._receive(self._send(method, request, deadline), deadline)

    def _send(self, method: str, request: Any, deadline: Deadline) -> Any:
        remaining_s = deadline.remaining_s()
        if remaining_s <= 0:
            raise self._time_out(deadline)
        try:
            return getattr(self._open(), method).future(
                request,
                timeout=remaining_s if self._may_cancel else remaining_s + LINGER_S,
                metadata=self._headers,
            )
        except ValueError as error:  # What gRPC says of a channel that was closed meanwhile.
            raise ClientClosedError("the client was closed during the call.") from error

    def _receive(self, future: Any, deadline: Deadline) -> Any:
        try:
            return future.result(timeout=max(deadline.remaining_s(), 0.0) + GRACE_S)
        except grpc.FutureTimeoutError as error:
            self._give_up(future)
            raise self._time_out(deadline) from error
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            if self._is_closed:
                raise ClientClosedError("the client was closed during the call.") from error
            raise self._translate(error, deadline) from error
        except BaseException:  # Ctrl-C: the server need not finish what nobody waits for.
            self._give_up(future)
            raise

    def _give_up(self, future: Any) -> None:
        if self._may_cancel or len(self._given_up) >= MAX_GIVEN_UP:
            future.cancel()
            return
        # Held until it ends: gRPC cancels what nobody holds.
        self._given_up.add(future)
        future.add_done_callback(self._given_up.discard)

    def _translate(self, error: Any, deadline: Deadline) -> ServerError:
        code, details = _code(error), _details(error)
        kind = ERROR_BY_CODE.get(code, InferenceError)
        for its_code, words, its_kind in ERROR_BY_MESSAGE:
            if code is its_code and words in details:
                kind = its_kind
        if kind is ServerTimeoutError:
            return self._time_out(deadline)
        message = f"{self.url}: {details or code}"
        if kind is ProtocolError:
            message += " Is this the gRPC port (8001) of a Triton server?"
        if "shared memory" in details:
            message += " Give the server more of it: docker run --shm-size=1g."
        return kind(message, url=self.url)

    def _time_out(self, deadline: Deadline) -> ServerTimeoutError:
        if self._may_cancel:
            # The connection may be dead without knowing it; the next call opens another.
            with self._lock:
                self._channel = None
        return ServerTimeoutError(
            f"{self.url} did not answer within {deadline.timeout_s:g} s. Allow more with "
            "timeout_s=, or send less at a time.",
            url=self.url,
            timeout_s=deadline.timeout_s,
        )

    def _open(self) -> Any:
        with self._lock:
            if self._is_closed:
                raise ClientClosedError("the client is closed. Make a new one.")
            if self._channel is None:
                self._channel = _open_channel(self._target, is_secure=self._is_secure)
                self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
            return self._stub

    def _forget(self) -> None:
        """Start over in a forked child: the parent's channel is neither usable nor ours to close.

        It is kept, because gRPC may hang when it destroys one.
        """
        _of_parents.append(self._channel)
        self._lock = threading.Lock()
        self._channel = None


@dataclass
class _Flight:
    """A request on its way, and what it takes to send it again."""

    future: Any
    batch: NDArray[Any]
    first_row: int


_transports: weakref.WeakSet[Transport] = weakref.WeakSet()
_of_parents: list[Any] = []


def _forget_in_child() -> None:
    for transport in _transports:
        transport._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def parse_url(url: str) -> tuple[str, bool]:
    """Split a url into what gRPC dials and whether it is TLS.

    Raises:
        InputError: it is no host:port.
    """
    match = re.fullmatch(r"(grpcs?://)?((?:dns:///)?[^/\s@]+:\d{1,5})", url)
    if match is None:
        raise InputError(
            f"url {url[:80]!r} is not host:port. Name Triton's gRPC endpoint, like localhost:8001, "
            "or grpcs://host:port for TLS."
        )
    return match[2], match[1] == "grpcs://"


def _open_channel(target: str, *, is_secure: bool) -> Any:
    host = target.rpartition(":")[0].removeprefix("dns:///").strip("[]")
    is_loopback = host in ("localhost", "::1") or host.startswith("127.")
    options = (
        ("grpc.max_send_message_length", MAX_SEND_BYTES),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # Or closing one client's connection would be felt by another's.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", int(not is_loopback)),
    )
    if is_secure:
        return grpc.secure_channel(target, grpc.ssl_channel_credentials(), options)
    return grpc.insecure_channel(target, options)


def _code(error: object) -> Any:
    code = getattr(error, "code", None)
    return code() if callable(code) else grpc.StatusCode.CANCELLED


def _details(error: object) -> str:
    details = getattr(error, "details", None)
    text = details() if callable(details) else None
    return (text or "").strip()[:1000]


def _make_request(model: ServedModel, batch: NDArray[Any], deadline: Deadline) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model.name)
    request.inputs.add(name=model.input_name, datatype=model.input_type, shape=batch.shape)
    request.outputs.add(name=EMBEDDINGS)
    request.raw_input_contents.append(batch.tobytes())
    # Triton drops what has waited so long that nobody wants it any more.
    request.parameters["timeout"].int64_param = max(1, int(deadline.remaining_s() * 1e6))
    return request


def _read_embeddings(
    answer: Any, model: ServedModel, flight: _Flight, url: str
) -> NDArray[np.float32]:
    expected = [(EMBEDDINGS, "FP32", [len(flight.batch), model.embedding_dim])]
    found = [(each.name, each.datatype, list(each.shape)) for each in answer.outputs]
    num_bytes = 4 * len(flight.batch) * model.embedding_dim
    if found != expected or [len(raw) for raw in answer.raw_output_contents] != [num_bytes]:
        raise ProtocolError(
            f"{model.name} at {url} answered {found} with "
            f"{[len(raw) for raw in answer.raw_output_contents]} bytes; expected is {expected} "
            f"with {[num_bytes]} bytes.",
            url=url,
        )
    embeddings = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(expected[0][2])
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    (bad,) = np.nonzero(~(norms > MIN_NORM) | ~np.isfinite(norms))
    if len(bad):
        raise NonFiniteEmbeddingError(
            f"{model.name} at {url} answered an embedding of length {norms[bad[0]]:g} for item "
            f"{flight.first_row + bad[0]}. The exported model is broken; export it again.",
            url=url,
            index=int(flight.first_row + bad[0]),
        )
    drift = float(np.abs(norms - 1).max(initial=0))
    if drift > NORM_TOLERANCE:
        raise ProtocolError(
            f"{model.name} at {url} answered embeddings whose length differs from 1 by {drift:.2g};"
            f" {NORM_TOLERANCE:g} is allowed. Export it again with python -m export.onnx.",
            url=url,
        )
    return embeddings.astype(np.float32)


def _read_config(config: Any) -> ServedModel:
    """Turn Triton's configuration of a model into ours, checking that the two agree."""
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    manifest = Manifest.from_parameters(parameters, served=config.name)
    outputs = [(each.name, each.data_type, list(each.dims)) for each in config.output]
    expected = [(EMBEDDINGS, model_config_pb2.TYPE_FP32, [manifest.embedding_dim])]
    if outputs != expected or len(config.input) != 1 or config.max_batch_size < 1:
        raise ContractError(
            f"Triton model {config.name!r} has outputs {outputs}, {len(config.input)} inputs and "
            f"max_batch_size {config.max_batch_size}; its manifest promises {expected}, 1 input "
            "and batches. Export it again.",
            expected=expected,
            found=outputs,
        )
    (input_config,) = config.input
    type_name = model_config_pb2.DataType.Name(input_config.data_type)
    return ServedModel(
        name=config.name,
        input_name=input_config.name,
        input_type=type_name.removeprefix("TYPE_"),
        input_dims=tuple(input_config.dims),
        embedding_dim=manifest.embedding_dim,
        max_batch_size=config.max_batch_size,
        manifest=manifest,
    )
