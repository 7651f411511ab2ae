"""A manifest in, two Triton ensembles out that take what people have: encoded images and strings.

`<slug>_jpeg` takes BYTES `image` (N, 1) and `<slug>_prompt` BYTES `text` (N, 1); both answer with
the embeddings of `clip_rt.Client`, to a client in any language. Each is a front, which prepares
the input with clip_rt in the server's Python (`python_front.py`), and the tower itself, whatever
backend that runs in. How large an image may be is a parameter of the front, `max_pixels` and
`max_bytes`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from clip_rt.errors import InputError
from clip_rt.inputs.decoding import Limits
from clip_rt.specs import EMBEDDINGS, PIXELS, TOKENS, image_model, slug, text_model
from clip_rt.wire.manifest import Manifest
from export.triton_config import ModelConfig

PYTHON_FRONT = Path(__file__).with_name("python_front.py")
PYTHON_DLPACK = Path(__file__).with_name("python_dlpack.py")


@dataclass(frozen=True)
class _Road:
    """From a raw input to an embedding; each name begins with the model's slug."""

    ensemble: str
    front: str
    raw: str
    """Input of the ensemble, and of the front."""
    prepared: str
    """Output of the front, and input of the tower."""
    data_type: int
    dims: tuple[int, ...]


_PIPELINES = {
    image_model: _Road("jpeg", "decode", "image", PIXELS, model_config_pb2.TYPE_UINT8, (-1, -1, 3)),
    text_model: _Road("prompt", "tokenize", "text", TOKENS, model_config_pb2.TYPE_INT32, (-1,)),
}


def folder_names(name: str) -> tuple[str, ...]:
    """Return the folders of a model's ensembles and of their fronts."""
    parts = [
        part for pipeline in _PIPELINES.values() for part in (pipeline.front, pipeline.ensemble)
    ]
    return tuple(f"{slug(name)}_{part}" for part in parts)


def read_limits(config: ModelConfig) -> Limits:
    """Return how large an image may be for a front, from its config.pbtxt.

    Raises:
        InputError: what it says there is no limit.
    """
    given = {each.name: config.parameters[each.name].string_value for each in fields(Limits)}
    try:
        return Limits(**{name: json.loads(value) for name, value in given.items() if value})
    except ValueError as error:
        raise InputError(f"{config.name}: {error}") from error


def render_ensembles(
    manifest: Manifest, *, max_batch_size: int, limits: Limits
) -> dict[str, ModelConfig]:
    """Describe both ensembles and their fronts to Triton, by the names of their folders.

    Args:
        manifest: Of the model they lead to.
        max_batch_size: Of its towers.
        limits: How large an image may be.
    """
    configs: dict[str, ModelConfig] = {}
    for name_tower, pipeline in _PIPELINES.items():
        front = _render(manifest, pipeline.front, max_batch_size)
        front.backend = "python"
        front.input.add(name=pipeline.raw, data_type=model_config_pb2.TYPE_STRING, dims=[1])
        front.output.add(name=pipeline.prepared, data_type=pipeline.data_type, dims=pipeline.dims)
        if name_tower is image_model:
            for name, value in asdict(limits).items():
                front.parameters[name].string_value = json.dumps(value)
        front.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=1)
        # Whoever waits is prepared together with others, a thread for each core.
        front.dynamic_batching.max_queue_delay_microseconds = 0
        ensemble = _render(manifest, pipeline.ensemble, max_batch_size)
        ensemble.platform = "ensemble"
        ensemble.input.add(name=pipeline.raw, data_type=model_config_pb2.TYPE_STRING, dims=[1])
        ensemble.output.add(
            name=EMBEDDINGS, data_type=model_config_pb2.TYPE_FP32, dims=[manifest.embedding_dim]
        )
        steps = (
            (front.name, pipeline.raw, pipeline.prepared),
            (name_tower(manifest.model), pipeline.prepared, EMBEDDINGS),
        )
        for model, source, target in steps:
            step = ensemble.ensemble_scheduling.step.add(model_name=model, model_version=-1)
            step.input_map[source], step.output_map[target] = source, target
        configs |= {front.name: front, ensemble.name: ensemble}
    return configs


def stage_ensembles(folder: Path, configs: dict[str, ModelConfig]) -> None:
    """Write the folders of `render_ensembles` into a folder."""
    for name, config in configs.items():
        version = folder / name / "1"
        version.mkdir(parents=True)
        text = text_format.MessageToString(config, as_utf8=True)
        (folder / name / "config.pbtxt").write_text(text, "utf-8")
        # An ensemble has a version too, with nothing in it; a file keeps it where folders are
        # copied by their files.
        (version / ".keep").touch()
        if config.backend == "python":
            shutil.copyfile(PYTHON_FRONT, version / "model.py")
            shutil.copyfile(PYTHON_DLPACK, version / "dlpack.py")


def _render(manifest: Manifest, part: str, max_batch_size: int) -> ModelConfig:
    config = ModelConfig(name=f"{slug(manifest.model)}_{part}", max_batch_size=max_batch_size)
    for key, value in manifest.to_parameters().items():
        config.parameters[key].string_value = value
    return config
