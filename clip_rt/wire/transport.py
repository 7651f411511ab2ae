"""One server: arrays in, checked embeddings out, over gRPC.

Every request ends by its deadline with an answer or one of our errors. Nothing is tried twice here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from clip_rt import fork
from clip_rt.deadline import Deadline
from clip_rt.errors import (
    ClientClosedError,
    ClipRTError,
    InferenceError,
    ProtocolError,
    ServerTimeoutError,
    ServerUnavailableError,
    UnknownModelError,
)
from clip_rt.wire.channel import TLS, open_channel, parse_url, stops_greenlets
from clip_rt.wire.messages import (
    ServedModel,
    ServerFacts,
    ServerStatistics,
    make_chunk_request,
    read_chunk,
    read_config,
    read_rows,
    read_statistics,
)
from clip_rt.wire.status import find_error_type, make_error, read_code

CHANNEL_CLOSE_TIMEOUT_S = 1.0
"""For gRPC to end the calls of a channel that is closed."""
DEADLINE_GRACE_S = 0.05
"""Waited beyond a deadline for gRPC's own notice that it has passed."""
ABANDONED_CALL_TIMEOUT_S = 30.0
"""How long a call goes on beyond its deadline where the server must not be told of it."""
MAX_ABANDONED_CALLS = 256
"""Such calls at a time; beyond, the server is told after all."""

Future: TypeAlias = Any
"""Of one request, from gRPC, which has no types."""


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
        fork.restart_in_child(self, type(self)._forget)

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

    def describe(
        self,
        names: Iterable[str],
        deadline: Deadline,
        read: Callable[[Any], ServedModel] = read_config,
    ) -> tuple[ServedModel, ...]:
        """Read the configuration and the manifest of Triton models, all at once.

        Args:
            names: Of the models.
            deadline: For all of them.
            read: What makes ours of a configuration.

        Raises:
            UnknownModelError: the server has no such model.
            ContractError: a model carries no manifest, or contradicts it.
            ServerUnavailableError: no answer, or it takes no requests for them now: a Triton that
                drains goes on telling its configuration.
            ServerError: see `status.ERROR_BY_CODE`.
        """
        names = tuple(names)
        pending = [
            self.send("ModelConfig", service_pb2.ModelConfigRequest(name=name), deadline)
            for name in names
        ]
        ready = [
            self.send("ModelReady", service_pb2.ModelReadyRequest(name=name), deadline)
            for name in names
        ]
        try:
            answers = [self._receive(future, deadline) for future in pending]
            for name, future in zip(names, ready, strict=True):
                if not self._receive(future, deadline).ready:
                    raise ServerUnavailableError(
                        f"{name} at {self.url} is not ready.", url=self.url
                    )
            return tuple(read(answer.config) for answer in answers)
        except InferenceError as error:
            if read_code(error.__cause__) is not grpc.StatusCode.NOT_FOUND:
                raise
            raise UnknownModelError(
                f"{self.url} serves no {' with '.join(names)}: {error}", model=None, known=()
            ) from error
        except ClipRTError:
            raise
        except Exception as error:
            raise ProtocolError(
                f"{self.url} describes its models in a way that cannot be read: {error!r:.300}",
                url=self.url,
            ) from error

    def dial(self) -> int:
        """Make sure of a connection, and return its generation.

        Raises:
            ClientClosedError: it was closed.
        """
        self._open()
        return self.generation

    def read_statistics(
        self, names: Iterable[str], deadline: Deadline
    ) -> dict[str, ServerStatistics]:
        """Read what the server has counted for models since it started, whoever asked it.

        It counts a request a moment after it has answered it.

        Raises:
            ServerError: no answer, or it does not tell.
        """
        pending = {
            name: self.send(
                "ModelStatistics", service_pb2.ModelStatisticsRequest(name=name), deadline
            )
            for name in names
        }
        return {
            name: read_statistics(self._receive(future, deadline))
            for name, future in pending.items()
        }

    def read_chunk(self, name: str, index: int, deadline: Deadline) -> bytes:
        """Read one part of the file that a Triton model hands out.

        Raises:
            ServerError: no answer, or no such model.
            ProtocolError: the answer is malformed.
        """
        answer = self._ask("ModelInfer", make_chunk_request(name, index), deadline)
        return read_chunk(answer, name, self.url)

    def send(
        self,
        method: str,
        request: Any,
        deadline: Deadline,
        *,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> Future:
        """Send one request and return at once; `read` waits for the answer of a batch.

        Args:
            method: Of Triton's gRPC service.
            request: Its message.
            deadline: When the answer must be here.
            headers: Of this request only, beside those of all.

        Raises:
            ServerTimeoutError, ClientClosedError: it cannot be sent any more.
        """
        remaining_s = deadline.remaining_s()
        if remaining_s <= 0:
            raise self.time_out(deadline)
        try:
            # Where only gRPC can notice that a deadline is over, it must.
            is_left_to_grpc = self._may_cancel or stops_greenlets()
            future = getattr(self._open(), method).future(
                request,
                timeout=remaining_s if is_left_to_grpc else remaining_s + ABANDONED_CALL_TIMEOUT_S,
                metadata=(*self._headers, *headers),
            )
            self._pending.add(future)
            future.add_done_callback(self._pending.discard)
            return future
        except ValueError as error:  # What gRPC says of a channel that was closed meanwhile.
            raise ClientClosedError("the client was closed during the call.") from error

    def read(
        self, future: Future, model: ServedModel, num_rows: int, deadline: Deadline
    ) -> tuple[NDArray[np.float32], list[int]]:
        """Read the answer of a request, and say which rows are NaN, infinite or zero.

        Raises:
            ServerError: see `status.ERROR_BY_CODE`.
            ProtocolError: the answer is malformed.
        """
        answer = self._receive(future, deadline)
        return read_rows(answer, model, num_rows, self.url)

    def give_up(self, future: Future) -> None:
        """Forget a request nobody waits for; the server is told where that is safe."""
        if self._may_cancel or len(self._given_up) >= MAX_ABANDONED_CALLS:
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

    def close(self) -> None:
        """Close the connection; calls on their way end with `ClientClosedError`."""
        self._is_closed = True
        # It may wait for ever: for what Ctrl-C left locked within gRPC, or a call left half begun.
        closing = threading.Thread(target=self._hang_up, daemon=True)
        closing.start()
        closing.join(CHANNEL_CLOSE_TIMEOUT_S)

    def _hang_up(self) -> None:
        with self._lock:
            channel, self._channel = self._channel, None
        # Those on a connection that was given up before end by this alone.
        for future in self._pending.copy():
            future.cancel()
        # Without the lock, for which callbacks of the calls that end now may wait.
        if channel is not None:
            channel.close()

    def _ask(self, method: str, request: Any, deadline: Deadline) -> Any:
        return self._receive(self.send(method, request, deadline), deadline)

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
            if find_error_type(error) is ServerTimeoutError:
                raise self.time_out(deadline) from error
            raise make_error(error, self.url) from error

    def _wait(self, future: Future, deadline: Deadline) -> None:
        """Wait until a request is done, however it ended."""
        try:
            future.exception(timeout=max(deadline.remaining_s(), 0.0) + DEADLINE_GRACE_S)
        except grpc.FutureCancelledError:
            return
        except grpc.FutureTimeoutError as error:
            self.give_up(future)
            raise self.time_out(deadline) from error
        except BaseException:  # Ctrl-C: the server need not finish what nobody waits for.
            self.give_up(future)
            raise

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
_of_parents: list[Any] = []
