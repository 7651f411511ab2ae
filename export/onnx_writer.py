"""A graph in torch in, an ONNX file out: dynamic batch and text length, output `embeddings`.

Hidden states have a dynamic batch, the context length, and the outputs of `specs.HIDDEN_OUTPUTS`.

One file below 2 GB; above, the weights lie beside it in `<name>.data`, as the format demands.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import onnx_ir
import onnxruntime
import onnxscript
import torch
from torch.export import Dim

from clip_rt import specs
from clip_rt.specs import EMBEDDINGS, HIDDEN_OUTPUTS, PIXELS, TOKENS, EncoderFacts
from export import graphs, half, precision, storage
from export.graphs import Graph, TextHiddenGraph
from export.store import source_hash
from training import dual_encoder, resnet
from training import model as training_model
from training.dual_encoder import DualEncoder
from training.encoders import encoder as encoder_module
from training.encoders import of_open_clip, of_transformers
from training.encoders.encoder import ExternalEncoder

OPSET = 18
"""The set torch's exporter is written in, and the oldest with everything the graphs need. Both
TensorRT 10.12 to 11 and ONNX Runtime read it; in 23 attention would be one operator that neither
runs everywhere."""
BATCH = Dim("batch", min=1, max=65_536)
MAX_FILE_BYTES = 2**31 - 2**24
"""Of weights in one file: protobuf ends at 2 GiB, and 16 MiB is ample for the graph around them."""
_WRITERS = (
    *(graphs, half, sys.modules[__name__], precision, specs, storage),
    *(training_model, resnet, dual_encoder),
)
"""Modules whose code decides the bytes of an ONNX file."""
_BUILDERS = (encoder_module, of_open_clip, of_transformers)
"""Those that build models of other libraries."""


def write_onnx(
    graph: Graph | TextHiddenGraph,
    facts: EncoderFacts,
    path: Path,
    *,
    fp16_weights: bool = False,
    fp16: bool = False,
) -> None:
    """Export a tower.

    Args:
        graph: In eval mode, on the CPU; its layers' dtypes are those of the file.
        facts: Of the model the graph was made from.
        path: Where to write; ends in .onnx.
        fp16_weights: Store large FP32 weights in half the bytes; see `storage.store_fp16`.
        fp16: Make its arithmetic FP16 where that is safe, of a graph whose layers are FP32.

    Raises:
        CheckpointError: a weight does not fit into FP16.
    """
    dims: tuple[Dim, ...]
    outputs = list(HIDDEN_OUTPUTS) if isinstance(graph, TextHiddenGraph) else [EMBEDDINGS]
    # Two items: an axis of one would be taken for a constant.
    if graph.tower == "image":
        name, dims = PIXELS, (BATCH,)
        example = torch.zeros(2, facts.side_px, facts.side_px, 3, dtype=torch.uint8)
    elif facts.is_any_length_exact and not isinstance(graph, TextHiddenGraph):
        name, dims = TOKENS, (BATCH, Dim("length", min=2, max=facts.context_length))
        example = torch.zeros(2, facts.context_length - 1, dtype=torch.int32)
    else:
        name, dims = TOKENS, (BATCH,)
        example = torch.zeros(2, facts.context_length, dtype=torch.int32)
    with warnings.catch_warnings(), _only_errors("onnxscript"):
        warnings.simplefilter("ignore")  # About torch's own use of deprecated names.
        program = torch.onnx.export(
            graph.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[name],
            output_names=outputs,
            dynamic_shapes=(dict(enumerate(dims)),),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    storage.strip_traces(model)
    if fp16_weights:
        storage.store_fp16(model)
    if fp16:
        model = half.to_fp16(model)
    _check_axes(model, [dim.__name__ for dim in dims], name, outputs)
    save(model, path)


def describe_writing(
    encoder: DualEncoder,
    what: str,
    *,
    weights_fingerprint: str,
    precision: str,
    islands: Sequence[str] = (),
) -> dict[str, object]:
    """Return everything that the bytes of an ONNX file depend on.

    Args:
        encoder: What is exported.
        what: Of it.
        weights_fingerprint: Of its weights.
        precision: Of the file.
        islands: Layers that stay FP32 in FP16.
    """
    key: dict[str, object] = {
        "tower": what,
        "weights": weights_fingerprint,
        "spec": repr(getattr(encoder, "spec", encoder.facts)),
        "precision": precision,
        "islands": list(islands),
        "code": source_hash(*_WRITERS),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnx_ir": onnx_ir.__version__,
        "onnxscript": onnxscript.__version__,
    }
    if isinstance(encoder, ExternalEncoder):
        key |= {f"version of {name}": each for name, each in encoder.versions.items()}
        key |= {"builders": source_hash(*_BUILDERS), "onnxruntime": onnxruntime.__version__}
    return key


def write_fp16(source: Path, path: Path) -> None:
    """Write a file of `write_onnx` again with the arithmetic in FP16 where that is safe.

    The same file as `write_onnx(..., fp16=True)` writes, without tracing the tower again.
    """
    save(half.to_fp16(onnx.load(source)), path)


@contextlib.contextmanager
def _only_errors(logger: str) -> Iterator[None]:
    """Keep what a library says of its own doings from whoever exports."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model to a file, its weights beside it where they are too large for one."""
    # Protobuf's own count fails on the messages that are too large.
    size_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size_bytes <= MAX_FILE_BYTES:
        onnx.save_model(model, path)
        return
    onnx.save_model(
        model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024
    )


def _check_axes(
    model: onnx.ModelProto, names: list[str], input_name: str, output_names: list[str]
) -> None:
    """Make sure that the exporter has kept each dynamic axis, which it may silently not do."""
    (graph_input,) = model.graph.input
    axes = [axis.dim_param for axis in graph_input.type.tensor_type.shape.dim]
    found = (graph_input.name, axes[: len(names)], [each.name for each in model.graph.output])
    batches = {each.type.tensor_type.shape.dim[0].dim_param for each in model.graph.output}
    expected = (input_name, names, output_names)
    if found != expected or batches != {names[0]}:
        raise RuntimeError(
            f"torch.onnx exported {found}, batches {batches}; expected {expected}, {names[0]!r}."
        )
