"""The models of a repository run in this process: what a Triton would answer, without one.

For notebooks, command lines, and machines for which there is no embedded Triton: macOS, Windows,
Arm. Requests and answers are Triton's own messages, so that all else of the client is the same. A
tower is loaded when it is first asked for, once for all clients of this process.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import triton_to_np_dtype

from clip_rt import fork
from clip_rt._version import __version__
from clip_rt.embedded import runtimes
from clip_rt.embedded.installation import find_models
from clip_rt.embedded.memory import find_own_bytes
from clip_rt.errors import ClientClosedError, ServerStartError
from clip_rt.specs import CHUNK, TOKENIZER_CHUNK_BYTES, TOKENIZER_FILE
from clip_rt.wire.model_config import ModelConfig, read_config
from clip_rt.wire.transport import Transport

NAME = "in process"
"""What this server calls itself."""

MAX_END_S = 60.0
"""Longest wait for a batch that is still under way when the process ends."""

_log = logging.getLogger(__name__)


class _RefusedError(grpc.RpcError):  # type: ignore[misc]
    """What gRPC would raise, had a server said it."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._code = code

    def code(self) -> grpc.StatusCode:
        """Return the status."""
        return self._code

    def details(self) -> str:
        """Return the words."""
        return str(self)


class _Future(concurrent.futures.Future[Any]):
    """A future that raises as gRPC's does."""

    def result(self, timeout: float | None = None) -> Any:
        """Return the answer."""
        return self._translated(super().result, timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what was raised instead of an answer."""
        found: BaseException | None = self._translated(super().exception, timeout)
        return found

    def cancel(self) -> bool:
        """End it for whoever waits; what runs already runs on."""
        if not super().cancel() and not self.done():
            self.finish(error=grpc.FutureCancelledError())
        return True

    def finish(self, answer: Any = None, error: BaseException | None = None) -> None:
        """Set what came of it, unless it was called off meanwhile."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(answer)

    @staticmethod
    def _translated(call: Callable[[float | None], Any], timeout: float | None) -> Any:
        try:
            return call(timeout)
        except concurrent.futures.CancelledError as error:
            raise grpc.FutureCancelledError from error
        except concurrent.futures.TimeoutError as error:
            raise grpc.FutureTimeoutError from error


class _Worker:
    """A thread that does one thing after another; it ends when nobody holds its worker."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[_Future, float, Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        thread = threading.Thread(target=_work, args=(self._calls,), name=name, daemon=True)
        _calls_by_thread[thread] = self._calls
        thread.start()
        weakref.finalize(self, self._calls.put, None)

    def submit(self, call: Callable[[], Any], timeout_s: float) -> _Future:
        """Have a call made, unless its time is over before its turn."""
        future = _Future()
        self._calls.put((future, time.monotonic() + timeout_s, call))
        return future


_calls_by_thread: weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue[Any]] = (
    weakref.WeakKeyDictionary()
)


def _end_threads() -> None:
    """At the end of the process, wait for what a runtime is doing.

    Python stops daemon threads when they next ask for its lock; in the midst of a runtime's C++
    that ends the process by SIGABRT, and its exit status is lost.
    """
    threads = dict(_calls_by_thread)
    for calls in threads.values():
        with contextlib.suppress(queue.Empty):
            while (item := calls.get_nowait()) is not None:
                item[0].cancel()
        calls.put(None)
    for thread in threads:
        thread.join(MAX_END_S)


atexit.register(_end_threads)


def _work(calls: queue.SimpleQueue[tuple[_Future, float, Callable[[], Any]] | None]) -> None:
    while (item := calls.get()) is not None:
        _do(*item)
        # While waiting for the next one none is held: it may have a batch.
        del item


def _do(future: _Future, until_s: float, call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        if time.monotonic() > until_s:
            raise _RefusedError(grpc.StatusCode.UNAVAILABLE, "Request timeout expired")
        future.finish(call())
    except BaseException as error:
        future.finish(error=error)


class _Tower:
    """One Triton model: its configuration, and what runs it once it was asked."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        self.config = config
        self.version = _find_version(config, folder)
        self.num_requests = self.num_rows = 0
        self.compute_ns = self.queue_ns = 0
        self.memory_bytes = 0
        """By which this process has grown when the model was loaded, and its first batch run."""
        self.worker = _Worker(f"clip_rt {config.name}")
        self._folder = folder / self.version
        self._encode: runtimes.Encode | None = None

    def answer(self, request: Any, sent_ns: int) -> Any:
        """Answer a request for a model's outputs, or for a part of a file."""
        begun_ns = time.perf_counter_ns()
        array = _read_input(request)
        if (self._folder / TOKENIZER_FILE).is_file():
            return self._reply(request, {CHUNK: self._read_chunk(int(array[0]))})
        before_bytes = None
        if self._encode is None:
            before_bytes = find_own_bytes()
            self._encode = self._load()
            begun_ns = time.perf_counter_ns()
        try:
            outputs = self._encode(array)
        except Exception as error:
            raise _RefusedError(grpc.StatusCode.INTERNAL, str(error)) from error
        if before_bytes is not None:
            self.memory_bytes = max(0, find_own_bytes() - before_bytes)
        self.num_requests += 1
        self.num_rows += len(array)
        self.queue_ns += begun_ns - sent_ns
        self.compute_ns += time.perf_counter_ns() - begun_ns
        names = [each.name for each in self.config.output]
        asked = {each.name for each in request.outputs} or set(names)
        return self._reply(
            request,
            {
                name: np.ascontiguousarray(output, np.float32)
                for name, output in zip(names, outputs, strict=True)
                if name in asked
            },
        )

    def _load(self) -> runtimes.Encode:
        global _has_loaded
        if _parent_has_loaded:
            raise ServerStartError(
                "this process was forked from one in which models had run, and no runtime works on "
                "in such a child. Start it with multiprocessing's spawn, make no call before the "
                "fork, or use server='embedded'."
            )
        _has_loaded = True
        (given,) = self.config.input
        dtype = model_config_pb2.DataType.Name(given.data_type).removeprefix("TYPE_")
        try:
            encode = runtimes.load(
                runtimes.ModelFile(
                    name=self.config.name,
                    folder=self._folder,
                    kind="CPU",
                    device_id=0,
                    parameters={
                        key: value.string_value for key, value in self.config.parameters.items()
                    },
                    dims=list(given.dims),
                    dtype=triton_to_np_dtype(dtype),
                    log=_log.info,
                    warn=_log.warning,
                )
            )
            now = read_config(self._folder.parent, allow_unknown_field=True)
        except Exception as error:
            raise ServerStartError(
                f"{self.config.name} cannot be loaded here: {error}. Models run in this process by "
                "OpenVINO or ONNX Runtime: pip install 'clip-rt[in-process]'."
            ) from error
        now.name = now.name or self.config.name
        if now != self.config:
            # The other tower may be of the old weights.
            raise ServerStartError(
                f"{self.config.name} was replaced in its repository after this process had begun "
                "to use the model. Close all clients of the repository, and make new ones."
            )
        return encode

    def _read_chunk(self, index: int) -> np.ndarray[Any, Any]:
        content = np.fromfile(
            self._folder / TOKENIZER_FILE,
            np.uint8,
            TOKENIZER_CHUNK_BYTES,
            offset=index * TOKENIZER_CHUNK_BYTES,
        )
        if not len(content):
            raise _RefusedError(
                grpc.StatusCode.INVALID_ARGUMENT, f"chunk_index is {index}; the file ends before"
            )
        return content

    def _reply(self, request: Any, outputs: Mapping[str, np.ndarray[Any, Any]]) -> Any:
        answer = service_pb2.ModelInferResponse(
            model_name=request.model_name, model_version=self.version
        )
        for name, array in outputs.items():
            dtype = "FP32" if array.dtype == np.float32 else "UINT8"
            answer.outputs.add(name=name, datatype=dtype, shape=array.shape)
            answer.raw_output_contents.append(array.tobytes())
        return answer


def _find_version(config: ModelConfig, folder: Path) -> str:
    """Return the version that is served: the only one the configuration names, or the newest."""
    named = config.version_policy.specific.versions
    found = [int(each.name) for each in folder.iterdir() if each.name.isdecimal()]
    return str(named[0] if len(named) == 1 else max(found, default=1))


def _read_input(request: Any) -> np.ndarray[Any, Any]:
    (given,), (raw,) = request.inputs, request.raw_input_contents
    return np.frombuffer(raw, triton_to_np_dtype(given.datatype)).reshape(given.shape)


class _Repository:
    """The models of a folder; one for all clients of this process, as long as there are any."""

    def __init__(self, folder: Path) -> None:
        self._folders = find_models(folder)
        self._lock = threading.Lock()
        self._towers: dict[str, _Tower] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of its models."""
        return tuple(self._folders)

    def find(self, name: str) -> _Tower:
        """Return a model, which is not loaded before it is asked."""
        with self._lock:
            if name not in self._folders:
                raise _RefusedError(
                    grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' is not found"
                )
            if name not in self._towers:
                folder = self._folders[name]
                config = read_config(folder, allow_unknown_field=True)
                config.name = config.name or folder.name
                self._towers[name] = _Tower(config, folder)
            return self._towers[name]


_has_loaded = _parent_has_loaded = False
_of_parents: list[object] = []
_lock = threading.Lock()
_repositories: weakref.WeakValueDictionary[Path, _Repository] = weakref.WeakValueDictionary()


def _open_repository(folder: Path) -> _Repository:
    with _lock:
        key = folder.resolve()
        found = _repositories.get(key)
        if found is None:
            found = _repositories[key] = _Repository(folder)
        return found


def _restart_in_child() -> None:
    """In a forked child: threads are gone, and what they may have locked is not to be used."""
    global _lock, _repositories, _parent_has_loaded
    _of_parents.append(list(_repositories.values()))
    _parent_has_loaded = _has_loaded
    _lock, _repositories = threading.Lock(), weakref.WeakValueDictionary()


fork.in_child(_restart_in_child)


class InProcessTransport(Transport):
    """Answers in place of a server.

    Args:
        repository: Folder of models.

    Raises:
        ServerStartError: it holds no model that can be run.
    """

    def __init__(self, repository: Path) -> None:
        super().__init__("localhost:0")
        self.url = f"{repository} ({NAME})"
        self._path = repository
        self._models: _Repository | None = _open_repository(repository)

    @property
    def generation(self) -> int:
        """Always the same: what answers is not replaced."""
        return 1

    def _open(self) -> Any:
        with self._lock:
            if self._is_closed:
                raise ClientClosedError("the client is closed. Make a new one.")
            if self._models is None:  # In a forked child.
                self._models = _open_repository(self._path)
            return _Stub(self._models)

    def _hang_up(self) -> None:
        for future in self._pending.copy():
            future.cancel()
        with self._lock:
            self._models = None

    def _forget(self) -> None:
        # Kept: its end would wait for locks that the parent's threads may have held.
        _of_parents.append((self._models, self._pending))
        self._lock = threading.Lock()
        self._pending = set()
        self._models = None


class _Method:
    """A method of the stub; `future` begins a call."""

    def __init__(self, call: Callable[[Any], Any]) -> None:
        self._call = call

    def future(
        self, request: Any, timeout: float, metadata: tuple[tuple[str, str], ...] = ()
    ) -> _Future:
        """Answer at once: these take no time."""
        future = _Future()
        try:
            future.set_result(self._call(request))
        except Exception as error:
            future.set_exception(error)
        return future


class _Infer:
    """`ModelInfer`, which has a thread of each model to run in."""

    def __init__(self, models: _Repository) -> None:
        self._models = models

    def future(
        self, request: Any, timeout: float, metadata: tuple[tuple[str, str], ...] = ()
    ) -> _Future:
        """Begin a call."""
        try:
            tower = self._models.find(request.model_name)
        except Exception as error:
            future = _Future()
            future.set_exception(error)
            return future
        sent_ns = time.perf_counter_ns()
        return tower.worker.submit(lambda: tower.answer(request, sent_ns), timeout)


class _Stub:
    """What the client asks of a Triton, under gRPC's names."""

    def __init__(self, models: _Repository) -> None:
        methods: Mapping[str, Callable[[Any], Any]] = {
            "ServerMetadata": lambda _: service_pb2.ServerMetadataResponse(
                name=NAME, version=__version__
            ),
            "ServerReady": lambda _: service_pb2.ServerReadyResponse(ready=True),
            "ModelReady": lambda _: service_pb2.ModelReadyResponse(ready=True),
            "RepositoryIndex": lambda _: _list_models(models),
            "ModelConfig": lambda request: service_pb2.ModelConfigResponse(
                config=cast(Any, models.find(request.name).config)
            ),
            "ModelStatistics": lambda request: _count(models.find(request.name)),
        }
        for name, call in methods.items():
            setattr(self, name, _Method(call))
        self.ModelInfer = _Infer(models)


def _list_models(models: _Repository) -> Any:
    answer = service_pb2.RepositoryIndexResponse()
    for name in models.names:
        answer.models.add(name=name, state="READY")
    return answer


def _count(tower: _Tower) -> Any:
    answer = service_pb2.ModelStatisticsResponse()
    counted = answer.model_stats.add(name=tower.config.name, version=tower.version)
    if tower.memory_bytes:
        counted.memory_usage.add(type="CPU", byte_size=tower.memory_bytes)
    counted.inference_count = tower.num_rows
    counted.execution_count = tower.num_requests
    counted.inference_stats.success.count = tower.num_requests
    counted.inference_stats.queue.ns = tower.queue_ns
    counted.inference_stats.compute_infer.ns = tower.compute_ns
    return answer
