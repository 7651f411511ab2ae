"""The messages that a server is sent, and its answers as checked arrays and facts.

Source: kserve/open-inference-protocol `specification/protocol/inference_grpc.md`; Triton's
additions in triton-inference-server/common `protobuf/grpc_service.proto`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2

from clip_rt.deadline import Deadline
from clip_rt.errors import ContractError, NonFiniteEmbeddingError, ProtocolError
from clip_rt.specs import (
    CHUNK,
    CHUNK_INDEX,
    EMBEDDINGS,
    HIDDEN_STATES,
    MIN_NORM,
    NORM_TOLERANCE,
    TEXT_EMBEDS,
    TOKENIZER_CHUNK_BYTES,
    TOKENS,
    HiddenLayer,
)
from clip_rt.wire.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What a server says about itself."""

    name: str
    version: str


Output: TypeAlias = tuple[str, tuple[int, ...]]
"""Name, and shape of a row, of what a model answers with; float32."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One tower as a server offers it, or the text tower for its hidden states."""

    name: str
    input_name: str
    input_type: str
    """In the words of the protocol: UINT8, INT32."""
    input_dims: tuple[int, ...]
    """Without the batch axis; -1 is any length."""
    embedding_dim: int
    max_batch_size: int
    manifest: Manifest
    hidden: tuple[Output, ...] = ()
    """What is asked for instead of embeddings; empty of a tower."""
    version: str = field(default="", compare=False)
    """The only one that the server has of it, where its configuration says so."""
    runs_on: str = field(default="", compare=False)
    """Backend, instances and execution providers, in words, as far as a server tells."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What is asked for."""
        return self.hidden or ((EMBEDDINGS, (self.embedding_dim,)),)

    @property
    def row_size(self) -> int:
        """Numbers of an answer for each row, all outputs together."""
        return sum(math.prod(dims) for _, dims in self.outputs)


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
    memory_bytes: int
    """Held by the model; 0 where the server does not say."""


def make_inference_request(model: ServedModel, batch: NDArray[Any], deadline: Deadline) -> Any:
    """Ask a model for its outputs for a batch, (N, ...), of what it reads."""
    request = service_pb2.ModelInferRequest(model_name=model.name)
    request.inputs.add(name=model.input_name, datatype=model.input_type, shape=batch.shape)
    for name, _ in model.outputs:
        request.outputs.add(name=name)
    request.raw_input_contents.append(batch.tobytes())
    # Triton drops what has waited so long that nobody wants it any more.
    request.parameters["timeout"].int64_param = max(1, int(deadline.remaining_s() * 1e6))
    return request


def read_rows(
    answer: Any, model: ServedModel, num_rows: int, url: str
) -> tuple[NDArray[np.float32], list[int]]:
    """Return the rows of an answer, and which of them cannot be used.

    Returns:
        float32 (N, K): embeddings; or the outputs that were asked for, one behind the other. Rows
        that are NaN or infinite, and embeddings that are zero.

    Raises:
        ProtocolError: another shape or type than was asked for, or embeddings of another length
            than 1.
    """
    expected = [(name, "FP32", [num_rows, *dims]) for name, dims in model.outputs]
    found = [(each.name, each.datatype, list(each.shape)) for each in answer.outputs]
    sizes = [len(raw) for raw in answer.raw_output_contents]
    num_bytes = [4 * num_rows * math.prod(dims) for _, dims in model.outputs]
    # A server answers in an order of its own.
    place = {name: index for index, (name, _, _) in enumerate(found)}
    order = [place.get(name, -1) for name, _ in model.outputs]
    fits = len(found) == len(sizes) == len(expected) and -1 not in order
    if not fits or [(found[i], sizes[i]) for i in order] != [
        *zip(expected, num_bytes, strict=True)
    ]:
        raise ProtocolError(
            f"{model.name} at {url} answered {found} with {sizes} bytes; expected is {expected} "
            f"with {num_bytes} bytes.",
            url=url,
        )
    parts = [
        np.frombuffer(answer.raw_output_contents[index], "<f4").reshape(num_rows, -1)
        for index in order
    ]
    rows = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    if model.hidden:
        is_bad = ~np.isfinite(rows).all(axis=1)
        return rows.astype(np.float32, copy=False), [int(row) for row in np.nonzero(is_bad)[0]]
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    is_direction = np.isfinite(norms) & (norms > MIN_NORM)
    drift = float(np.abs(norms - 1)[is_direction].max(initial=0))
    if drift > NORM_TOLERANCE:
        raise ProtocolError(
            f"{model.name} at {url} answered embeddings whose length differs from 1 by {drift:.2g};"
            f" {NORM_TOLERANCE:g} is allowed. Export it again with python -m export.onnx.",
            url=url,
        )
    return rows.astype(np.float32), [int(row) for row in np.nonzero(~is_direction)[0]]


