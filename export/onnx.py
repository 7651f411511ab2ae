"""A checkpoint becomes two ONNX encoders in the model repository, if they pass the parity gate.

`python -m export.onnx --model ViT-B/32 --checkpoint clip.safetensors`. The graphs obey the tensor
contract: batch and text length are dynamic, the output is `embeddings`, one file below 2 GB each.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import onnx
import onnxruntime
import torch
import typer
from torch import Tensor, nn
from torch.export import Dim

import clip_rt
from clip_rt.errors import ClipRTError, InputError, ParityError
from clip_rt.manifest import Manifest
from clip_rt.specs import (
    CLIP_MEAN,
    CLIP_STD,
    EMBEDDINGS,
    PIXELS,
    TOKENS,
    Activation,
    ModelSpec,
    find_spec,
)
from export import parity, storage
from export.console import console, mib, print_parity, stage
from export.graphs import ImageGraph, TextGraph
from export.repository import Backend, Device, Serving, check_name, publish
from training.model import CLIP
from training.weights.load import fingerprint, load_clip

OPSET = 18
"""The set torch's exporter is written in, and the oldest with everything the graphs need."""
BATCH = Dim("batch", min=1, max=65_536)
WeightsDtype = Literal["fp32", "fp16"]
"""How large weights are stored."""
MAX_WEIGHT_BYTES = 2**31 - 2**24
"""In one file: protobuf ends at 2 GiB, and 16 MiB is ample for the graph around the weights."""


def write_image(clip: CLIP, path: Path, *, weights_dtype: WeightsDtype = "fp32") -> None:
    """Export the image tower to one ONNX file.

    Args:
        clip: float32, in eval mode, on the CPU.
        path: Where to write.
        weights_dtype: "fp16" stores large weights in half the bytes; see `storage.store_fp16`.

    Raises:
        InputError: the file would not fit into 2 GB.
        CheckpointError: a weight does not fit into FP16.
    """
    side_px = clip.spec.side_px
    # Two items: an axis of one would be taken for a constant.
    pixels_BSSC = torch.zeros(2, side_px, side_px, 3, dtype=torch.uint8)
    _write(ImageGraph(clip), (PIXELS, pixels_BSSC, (BATCH,)), path, weights_dtype)


def write_text(clip: CLIP, path: Path, *, weights_dtype: WeightsDtype = "fp32") -> None:
    """Export the text tower to one ONNX file that reads any length up to the context.

    Arguments and errors are those of `write_image`.
    """
    length = Dim("length", min=2, max=clip.spec.text.context_length)
    tokens_BL = torch.zeros(2, clip.spec.text.context_length - 1, dtype=torch.int32)
    _write(TextGraph(clip), (TOKENS, tokens_BL, (BATCH, length)), path, weights_dtype)


def make_manifest(clip: CLIP, name: str, *, precision: str) -> Manifest:
    """Write down what a client must know about `clip` served as `name`."""
    return Manifest(
        model=name,
        architecture=clip.spec.name,
        fingerprint=fingerprint(clip.state_dict()),
        embedding_dim=clip.spec.embedding_dim,
        side_px=clip.spec.side_px,
        context_length=clip.spec.text.context_length,
        text_buckets=(),
        logit_scale=float(clip.logit_scale.exp()),
        logit_bias=0.0 if clip.logit_bias is None else float(clip.logit_bias),
        activation=clip.spec.activation,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        precision=precision,
        libraries={
            "clip_rt": clip_rt.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
        },
    )


def export_clip(
    clip: CLIP,
    *,
    name: str,
    repository_folder: Path,
    weights_dtype: WeightsDtype = "fp32",
    serving: Serving | None = None,
) -> parity.ParityReport:
    """Export both towers, compare them with `clip`, and publish them.

    Args:
        clip: float32, in eval mode, on the CPU.
        name: Served name.
        repository_folder: The model repository.
        weights_dtype: "fp32" or "fp16".
        serving: See `Serving`.

    Raises:
        InputError: the name is unsafe or taken, or a file would not fit into 2 GB.
        ParityError: the graphs drift from `clip`; the repository is as it was.
    """
    check_name(name, repository_folder)
    precision: parity.Precision = "fp16_weights" if weights_dtype == "fp16" else "fp32"
    with tempfile.TemporaryDirectory(prefix="clip_rt-export-") as folder:
        image, text = Path(folder) / "image.onnx", Path(folder) / "text.onnx"
        with stage("export the image tower") as outcome:
            write_image(clip, image, weights_dtype=weights_dtype)
            outcome.append(mib(image))
        with stage("export the text tower") as outcome:
            write_text(clip, text, weights_dtype=weights_dtype)
            outcome.append(mib(text))
        with stage("compare with torch") as outcome:
            report = parity.check_onnx(clip, image=image, text=text, precision=precision)
            outcome.append(f"{len(report.cases)} cases pass")
        with stage("publish") as outcome:
            folders = publish(
                repository_folder,
                make_manifest(clip, name, precision=precision),
                image=image,
                text=text,
                serving=serving,
                report=report.to_json(),
            )
            outcome.extend(str(folder) for folder in folders)
    return report


