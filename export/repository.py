"""Two exported towers into a model repository that Triton loads, both or neither.

A manifest and one file per tower go in; `<slug>_image/` and `<slug>_text/` come out, each with its
config.pbtxt, rendered from the manifest, and one version folder. Nothing is written in place: a
server that starts meanwhile sees the old model or the new one.

Source: triton-inference-server/common `protobuf/model_config.proto`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from clip_rt.errors import ContractError, InputError
from clip_rt.manifest import Manifest
from clip_rt.specs import EMBEDDINGS, PIXELS, TOKENS, VOCAB_SIZE, image_model, text_model
from export.storage import external_files

ModelConfig: TypeAlias = model_config_pb2.ModelConfig
Tower = Literal["image", "text"]
Backend = Literal["python", "onnxruntime", "tensorrt"]
Device = Literal["cpu", "gpu", "auto"]

MODEL_FILE: dict[Backend, str] = {
    "python": "model.onnx",
    "onnxruntime": "model.onnx",
    "tensorrt": "model.plan",
}
PYTHON_MODEL = Path(__file__).with_name("onnxruntime_model.py")
"""What the python backend runs; copied verbatim into the version folder."""
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@/ -]{0,63}")
WARMUP_LENGTH_TOKENS = 16

_PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
_KINDS = {
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
    num_instances: int = 1
    """One per device: each instance of ONNX Runtime already uses every core."""
    max_batch_size: int = 64
    """Largest request, and largest batch the server joins requests into."""
    max_queue_delay_us: int = 500
    """How long a request may wait for company when the model is idle."""
    max_queue_size: int = 0
    """Waiting requests, the next one is refused at once; 0 is no bound. Any queue policy turns off
    the batcher's prefetching, and then about one request in a hundred waits 500 ms (seen with 2.51;
    triton-inference-server/core `src/dynamic_batch_scheduler.cc`): bound it where overload is the
    greater danger."""

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
        ):
            value = getattr(self, field)
            if not low <= value <= high:
                raise InputError(f"{field} is {value}; it must be {low} to {high}.")


def check_name(name: str, repository: Path) -> None:
    """Refuse a name that is unsafe, or whose folders belong to another model.

    Raises:
        InputError: says which rule, and what stands in the way.
    """
    if not SAFE_NAME.fullmatch(name) or ".." in name:
        raise InputError(
            f"model name {name[:80]!r} is not usable: 1 to 64 letters, digits, spaces or _ . @ / - "
            "are, beginning with a letter or digit and without '..'."
        )
    for served in (image_model(name), text_model(name)):
        folder = repository / served
        if not os.path.lexists(folder):
            continue
        owner = _owner(folder)
        if owner != name:
            holds = "no clip_rt model" if owner is None else f"the model {owner!r}"
            raise InputError(
                f"{str(folder)!r} holds {holds}, and {name!r} would be served as {served} too. "
                "Choose another --name, or remove that folder."
            )


def render_config(manifest: Manifest, tower: Tower, serving: Serving) -> ModelConfig:
    """Describe one tower to Triton; the manifest becomes its parameters, one each."""
    image = tower == "image"
    config = ModelConfig(
        name=image_model(manifest.model) if image else text_model(manifest.model),
        backend=serving.backend,
        max_batch_size=serving.max_batch_size,
    )
    config.platform = _PLATFORMS.get(serving.backend, "")
    input_type = model_config_pb2.TYPE_UINT8 if image else model_config_pb2.TYPE_INT32
    side = manifest.side_px
    config.input.add(
        name=PIXELS if image else TOKENS,
        data_type=input_type,
        dims=[side, side, 3] if image else [-1],
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
    if serving.max_queue_size:
        batching.default_queue_policy.max_queue_size = serving.max_queue_size
    parameters = manifest.to_parameters()
    if not image:
        parameters["vocab_size"] = str(VOCAB_SIZE)
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    # A model that cannot run fails when it is loaded, not at its first request. Zeros: random
    # token ids would lie outside the vocabulary.
    warmup = config.model_warmup.add(name="one", batch_size=1)
    warmup.inputs[config.input[0].name].CopyFrom(
        model_config_pb2.ModelWarmup.Input(
            data_type=input_type,
            dims=[side, side, 3] if image else [WARMUP_LENGTH_TOKENS],
            zero_data=True,
        )
    )
    return config


def publish(
    repository: str | Path,
    manifest: Manifest,
    *,
    image: Path,
    text: Path,
    serving: Serving | None = None,
    report: Mapping[str, object] | None = None,
) -> tuple[Path, Path]:
    """Put both towers into a repository, replacing the model of that name if there is one.

    Both folders are complete before either is moved into place, and when the second move fails the
    first is undone.

    Args:
        repository: Made when it does not exist.
        manifest: Its `model` names the two folders.
        image: ONNX file, with its weights where they lie beside it, or engine of the image tower.
        text: The same of the text tower; both are copied.
        serving: Defaults to `Serving()`.
        report: The parity report, kept beside each config.pbtxt as parity.json.

    Returns:
        The folders of the image and the text model.

    Raises:
        InputError: see `check_name` and `onnx_writer.external_files`.
    """
    repository, serving = Path(repository), serving or Serving()
    check_name(manifest.model, repository)
    repository.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".clip_rt-", dir=_staging(repository)) as staging:
        moves = []
        towers: tuple[tuple[Tower, Path], ...] = (("image", image), ("text", text))
        for tower, file in towers:
            config = render_config(manifest, tower, serving)
            staged = _stage(Path(staging) / config.name, config, file, report)
            moves.append((staged, repository / config.name))
        _move(moves, aside=Path(staging) / "replaced")
    return moves[0][1], moves[1][1]


def read_config(folder: Path) -> ModelConfig:
    """Parse the config.pbtxt of a model folder.

    Raises:
        OSError: there is none.
        google.protobuf.text_format.ParseError: it is not a model configuration.
    """
    return text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), ModelConfig())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a model folder back from its config.pbtxt.

    Raises:
        ContractError: it carries none.
    """
    parameters = {key: value.string_value for key, value in read_config(folder).parameters.items()}
    return Manifest.from_parameters(parameters, served=folder.name)


