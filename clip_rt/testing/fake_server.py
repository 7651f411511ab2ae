"""The server itself: it speaks Triton's protocol, and does to a call what a fault says."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2

from clip_rt import specs
from clip_rt.errors import InputError, ServerStartError
from clip_rt.inputs import tokenizer
from clip_rt.inputs.images import Images, preprocess
from clip_rt.testing.fake_model import EmbedImage, EmbedText, FakeModel, hash_bytes
from clip_rt.wire.manifest import Manifest

SERVICE = "inference.GRPCInferenceService"
MAX_CALLS_AT_ONCE = 128
"""Calls that can hang at a time; more of them wait."""
MAX_KEPT_BYTES = 256 * 1024**2
"""Arrays remembered in `FakeServer.requests`; the oldest are forgotten beyond."""


@dataclass(frozen=True, eq=False)
class Request:
    """A batch that arrived."""

    tower: specs.Tower
    array: NDArray[Any]
    """uint8 (N, S, S, 3) of the image tower, int32 (N, L) of the text tower."""
    headers: Mapping[str, str]
    """What came along, the client's own headers among it; keys in lower case."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call that a fault strikes."""

    server: FakeServer
    context: Any
    """Of gRPC; its `abort` ends the call with a status."""
    ended: threading.Event
    """Set when nobody waits for the answer any more."""


class Fault(Protocol):
    """Something that goes wrong with a call."""

    def strike(self, answer: Any, call: Call) -> Any:
        """Return what is answered instead of `answer`, a message of the protocol; or abort."""
        ...


