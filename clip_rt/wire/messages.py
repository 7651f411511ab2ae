"""The messages that a server is sent, and its answers as checked arrays and facts.

Source: kserve/open-inference-protocol `specification/protocol/inference_grpc.md`; Triton's
additions in triton-inference-server/common `protobuf/grpc_service.proto`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2

from clip_rt.deadline import Deadline
from clip_rt.errors import ContractError, NonFiniteEmbeddingError, ProtocolError
from clip_rt.specs import (
    CHUNK,
    CHUNK_INDEX,
    EMBEDDINGS,
    MIN_NORM,
    NORM_TOLERANCE,
    TOKENIZER_CHUNK_BYTES,
)
from clip_rt.wire.manifest import Manifest


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
    memory_bytes: int
    """Held by the model; 0 where the server does not say."""


def make_inference_request(model: ServedModel, batch: NDArray[Any], deadline: Deadline) -> Any:
    """Ask a model for the embeddings of a batch, (N, ...), of what it reads."""
    request = service_pb2.ModelInferRequest(model_name=model.name)
    request.inputs.add(name=model.input_name, datatype=model.input_type, shape=batch.shape)
    request.outputs.add(name=EMBEDDINGS)
    request.raw_input_contents.append(batch.tobytes())
    # Triton drops what has waited so long that nobody wants it any more.
    request.parameters["timeout"].int64_param = max(1, int(deadline.remaining_s() * 1e6))
    return request


def read_embeddings(
    answer: Any, model: ServedModel, num_rows: int, url: str
) -> tuple[NDArray[np.float32], list[int]]:
    """Return the embeddings, float32 (N, D), and which rows are NaN, infinite or zero.

    Raises:
        ProtocolError: another shape or type than was asked for, or rows of another length than 1.
    """
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


def make_row_error(
    model: ServedModel, embedding: NDArray[np.float32], url: str, index: int
) -> NonFiniteEmbeddingError:
    """Return the error of an embedding, float32 (D,), that is no direction: the item `index`'s."""
    return NonFiniteEmbeddingError(
        f"{model.name} at {url} answered an embedding of length {np.linalg.norm(embedding):g} for "
        f"item {index}. The exported model is broken; export it again.",
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
    """Turn Triton's configuration of a model into ours, checking that the two agree.

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
