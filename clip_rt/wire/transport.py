"""One server: arrays in, checked embeddings out, over gRPC; what speaks Triton's protocol.

Every request ends by its deadline with an answer or one of our errors. Nothing is tried twice here.

Source: kserve/open-inference-protocol `specification/protocol/inference_grpc.md`; Triton's
additions in triton-inference-server/common `protobuf/grpc_service.proto`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from clip_rt import fork
from clip_rt.deadline import Deadline
from clip_rt.errors import (
    ClientClosedError,
    ClipRTError,
    ContractError,
    InferenceError,
    MessageTooLongError,
    NonFiniteEmbeddingError,
    ProtocolError,
    ServerError,
    ServerOverloadedError,
    ServerTimeoutError,
    ServerUnavailableError,
    UnknownModelError,
)
from clip_rt.specs import EMBEDDINGS, NORM_TOLERANCE
from clip_rt.wire.channel import TLS, open_channel, parse_url, stops_greenlets
from clip_rt.wire.manifest import Manifest

CLOSE_TIMEOUT_S = 1.0
MIN_NORM = 1e-6
GRACE_S = 0.05
"""Waited beyond the deadline for gRPC's own notice that it has passed."""
LINGER_S = 30.0
"""How long a server that must not be told goes on with a call that was given up."""
MAX_GIVEN_UP = 256
"""Such calls at a time; beyond, the server is told after all."""

Future: TypeAlias = Any
"""Of one request, from gRPC, which has no types."""

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
    version: str = field(default="", compare=False)
    """The only one that the server has of it, where its configuration says so."""
    runs_on: str = field(default="", compare=False)
    """Backend, instances and execution providers, in words, as far as a server tells."""


@dataclass(frozen=True, kw_only=True)
class ServerStatistics:
    """What a server has counted for one model since it started."""

    num_requests: int
    num_rows: int
    num_batches: int
    """Runs of the model; fewer than requests where the server has joined some."""
    queue_s: float
    """Spent waiting, summed over the requests."""
    compute_s: float
    """Spent in the model, summed over the requests."""