class FakeServer:
    """A server on a free port of 127.0.0.1 that answers as Triton with an exported model would.

    Start it by `with`, or by `start` and `close`. Thread-safe.

    Args:
        model: Name the model is served under.
        embedding_dim: D, the width of the embeddings.
        side_px: S, the side of the square images that it reads.
        context_length: Longest text in tokens.
        text_buckets: Lengths of texts it accepts; empty if it accepts any.
        max_batch_size: Largest number of rows in a request.
        logit_scale: Factor of the cosines.
        version: Version of Triton it claims to be.
        max_message_bytes: Largest request it reads.
        embed_image: Gives an image its embedding instead of chance.
        embed_text: Gives a text its embedding instead of chance.
    """

    def __init__(
        self,
        *,
        model: str = "fake",
        embedding_dim: int = 512,
        side_px: int = 224,
        context_length: int = specs.CONTEXT_LENGTH,
        text_buckets: tuple[int, ...] = (),
        max_batch_size: int = 32,
        logit_scale: float = specs.MAX_LOGIT_SCALE,
        version: str = "2.71.0",
        max_message_bytes: int = 256 * 1024**2,
        embed_image: EmbedImage | None = None,
        embed_text: EmbedText | None = None,
    ) -> None:
        self.manifest = Manifest(
            model=model,
            architecture="ViT-B/32",
            fingerprint=hash_bytes(model.encode()).hex(),
            embedding_dim=embedding_dim,
            side_px=side_px,
            context_length=context_length,
            text_buckets=text_buckets,
            logit_scale=logit_scale,
            logit_bias=0.0,
            activation="quick_gelu",
            mean=specs.CLIP_MEAN,
            std=specs.CLIP_STD,
            precision="fp32",
            libraries={},
        )
        self.num_calls: Counter[str] = Counter()
        """How often each method of the protocol was called; inference is "ModelInfer"."""
        self._tower_by_model: dict[str, specs.Tower] = {
            specs.image_model(model): "image",
            specs.text_model(model): "text",
        }
        self._work_by_tower: dict[specs.Tower, Counter[str]] = {
            "image": Counter(),
            "text": Counter(),
        }
        """Requests, rows and nanoseconds, as a server counts them."""
        self._max_batch_size = max_batch_size
        self._version = version
        self._max_message_bytes = max_message_bytes
        self._model = FakeModel(embed_image, embed_text)
        self._requests: deque[Request] = deque()
        self._kept_bytes = 0
        self._next: list[tuple[str, Fault]] = []
        self._standing: list[tuple[Callable[[Request], bool], Fault]] = []
        self._lock = threading.Lock()
        # Apart from the other: stopping waits for calls, and calls take that one.
        self._life = threading.RLock()
        self._closed = threading.Event()
        self._port = 0
        self._server: Any = None

    def __enter__(self) -> FakeServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FakeServer({self.manifest.model!r}, port={self._port})"

    @property
    def url(self) -> str:
        """host:port, the same for all its life.

        Raises:
            ServerStartError: it was never started.
        """
        if not self._port:
            raise ServerStartError("the fake server was not started. Use it in a with statement.")
        return f"127.0.0.1:{self._port}"

    @property
    def requests(self) -> tuple[Request, ...]:
        """The batches that arrived, the last of them if there were very many; in order."""
        with self._lock:
            return tuple(self._requests)

    def fail_next(self, fault: Fault, *, times: int = 1, method: str = "ModelInfer") -> None:
        """Let the next calls of a method of the protocol go wrong.

        Args:
            fault: What happens to each.
            times: How many calls; after that the server is well again.
            method: "ModelInfer", or what the client asks beside: "ModelConfig", "ModelReady",
                "RepositoryIndex", "ModelStatistics", "ServerMetadata", "ServerReady", "ServerLive".

        Raises:
            InputError: the server has no such method.
        """
        if method not in self._methods():
            raise InputError(f"method is {method!r}; there are {', '.join(self._methods())}.")
        with self._lock:
            self._next += [(method, fault)] * times

    def fail_when(self, condition: Callable[[Request], bool], fault: Fault) -> None:
        """Let every inference go wrong whose request meets a condition, until `heal`."""
        with self._lock:
            self._standing.append((condition, fault))

    def heal(self) -> None:
        """Forget every fault that has not happened yet."""
        with self._lock:
            self._next.clear()
            self._standing.clear()

    def teach(self, images: Images, text: str) -> None:
        """Give images the embedding of a text, so that this label wins.

        A client that prepares images otherwise than `clip_rt.preprocess` (`exif=False`) sends
        other pixels, and they are not recognised.

        Args:
            images: As for `Client.encode_images`.
            text: The whole prompt: "a photo of a cat." is what zero-shot makes of "cat".
        """
        ids = tokenizer.encode_text(text, context_length=self.manifest.context_length)
        for square in preprocess(images, side_px=self.manifest.side_px):
            self._model.teach(square, ids)

    def swap_weights(self) -> str:
        """Serve other weights under the same name from now on; return their fingerprint."""
        fingerprint = hash_bytes(self.manifest.fingerprint.encode()).hex()
        self.manifest = replace(self.manifest, fingerprint=fingerprint)
        return fingerprint

    def start(self) -> str:
        """Listen, at the same address as before; return the url. Starting twice is harmless.

        Raises:
            ServerStartError: the port was taken meanwhile.
        """
        with self._life:
            if self._server is None:
                self._server = self._listen()
                self._closed.clear()
            return self.url

    def stop(self, *, grace_s: float = 0.0) -> None:
        """Go down; `start` brings it back. New calls are refused from now on.

        Args:
            grace_s: Time for calls on their way, which are cut off after that.
        """
        with self._life:
            if self._server is not None:
                self._server.stop(grace_s or None).wait()
                self._server = None

    def close(self) -> None:
        """Go down for good. Closing twice is harmless."""
        self._closed.set()
        self.stop()

    def _crash(self, back_after_s: float | None) -> None:
        self.stop()
        if back_after_s is not None and not self._closed.wait(back_after_s):
            self.start()

    def _listen(self) -> Any:
        server = grpc.server(
            ThreadPoolExecutor(MAX_CALLS_AT_ONCE, thread_name_prefix="clip_rt.testing"),
            options=(
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # Or two servers would share what comes in.
            ),
        )
        handlers = {
            method: self._make_handler(method, answer, getattr(service_pb2, f"{method}Request"))
            for method, answer in self._methods().items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            self._port = server.add_insecure_port(f"127.0.0.1:{self._port}")
        except RuntimeError as error:
            raise ServerStartError(
                f"port {self._port} of 127.0.0.1 was taken while the fake server was down: {error}."
            ) from error
        server.start()
        return server

    def _methods(self) -> dict[str, Callable[[Any, Any], Any]]:
        return {
            "ServerLive": lambda *_: service_pb2.ServerLiveResponse(live=True),
            "ServerReady": lambda *_: service_pb2.ServerReadyResponse(ready=True),
            "ServerMetadata": lambda *_: service_pb2.ServerMetadataResponse(
                name="triton", version=self._version
            ),
            "ModelReady": lambda request, _: service_pb2.ModelReadyResponse(
                ready=request.name in self._tower_by_model
            ),
            "RepositoryIndex": self._list_models,
            "ModelConfig": self._describe,
            "ModelStatistics": self._tell_statistics,
            "ModelInfer": self._infer,
        }

    def _make_handler(
        self, method: str, answer: Callable[[Any, Any], Any], message_type: Any
    ) -> Any:
        def handle(message: Any, context: Any) -> Any:
            ended = threading.Event()
            if not context.add_callback(ended.set):  # It has ended already.
                ended.set()
            with self._lock:
                self.num_calls[method] += 1
            asked = self._read(message, context) if method == "ModelInfer" else message
            answered = answer(asked, context)
            for fault in self._take_faults(method, asked):
                answered = fault.strike(answered, Call(self, context, ended))
            return answered

        return grpc.unary_unary_rpc_method_handler(
            handle,
            request_deserializer=message_type.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )

    def _take_faults(self, method: str, asked: Any) -> list[Fault]:
        with self._lock:
            faults = []
            for index, (its_method, fault) in enumerate(self._next):
                if its_method == method:
                    faults.append(fault)
                    del self._next[index]
                    break
            standing = list(self._standing) if method == "ModelInfer" else []
        return faults + [fault for condition, fault in standing if condition(asked)]

    def _read(self, message: Any, context: Any) -> Request:
        """Take a request apart and keep it; refuse one that Triton would refuse."""
        tower = self._find_tower(message.model_name, context)
        name, datatype, dtype = (
            (specs.PIXELS, "UINT8", "<u1") if tower == "image" else (specs.TOKENS, "INT32", "<i4")
        )
        (tensor,) = message.inputs if len(message.inputs) == 1 else (None,)
        shape = [] if tensor is None else list(tensor.shape)
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        fits = (
            tensor is not None
            and (tensor.name, tensor.datatype) == (name, datatype)
            and self._accepts(tower, shape)
            and [len(raw) for raw in message.raw_input_contents] == [num_bytes]
        )
        if not fits:
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"'{message.model_name}' reads {datatype} {name!r} of at most "
                f"{self._max_batch_size} rows; it got inputs {list(message.inputs)}",
            )
        array = np.frombuffer(message.raw_input_contents[0], dtype).reshape(shape)
        request = Request(tower, array, dict(context.invocation_metadata()))
        with self._lock:
            self._requests.append(request)
            self._kept_bytes += array.nbytes
            while self._kept_bytes > MAX_KEPT_BYTES and len(self._requests) > 1:
                self._kept_bytes -= self._requests.popleft().array.nbytes
        return request

    def _find_tower(self, model: str, context: Any) -> specs.Tower:
        if model not in self._tower_by_model:
            context.abort(
                grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{model}' is not found"
            )
        return self._tower_by_model[model]

    def _accepts(self, tower: specs.Tower, shape: list[int]) -> bool:
        if not shape or not 1 <= shape[0] <= self._max_batch_size:
            return False
        manifest = self.manifest
        if tower == "image":
            return shape[1:] == [manifest.side_px, manifest.side_px, 3]
        lengths = manifest.text_buckets or range(1, manifest.context_length + 1)
        return len(shape) == 2 and shape[1] in lengths

    def _infer(self, request: Request, context: Any) -> Any:
        start_ns = time.perf_counter_ns()
        rows = self._model.embed(request.tower, request.array, self.manifest)
        with self._lock:
            work = self._work_by_tower[request.tower]
            work["requests"] += 1
            work["rows"] += len(rows)
            work["ns"] += time.perf_counter_ns() - start_ns
        return make_answer(f"{specs.slug(self.manifest.model)}_{request.tower}", rows)

    def _list_models(self, message: Any, context: Any) -> Any:
        response = service_pb2.RepositoryIndexResponse()
        for name in self._tower_by_model:
            response.models.add(name=name, version="1", state="READY")
        return response

    def _tell_statistics(self, message: Any, context: Any) -> Any:
        with self._lock:
            work = self._work_by_tower[self._find_tower(message.name, context)].copy()
        response = service_pb2.ModelStatisticsResponse()
        found = response.model_stats.add(name=message.name, version="1")
        found.inference_count, found.execution_count = work["rows"], work["requests"]
        found.inference_stats.success.count = work["requests"]
        found.inference_stats.compute_infer.count = work["requests"]
        found.inference_stats.compute_infer.ns = work["ns"]
        return response

    def _describe(self, message: Any, context: Any) -> Any:
        tower = self._find_tower(message.name, context)
        manifest = self.manifest
        config = model_config_pb2.ModelConfig(
            name=message.name, max_batch_size=self._max_batch_size
        )
        if tower == "image":
            dims = [manifest.side_px, manifest.side_px, 3]
            config.input.add(name=specs.PIXELS, data_type="TYPE_UINT8", dims=dims)
        else:
            config.input.add(name=specs.TOKENS, data_type="TYPE_INT32", dims=[-1])
        config.output.add(
            name=specs.EMBEDDINGS, data_type="TYPE_FP32", dims=[manifest.embedding_dim]
        )
        for key, value in manifest.to_parameters().items():
            config.parameters[key].string_value = value
        return service_pb2.ModelConfigResponse(config=config)


def make_answer(model: str, rows: NDArray[Any], *, datatype: str = "FP32") -> Any:
    """Return the protocol's answer to an inference: (N, D) embeddings."""
    response = service_pb2.ModelInferResponse(model_name=model, model_version="1")
    response.outputs.add(name=specs.EMBEDDINGS, datatype=datatype, shape=rows.shape)
    response.raw_output_contents.append(rows.tobytes())
    return response