def random_clip(spec: ModelSpec, *, seed: int = 0) -> CLIP:
    """Build a model nobody trained: it costs what a real one costs and knows nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(spec).requires_grad_(False).eval()


def main(
    model: Annotated[str, typer.Option(help="Architecture, such as ViT-B/32.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights: .safetensors, .pt, .pth or .bin.")
    ] = None,
    weights: Annotated[
        Literal["random"] | None, typer.Option(help="Instead of a checkpoint, for benchmarks.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Served name; default: --model.")] = None,
    repository_folder: Annotated[
        Path, typer.Option("--repository", help="Model repository to publish into.")
    ] = Path("model_repository"),
    activation: Annotated[
        Activation | None, typer.Option(help="As trained; default: the architecture's.")
    ] = None,
    weights_dtype: Annotated[
        WeightsDtype, typer.Option(help="How weights are stored; arithmetic is FP32.")
    ] = "fp32",
    backend: Annotated[Backend, typer.Option(help="Triton backend that runs it.")] = "python",
    device: Annotated[Device, typer.Option(help="Where Triton places it.")] = "cpu",
    max_batch_size: Annotated[int, typer.Option(help="Largest batch the server accepts.")] = 64,
) -> None:
    """Export a CLIP checkpoint to ONNX and publish it in a Triton model repository."""
    try:
        spec = find_spec(model)
        spec = replace(spec, activation=activation or spec.activation)
        with stage("load the weights") as outcome:
            clip = _load(spec, checkpoint, weights, activation)
            num_parameters = sum(parameter.numel() for parameter in clip.parameters())
            outcome.append(f"{spec.name}, {spec.activation}, {num_parameters / 1e6:.1f} M")
        report = export_clip(
            clip,
            name=name or model,
            repository_folder=repository_folder,
            weights_dtype=weights_dtype,
            serving=Serving(backend=backend, device=device, max_batch_size=max_batch_size),
        )
    except ParityError as error:
        print_parity(error.report)
        _fail(error)
    except (ClipRTError, OSError) as error:
        _fail(error)
    print_parity(report.to_json())


def _load(
    spec: ModelSpec, checkpoint: Path | None, weights: str | None, activation: Activation | None
) -> CLIP:
    if (checkpoint is None) == (weights is None):
        raise InputError("give either --checkpoint PATH or --weights random.")
    if checkpoint is None:
        return random_clip(spec)
    return load_clip(spec, checkpoint, activation=activation)


def _fail(error: Exception) -> NoReturn:
    console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
    raise typer.Exit(1)


def _write(
    graph: nn.Module,
    inputs: tuple[str, Tensor, tuple[Dim, ...]],
    path: Path,
    weights_dtype: WeightsDtype,
) -> None:
    input_name, example, dims = inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # About torch's own use of deprecated names.
        program = torch.onnx.export(
            graph.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=[EMBEDDINGS],
            dynamic_shapes=(dict(enumerate(dims)),),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    storage.strip_traces(model)
    if weights_dtype == "fp16":
        storage.store_fp16(model)
    _check_axes(model, [dim.__name__ for dim in dims], input_name)
    _check_size(model, path)
    onnx.save_model(model, path)


def _check_size(model: onnx.ModelProto, path: Path) -> None:
    # Protobuf's own count fails on the messages that are too large.
    size_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size_bytes > MAX_WEIGHT_BYTES:
        raise InputError(
            f"{path.name} would hold {size_bytes / 2**30:.2f} GiB of weights; one ONNX file holds "
            f"{MAX_WEIGHT_BYTES / 2**30:.2f}. Export with --weights-dtype fp16."
        )


def _check_axes(model: onnx.ModelProto, names: list[str], input_name: str) -> None:
    """Make sure that the exporter has kept each dynamic axis, which it may silently not do."""
    (graph_input,), (graph_output,) = model.graph.input, model.graph.output
    axes = [axis.dim_param for axis in graph_input.type.tensor_type.shape.dim]
    found = (graph_input.name, axes[: len(names)], graph_output.name)
    batch = graph_output.type.tensor_type.shape.dim[0].dim_param
    expected = (input_name, names, EMBEDDINGS)
    if (*found, batch) != (*expected, names[0]):
        raise RuntimeError(f"torch.onnx exported {found}, batch {batch!r}; expected {expected}.")


if __name__ == "__main__":
    typer.run(main)
