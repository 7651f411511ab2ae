"""A manifest and a way to serve in, config.pbtxt out, and back.

Source: triton-inference-server/common `protobuf/model_config.proto`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tritonclient.grpc import model_config_pb2

from clip_rt.errors import InputError
from clip_rt.specs import (
    CHUNK,
    CHUNK_INDEX,
    EMBEDDINGS,
    HIDDEN_STATES,
    PIXELS,
    TEXT_EMBEDS,
    TOKENS,
    Tower,
    hidden_model,
    image_model,
    text_model,
    tokenizer_model,
)
from clip_rt.wire.manifest import Manifest
from clip_rt.wire.model_config import ModelConfig as ModelConfig
from clip_rt.wire.model_config import read_config as read_config

Backend = Literal["python", "onnxruntime", "tensorrt"]
Device = Literal["cpu", "gpu", "auto"]
Runtime = Literal["auto", "onnxruntime", "openvino"]
RUNTIME = "runtime"
"""Key of the parameter that `export/python_model.py` reads."""

MAX_BATCH_SIZE = 64
MAX_HIDDEN_BATCH_SIZE = 8
"""Of hidden states, which are large: a layer of 8 texts of 77 positions and the widest tower, 1280,
has 3 MiB, and a message of gRPC holds 4 MiB where nobody says otherwise."""
WARMUP_LENGTH_TOKENS = 16
_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
_KINDS: dict[Device, int] = {
    "cpu": model_config_pb2.ModelInstanceGroup.KIND_CPU,
    "gpu": model_config_pb2.ModelInstanceGroup.KIND_GPU,
    "auto": model_config_pb2.ModelInstanceGroup.KIND_AUTO,
}


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How Triton runs a model; nothing here changes an embedding."""

    backend: Backend = "python"
    """python needs no more than the embedded server has; the others are in NVIDIA's container."""
    device: Device = "cpu"
    runtime: Runtime = "auto"
    """What runs an ONNX file in the python backend on a processor. auto is the faster of OpenVINO
    and ONNX Runtime, measured where it is served; INT8 is OpenVINO's in any case."""
    num_instances: int = 1
    """One per device: each instance of ONNX Runtime already uses every core."""
    max_batch_size: int = MAX_BATCH_SIZE
    """Largest request, and largest batch the server joins requests into."""
    max_queue_delay_us: int = 0
    """How long a request may wait for company when the model is idle. While it is busy requests
    gather by themselves, here and in the client, so none need wait."""
    max_queue_size: int = 0
    """Waiting requests, the next one is refused at once; 0 is no bound. Any queue policy turns off
    the batcher's prefetching, and then about one request in a hundred waits 500 ms (seen with 2.51;
    triton-inference-server/core `src/dynamic_batch_scheduler.cc`): bound it where overload is the
    greater danger."""
    queue_timeout_us: int = 0
    """How long a request may wait before it is refused; 0 is for ever. A client may ask for less.
    It is a queue policy too."""
    cuda_graph_batch_sizes: tuple[int, ...] = ()
    """For tensorrt: batches whose kernels are captured once and launched as one. Others run as
    they would without."""

    def __post_init__(self) -> None:
        """Refuse numbers Triton would read as something else.

        Raises:
            InputError: names the field and its limits.
        """
        for field, low, high in (
            ("num_instances", 1, 64),
            ("max_batch_size", 1, 4096),
            ("max_queue_delay_us", 0, 1_000_000),
            ("max_queue_size", 0, 1_000_000),
            ("queue_timeout_us", 0, 3_600_000_000),
        ):
            value = getattr(self, field)
            if not low <= value <= high:
                raise InputError(f"{field} is {value}; it must be {low} to {high}.")
        if self.runtime not in get_args(Runtime):
            raise InputError(
                f"runtime is {self.runtime[:40]!r}; it must be {', '.join(get_args(Runtime))}."
            )
        if self.runtime != "auto" and (self.backend, self.device) != ("python", "cpu"):
            raise InputError(
                f"runtime {self.runtime} is of the python backend on cpu, and this is "
                f"{self.backend} on {self.device}: leave it auto."
            )
        if self.cuda_graph_batch_sizes:
            if self.backend != "tensorrt":
                raise InputError("cuda_graph_batch_sizes are of the tensorrt backend only.")
            low, high = min(self.cuda_graph_batch_sizes), max(self.cuda_graph_batch_sizes)
            if low < 1 or high > self.max_batch_size:
                raise InputError(
                    f"cuda_graph_batch_sizes are {low} to {high}; they must be 1 to "
                    f"max_batch_size, {self.max_batch_size}."
                )


