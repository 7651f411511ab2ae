"""A graph in torch in, an ONNX file out: dynamic batch and text length, output `embeddings`.

One file below 2 GB; above, the weights lie beside it in `<name>.data`, as the format demands.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch.export import Dim

from clip_rt.specs import EMBEDDINGS, PIXELS, TOKENS, EncoderFacts
from export import half, storage
from export.graphs import Graph

OPSET = 18
"""The set torch's exporter is written in, and the oldest with everything the graphs need. Both
TensorRT 10.12 to 11 and ONNX Runtime read it; in 23 attention would be one operator that neither
runs everywhere."""
BATCH = Dim("batch", min=1, max=65_536)
MAX_FILE_BYTES = 2**31 - 2**24
"""Of weights in one file: protobuf ends at 2 GiB, and 16 MiB is ample for the graph around them."""


def write_onnx(
    graph: Graph,
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
    # Two items: an axis of one would be taken for a constant.
    if graph.tower == "image":
        name, dims = PIXELS, (BATCH,)
        example = torch.zeros(2, facts.side_px, facts.side_px, 3, dtype=torch.uint8)
    elif facts.is_any_length_exact:
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
            output_names=[EMBEDDINGS],
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
    _check_axes(model, [dim.__name__ for dim in dims], name)
    save(model, path)


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


def _check_axes(model: onnx.ModelProto, names: list[str], input_name: str) -> None:
    """Make sure that the exporter has kept each dynamic axis, which it may silently not do."""
    (graph_input,), (graph_output,) = model.graph.input, model.graph.output
    axes = [axis.dim_param for axis in graph_input.type.tensor_type.shape.dim]
    found = (graph_input.name, axes[: len(names)], graph_output.name)
    batch = graph_output.type.tensor_type.shape.dim[0].dim_param
    expected = (input_name, names, EMBEDDINGS)
    if (*found, batch) != (*expected, names[0]):
        raise RuntimeError(f"torch.onnx exported {found}, batch {batch!r}; expected {expected}.")