def make_row_error(
    model: ServedModel, row: NDArray[np.float32], url: str, index: int
) -> NonFiniteEmbeddingError:
    """Return the error of a row, float32 (K,), that cannot be used: the item `index`'s."""
    what = f"an embedding of length {np.linalg.norm(row):g}"
    if model.hidden:
        what = f"{int((~np.isfinite(row)).sum())} numbers that are not finite"
    return NonFiniteEmbeddingError(
        f"{model.name} at {url} answered {what} for item {index}. The exported model is broken; "
        "export it again.",
        url=url,
        index=index,
    )


def make_chunk_request(name: str, index: int) -> Any:
    """Ask a model that hands out a file for one part of it, from 0."""
    request = service_pb2.ModelInferRequest(model_name=name)
    request.inputs.add(name=CHUNK_INDEX, datatype="INT32", shape=[1])
    request.outputs.add(name=CHUNK)
    request.raw_input_contents.append(np.array([index], "<i4").tobytes())
    return request


def read_chunk(answer: Any, name: str, url: str) -> bytes:
    """Return the part of the file.

    Raises:
        ProtocolError: the answer holds none, or more than a part has.
    """
    found = [(each.name, each.datatype, list(each.shape)) for each in answer.outputs]
    parts = answer.raw_output_contents
    if len(parts) != 1 or found != [(CHUNK, "UINT8", [len(parts[0])])]:
        raise ProtocolError(f"{name} at {url} answered {found}; a {CHUNK} was asked for.", url=url)
    if len(parts[0]) > TOKENIZER_CHUNK_BYTES:
        raise ProtocolError(
            f"{name} at {url} answered {len(parts[0]):,} bytes; a part has at most "
            f"{TOKENIZER_CHUNK_BYTES:,}.",
            url=url,
        )
    return bytes(parts[0])


def read_statistics(answer: Any) -> ServerStatistics:
    """Return what a server has counted for the one model it was asked about."""
    (counted,) = answer.model_stats
    stages = counted.inference_stats
    return ServerStatistics(
        num_requests=stages.success.count,
        num_rows=counted.inference_count,
        num_batches=counted.execution_count,
        queue_s=stages.queue.ns / 1e9,
        compute_s=(stages.compute_input.ns + stages.compute_infer.ns + stages.compute_output.ns)
        / 1e9,
        memory_bytes=sum(each.byte_size for each in counted.memory_usage),
    )


def read_config(config: Any) -> ServedModel:
    """Turn Triton's configuration of a tower into ours, checking that the two agree.

    Raises:
        ContractError: it carries no manifest, or contradicts it.
    """
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
    return _make_served(config, parameters, manifest)


def read_hidden_config(config: Any, layer: HiddenLayer) -> ServedModel:
    """Turn Triton's configuration of a model of hidden states into ours, to be asked for a layer.

    Raises:
        ContractError: it carries no manifest, or contradicts it.
    """
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    manifest = Manifest.from_parameters(parameters, served=config.name)
    outputs = {each.name: (each.data_type, tuple(each.dims)) for each in config.output}
    inputs = [(each.name, each.data_type, tuple(each.dims)) for each in config.input]
    length, kind = manifest.context_length, model_config_pb2.TYPE_FP32
    _, dims = outputs.get(HIDDEN_STATES[layer], (0, ()))
    width = dims[-1] if dims else 0
    promised = {
        HIDDEN_STATES[layer]: (kind, (length, width)),
        TEXT_EMBEDS: (kind, (manifest.embedding_dim,)),
    }
    fits = width >= 1 and all(outputs.get(name) == each for name, each in promised.items())
    reads = [(TOKENS, model_config_pb2.TYPE_INT32, (length,))]
    if not fits or inputs != reads or config.max_batch_size < 1:
        raise ContractError(
            f"Triton model {config.name!r} has outputs {outputs}, inputs {inputs} and "
            f"max_batch_size {config.max_batch_size}; hidden states are {promised} of {reads}, in "
            "batches. Export it again.",
            expected=promised,
            found=outputs,
        )
    hidden = tuple((name, shape) for name, (_, shape) in promised.items())
    return _make_served(config, parameters, manifest, hidden)


def _make_served(
    config: Any,
    parameters: Mapping[str, str],
    manifest: Manifest,
    hidden: tuple[Output, ...] = (),
) -> ServedModel:
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
        hidden=hidden,
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