def render_config(
    manifest: Manifest,
    tower: Tower,
    serving: Serving,
    *,
    version: int = 1,
    engines: Mapping[str, str] | None = None,
) -> ModelConfig:
    """Describe one tower to Triton; the manifest becomes its parameters, one each.

    Args:
        manifest: What is served.
        tower: Which half of it.
        serving: How.
        version: The one numbered folder that is loaded, whatever others there are.
        engines: For tensorrt in a fleet of mixed GPUs: file names by compute capability.
    """
    image = tower == "image"
    config = ModelConfig(
        name=image_model(manifest.model) if image else text_model(manifest.model),
        backend=serving.backend,
        max_batch_size=serving.max_batch_size,
    )
    config.version_policy.specific.versions.append(version)
    config.platform = _PLATFORMS.get(serving.backend, "")
    if serving.backend == "tensorrt":
        config.cc_model_filenames.update(engines or {})
    input_type = model_config_pb2.TYPE_UINT8 if image else model_config_pb2.TYPE_INT32
    side = manifest.side_px
    config.input.add(
        name=PIXELS if image else TOKENS,
        data_type=input_type,
        dims=[side, side, 3] if image else [_only_length(manifest) or -1],
    )
    config.output.add(
        name=EMBEDDINGS, data_type=model_config_pb2.TYPE_FP32, dims=[manifest.embedding_dim]
    )
    group = config.instance_group.add(kind=_KINDS[serving.device], count=serving.num_instances)
    if serving.backend == "tensorrt" and not image:
        # Without this Triton uses the first profile only.
        group.profile.extend(map(str, range(len(manifest.text_buckets))))
    batching = config.dynamic_batching
    batching.max_queue_delay_microseconds = serving.max_queue_delay_us
    if serving.max_queue_size or serving.queue_timeout_us:
        policy = batching.default_queue_policy
        policy.max_queue_size = serving.max_queue_size
        policy.default_timeout_microseconds = serving.queue_timeout_us
        policy.timeout_action = model_config_pb2.ModelQueuePolicy.REJECT
        policy.allow_timeout_override = True
    parameters = manifest.to_parameters()
    if not image:
        parameters["vocab_size"] = str(manifest.tokenization.vocab_size)
    if serving.backend == "python":
        parameters[RUNTIME] = serving.runtime
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    # One for each text length an engine knows, or whatever any length will do.
    lengths = manifest.text_buckets or (WARMUP_LENGTH_TOKENS,)
    shapes = [[side, side, 3]] if image else [[length] for length in lengths]
    if serving.cuda_graph_batch_sizes:
        config.optimization.cuda.graphs = True
        for batch_size, shape in itertools.product(serving.cuda_graph_batch_sizes, shapes):
            graph = config.optimization.cuda.graph_spec.add(batch_size=batch_size)
            graph.input[config.input[0].name].dim.extend(shape)
    # A model that cannot run fails when it is loaded, not at its first request. A processor takes
    # too long over the largest batch to wait for it. Zeros: random token ids would lie outside the
    # vocabulary.
    batch_sizes = [1] if serving.device == "cpu" else sorted({1, serving.max_batch_size})
    for batch_size, shape in itertools.product(batch_sizes, shapes):
        name = "x".join(map(str, [batch_size, *shape]))
        config.model_warmup.add(name=name, batch_size=batch_size).inputs[
            config.input[0].name
        ].CopyFrom(
            model_config_pb2.ModelWarmup.Input(data_type=input_type, dims=shape, zero_data=True)
        )
    return config