def _owner(folder: Path) -> str | None:
    try:
        return read_manifest(folder).model
    except (OSError, UnicodeDecodeError, text_format.ParseError, ContractError):
        return None


def _staging(repository: Path) -> Path:
    """Choose a folder on the file system of the repository, and outside it where possible.

    A server that starts while a staging folder is in its repository fails to load it as a model.
    """
    parent = repository.resolve().parent
    same = parent.stat().st_dev == repository.stat().st_dev and os.access(parent, os.W_OK)
    return parent if same else repository


def _stage(
    folder: Path, config: ModelConfig, file: Path, report: Mapping[str, object] | None
) -> Path:
    version = folder / "1"
    version.mkdir(parents=True)
    text = text_format.MessageToString(config, as_utf8=True)
    (folder / "config.pbtxt").write_text(text, "utf-8")
    if report is not None:
        (folder / "parity.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    backend: Backend = config.backend
    target = version / MODEL_FILE[backend]
    weights = external_files(file) if target.suffix == ".onnx" else []
    if weights and file.name != target.name:
        raise InputError(f"{file} keeps its weights beside it, so it must be called {target.name}.")
    shutil.copyfile(file, target)
    for each in weights:
        shutil.copyfile(each, version / each.name)
    if config.backend == "python":
        shutil.copyfile(PYTHON_MODEL, version / "model.py")
    return folder


def _move(moves: list[tuple[Path, Path]], *, aside: Path) -> None:
    """Move staged folders into place, all or none; what they replace goes to `aside`."""
    aside.mkdir()
    done: list[tuple[Path, Path | None]] = []
    try:
        for staged, target in moves:
            replaced = None
            if target.exists():
                replaced = aside / target.name
                os.rename(target, replaced)
            done.append((target, replaced))
            os.rename(staged, target)
    except OSError:
        for target, replaced in reversed(done):
            if target.exists():
                os.rename(target, aside / f"{target.name}-undone")
            if replaced is not None:
                os.rename(replaced, target)
        raise