class Transport:
    """A connection to one server, opened at the first call.

    Thread-safe. In a forked child it opens a connection of its own.

    Args:
        url: host:port of Triton's gRPC endpoint; grpcs://host:port for TLS.
        headers: Sent with every request.
        tls: How to trust a grpcs:// server; None is as this system does.
        may_cancel: Whether the server is told when a call is given up. Triton 2.51 can crash of
            that; such a server finishes in vain instead.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        tls: TLS | None = None,
        may_cancel: bool = True,
    ) -> None:
        self.url = url
        self._may_cancel = may_cancel
        self._target, self._is_secure = parse_url(url)
        self._headers = tuple((headers or {}).items())
        self._tls = tls or TLS()
        self._lock = threading.Lock()
        self._channel: Any = None
        self._stub: Any = None
        self._was_ready = False
        self._generation = 0
        self._pending: set[Future] = set()
        self._given_up: set[Future] = set()
        self._is_closed = False
        _transports.add(self)

    @property
    def generation(self) -> int:
        """Changes when requests may go to another server than before, but for those of one name."""
        with self._lock:
            if self._channel is not None:
                self._look()
            return self._generation

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
        pending = [self._ask_config(name, deadline) for name in names]
        return self._read_configs(names, pending, deadline)

    def dial(self) -> int:
        """Make sure of a connection, and return its generation.

        Raises:
            ClientClosedError: it was closed.
        """
        self._open()
        return self.generation

    def describe_later(
        self,
        names: tuple[str, ...],
        deadline: Deadline,
        on_done: Callable[[tuple[ServedModel, ...] | ClipRTError], None],
    ) -> None:
        """Ask as `describe` does without waiting; what comes of it is told to `on_done`, once.

        From a thread of gRPC's, or from this one when the request cannot even be sent.
        """
        lock, left = threading.Lock(), len(names)

        def count(_: Any) -> None:
            nonlocal left
            with lock:
                left -= 1
                if left:
                    return
            outcome: tuple[ServedModel, ...] | ClipRTError
            try:
                outcome = self._read_configs(names, pending, deadline)
            except ClipRTError as error:
                outcome = error
            except Exception as error:  # Or the caller would wait for nothing.
                outcome = ProtocolError(
                    f"{self.url} describes its models in a way that cannot be read: {error!r:.300}",
                    url=self.url,
                )
            on_done(outcome)

        try:
            pending = [self._ask_config(name, deadline) for name in names]
        except ClipRTError as error:
            on_done(error)
            return
        for future in pending:
            future.add_done_callback(count)

    def read_statistics(
        self, names: Iterable[str], deadline: Deadline
    ) -> dict[str, ServerStatistics]:
        """Read what the server has counted for models since it started, whoever asked it.

        It counts a request a moment after it has answered it.

        Raises:
            ServerError: no answer, or it does not tell.
        """
        requests = {name: service_pb2.ModelStatisticsRequest(name=name) for name in names}
        pending = {
            name: self._send("ModelStatistics", request, deadline)
            for name, request in requests.items()
        }
        return {
            name: _read_statistics(self._receive(future, deadline))
            for name, future in pending.items()
        }

    def infer(
        self, model: ServedModel, array: NDArray[Any], deadline: Deadline
    ) -> NDArray[np.float32]:
        """Embed one batch.

        Args:
            model: As `describe` returned it.
            array: What the model reads, of at most `max_batch_size` rows.
            deadline: When to give up.

        Returns:
            float32 (N, D) for N rows, each of length 1.

        Raises:
            ServerError: see `ERROR_BY_CODE`.
            ProtocolError: the answer is malformed.
            NonFiniteEmbeddingError: an embedding is no direction; carries its row.
        """
        embeddings, bad_rows = self.read(
            self.send(model, array, deadline), model, len(array), deadline
        )
        for row in bad_rows:
            raise self.blame_row(model, embeddings, row)
        return embeddings

    def send(self, model: ServedModel, array: NDArray[Any], deadline: Deadline) -> Future:
        """Send one batch and return at once; its answer is for `read`, when it is done.

        Raises:
            ServerTimeoutError, ClientClosedError: it cannot be sent any more.
        """
        return self._send("ModelInfer", _make_request(model, array, deadline), deadline)

    def read(
        self, future: Future, model: ServedModel, num_rows: int, deadline: Deadline
    ) -> tuple[NDArray[np.float32], list[int]]:
        """Read the answer of a request, and say which rows are NaN, infinite or zero.

        Raises:
            ServerError: see `ERROR_BY_CODE`.
            ProtocolError: the answer is malformed.
        """
        answer = self._receive(future, deadline)
        return _read_embeddings(answer, model, num_rows, self.url)

    def give_up(self, future: Future) -> None:
        """Forget a request nobody waits for; the server is told where that is safe."""
        if self._may_cancel or len(self._given_up) >= MAX_GIVEN_UP:
            future.cancel()
            return
        # Held until it ends: gRPC cancels what nobody holds.
        self._given_up.add(future)
        future.add_done_callback(self._given_up.discard)

    def time_out(self, deadline: Deadline) -> ServerTimeoutError:
        """Return the error of a request that was not answered in time; the next one dials anew."""
        if self._may_cancel:
            # The connection may be dead without knowing it.
            with self._lock:
                self._channel = None
        return self._late(deadline)

    def _late(self, deadline: Deadline) -> ServerTimeoutError:
        return ServerTimeoutError(
            f"{self.url} did not answer within {deadline.timeout_s:g} s. Allow more with "
            "timeout_s=, or send less at a time.",
            url=self.url,
            timeout_s=deadline.timeout_s,
        )

    def blame_row(
        self,
        model: ServedModel,
        embeddings: NDArray[np.float32],
        row: int,
        *,
        item: int | None = None,
    ) -> NonFiniteEmbeddingError:
        """Return the error of a row that is no direction; `item` is the caller's number for it."""
        index = row if item is None else item
        return NonFiniteEmbeddingError(
            f"{model.name} at {self.url} answered an embedding of length "
            f"{np.linalg.norm(embeddings[row]):g} for item {index}. The exported model is broken; "
            "export it again.",
            url=self.url,
            index=index,
        )

    def close(self) -> None:
        """Close the connection; calls on their way end with `ClientClosedError`."""
        with self._lock:
            self._is_closed = True
            channel, self._channel = self._channel, None
        # Those on a connection that was given up before end by this alone.
        for future in self._pending.copy():
            future.cancel()
        # Without the lock, for which callbacks of the calls that end now may wait.
        if channel is not None:
            # It waits until every call has ended, and one whose start was interrupted by Ctrl-C
            # never does.
            closing = threading.Thread(target=channel.close, daemon=True)
            closing.start()
            closing.join(CLOSE_TIMEOUT_S)

    def _ask_config(self, name: str, deadline: Deadline) -> Future:
        return self._send("ModelConfig", service_pb2.ModelConfigRequest(name=name), deadline)

    def _read_configs(
        self, names: tuple[str, ...], pending: list[Future], deadline: Deadline
    ) -> tuple[ServedModel, ...]:
        try:
            answers = [self._receive(future, deadline) for future in pending]
        except InferenceError as error:
            if _code(error.__cause__) is not grpc.StatusCode.NOT_FOUND:
                raise
            raise UnknownModelError(
                f"{self.url} serves no {' with '.join(names)}: {error}", model=None, known=()
            ) from error
        return tuple(_read_config(answer.config) for answer in answers)

    def _ask(self, method: str, request: Any, deadline: Deadline) -> Any:
        return self._receive(self._send(method, request, deadline), deadline)

    def _send(self, method: str, request: Any, deadline: Deadline) -> Any:
        remaining_s = deadline.remaining_s()
        if remaining_s <= 0:
            raise self.time_out(deadline)
        try:
            # Where only gRPC can notice that a deadline is over, it must.
            is_left_to_grpc = self._may_cancel or stops_greenlets()
            future = getattr(self._open(), method).future(
                request,
                timeout=remaining_s if is_left_to_grpc else remaining_s + LINGER_S,
                metadata=self._headers,
            )
            self._pending.add(future)
            future.add_done_callback(self._pending.discard)
            return future
        except ValueError as error:  # What gRPC says of a channel that was closed meanwhile.
            raise ClientClosedError("the client was closed during the call.") from error

    def _receive(self, future: Future, deadline: Deadline) -> Any:
        self._wait(future, deadline)
        try:
            return future.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            if self._is_closed:
                raise ClientClosedError("the client was closed during the call.") from error
            if isinstance(error, grpc.FutureCancelledError):
                # Given up here, because nobody had time for it: that the server is away it is not.
                raise self._late(deadline) from error
            raise self._translate(error, deadline) from error

    def _wait(self, future: Future, deadline: Deadline) -> None:
        """Wait until a request is done, however it ended."""
        try:
            future.exception(timeout=max(deadline.remaining_s(), 0.0) + GRACE_S)
        except grpc.FutureCancelledError:
            return
        except grpc.FutureTimeoutError as error:
            self.give_up(future)
            raise self.time_out(deadline) from error
        except BaseException:  # Ctrl-C: the server need not finish what nobody waits for.
            self.give_up(future)
            raise

    def _translate(self, error: Any, deadline: Deadline) -> ServerError:
        code, details = _code(error), _details(error)
        kind = ERROR_BY_CODE.get(code, InferenceError)
        for its_code, words, its_kind in ERROR_BY_MESSAGE:
            if code is its_code and words in details:
                kind = its_kind
        if kind is ServerTimeoutError:
            return self.time_out(deadline)
        message = f"{self.url}: {details or code}"
        if kind is ServerUnavailableError:
            return kind(message, url=self.url, was_reached=_NEVER_REACHED not in details)
        if issubclass(kind, InferenceError):
            return kind(message, url=self.url, may_be_one_item=code in _OF_ITEMS)
        if kind is ProtocolError:
            message += " Is this the gRPC port (8001) of a Triton server?"
        if "shared memory" in details:
            message += " Give the server more of it: docker run --shm-size=1g."
        return kind(message, url=self.url)

    def _open(self) -> Any:
        with self._lock:
            if self._is_closed:
                raise ClientClosedError("the client is closed. Make a new one.")
            if self._channel is None:
                self._channel = open_channel(
                    self._target, tls=self._tls if self._is_secure else None
                )
                self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
                self._generation += 1
                self._was_ready = False
            self._look()
            return self._stub

    def _look(self) -> None:
        """Notice a lost connection; gRPC makes no other before the next request."""
        # Asked, not subscribed to: that takes a thread which is always within gRPC, and then no
        # process may fork. It is not public; without it, only the time tells.
        check = getattr(getattr(self._channel, "_channel", None), "check_connectivity_state", None)
        is_ready = check is not None and check(False) == _READY
        self._generation += int(self._was_ready and not is_ready)
        self._was_ready = is_ready

    def _forget(self) -> None:
        """Start over in a forked child: the parent's channel is neither usable nor ours to close.

        It is kept, because gRPC may hang when it destroys one.
        """
        _of_parents.append(self._channel)
        self._lock = threading.Lock()
        self._channel = None