def _only_length(manifest: Manifest) -> int | None:
    """Return the length of every text where there is one for all."""
    return manifest.text_buckets[0] if len(manifest.text_buckets) == 1 else None


def render_hidden_config(
    manifest: Manifest, width: int, serving: Serving, *, version: int = 1
) -> ModelConfig:
    """Describe to Triton the model that answers with hidden states of texts.

    Args:
        manifest: What is served.
        width: Of the text tower.
        serving: How; batches have at most `MAX_HIDDEN_BATCH_SIZE` texts.
        version: The one numbered folder that is loaded.
    """
    config = render_config(manifest, "text", serving, version=version)
    config.name = hidden_model(manifest.model)
    config.max_batch_size = min(serving.max_batch_size, MAX_HIDDEN_BATCH_SIZE)
    length = manifest.context_length
    config.input[0].dims[:] = [length]
    del config.output[:]
    for name in HIDDEN_STATES.values():
        config.output.add(name=name, data_type=model_config_pb2.TYPE_FP32, dims=[length, width])
    config.output.add(
        name=TEXT_EMBEDS, data_type=model_config_pb2.TYPE_FP32, dims=[manifest.embedding_dim]
    )
    del config.model_warmup[:]
    config.model_warmup.add(name=f"1x{length}", batch_size=1).inputs[TOKENS].CopyFrom(
        model_config_pb2.ModelWarmup.Input(
            data_type=model_config_pb2.TYPE_INT32, dims=[length], zero_data=True
        )
    )
    return config


def read_hidden_width(folder: Path) -> int:
    """Read the width of the text tower back from a config of `render_hidden_config`."""
    return int(read_config(folder).output[0].dims[-1])


def render_tokenizer_config(manifest: Manifest, *, version: int = 1) -> ModelConfig:
    """Describe to Triton the model that hands out the tokenizer.json of a manifest."""
    config = ModelConfig(name=tokenizer_model(manifest.model), backend="python", max_batch_size=0)
    config.version_policy.specific.versions.append(version)
    config.input.add(name=CHUNK_INDEX, data_type=model_config_pb2.TYPE_INT32, dims=[1])
    config.output.add(name=CHUNK, data_type=model_config_pb2.TYPE_UINT8, dims=[-1])
    config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=1)
    for key, value in manifest.to_parameters().items():
        config.parameters[key].string_value = value
    return config


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a model folder back from its config.pbtxt.

    Raises:
        ContractError: it carries none.
    """
    parameters = {key: value.string_value for key, value in read_config(folder).parameters.items()}
    return Manifest.from_parameters(parameters, served=folder.name)


def read_serving(config: ModelConfig) -> Serving:
    """Read back from a config of `render_config` how a model is served.

    Raises:
        InputError: it is served in a way that `Serving` cannot say.
    """
    kinds = {kind: device for device, kind in _KINDS.items()}
    group = config.instance_group[0] if len(config.instance_group) == 1 else None
    if config.backend not in get_args(Backend) or group is None or group.kind not in kinds:
        raise InputError(
            f"{config.name[:80]!r} has backend {config.backend[:40]!r} and "
            f"{len(config.instance_group)} instance groups; clip_rt writes one group, for "
            f"{', '.join(get_args(Backend))}. Export the model again."
        )
    batching = config.dynamic_batching
    graphs = config.optimization.cuda.graph_spec
    return Serving(
        backend=config.backend,
        device=kinds[group.kind],
        # Those that were exported before there was a choice do not say.
        runtime=config.parameters[RUNTIME].string_value if RUNTIME in config.parameters else "auto",
        num_instances=group.count,
        max_batch_size=config.max_batch_size,
        max_queue_delay_us=batching.max_queue_delay_microseconds,
        max_queue_size=batching.default_queue_policy.max_queue_size,
        queue_timeout_us=batching.default_queue_policy.default_timeout_microseconds,
        cuda_graph_batch_sizes=tuple(sorted({graph.batch_size for graph in graphs})),
    )