_READY = grpc.ChannelConnectivity.READY.value[0]
_NEVER_REACHED = "failed to connect"
"""gRPC's words where no byte of a request has left."""
_OF_ITEMS = {
    *(grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.UNKNOWN),
    *(grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED),
}
"""Refusals that may be one row's fault, or a message's that is too long: less of it may pass."""


_transports: weakref.WeakSet[Transport] = weakref.WeakSet()
_of_parents: list[Any] = []


def _forget_in_child() -> None:
    for transport in _transports:
        transport._forget()


fork.register("transport", in_child=_forget_in_child)


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
    answer: Any, model: ServedModel, num_rows: int, url: str
) -> tuple[NDArray[np.float32], list[int]]:
    expected = [(EMBEDDINGS, "FP32", [num_rows, model.embedding_dim])]
    found = [(each.name, each.datatype, list(each.shape)) for each in answer.outputs]
    num_bytes = 4 * num_rows * model.embedding_dim
    if found != expected or [len(raw) for raw in answer.raw_output_contents] != [num_bytes]:
        raise ProtocolError(
            f"{model.name} at {url} answered {found} with "
            f"{[len(raw) for raw in answer.raw_output_contents]} bytes; expected is {expected} "
            f"with {[num_bytes]} bytes.",
            url=url,
        )
    embeddings = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(expected[0][2])
    norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    is_direction = np.isfinite(norms) & (norms > MIN_NORM)
    drift = float(np.abs(norms - 1)[is_direction].max(initial=0))
    if drift > NORM_TOLERANCE:
        raise ProtocolError(
            f"{model.name} at {url} answered embeddings whose length differs from 1 by {drift:.2g};"
            f" {NORM_TOLERANCE:g} is allowed. Export it again with python -m export.onnx.",
            url=url,
        )
    return embeddings.astype(np.float32), [int(row) for row in np.nonzero(~is_direction)[0]]


def _read_statistics(answer: Any) -> ServerStatistics:
    (counted,) = answer.model_stats
    stages = counted.inference_stats
    return ServerStatistics(
        num_requests=stages.success.count,
        num_rows=counted.inference_count,
        num_batches=counted.execution_count,
        queue_s=stages.queue.ns / 1e9,
        compute_s=(stages.compute_input.ns + stages.compute_infer.ns + stages.compute_output.ns)
        / 1e9,
    )


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
        version=_read_only_version(config),
        runs_on=_describe_execution(config, parameters, manifest.precision),
    )


def _read_only_version(config: Any) -> str:
    versions = config.version_policy.specific.versions
    return str(versions[0]) if len(versions) == 1 else ""


def _describe_execution(config: Any, parameters: Mapping[str, str], precision: str) -> str:
    """Say what runs a model: what Triton's configuration decides, and that it does not the rest."""
    kinds = {kind: name for name, kind in model_config_pb2.ModelInstanceGroup.Kind.items()}
    backend = config.backend or config.platform
    words = f"the {backend} backend"
    for group in config.instance_group:
        words += f", {group.count} on {kinds.get(group.kind, '?').removeprefix('KIND_')}"
    if "execution_providers" in parameters:
        words += f", execution providers {parameters['execution_providers'][:200]}"
    if backend.startswith("onnxruntime"):
        words += " (which execution provider took it, only the server's log says)"
    on_processor = any(kinds.get(group.kind) == "KIND_CPU" for group in config.instance_group)
    if backend == "python" and on_processor and "execution_providers" not in parameters:
        runtime = parameters.get("runtime", "auto")
        if precision == "int8":
            words += ", runtime openvino"
        elif runtime == "auto":
            words += (
                ", runtime auto (the faster of OpenVINO and ONNX Runtime there: the server's log "
                "says which)"
            )
        else:
            words += f", runtime {runtime[:40]}"
    return words
