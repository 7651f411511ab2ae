"""How an ONNX file keeps its weights: as FP16, beside itself; build traces removed.

Never changes what is computed beyond rounding the stored weights: arithmetic stays FP32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import numpy_helper

from clip_rt.errors import CheckpointError, InputError

FP16_MAX = 65504.0
"""Largest finite FP16 number."""
MIN_FP16_ELEMENTS = 1024
"""Smaller tensors stay FP32: halving them saves nothing."""


def strip_traces(model: onnx.ModelProto) -> None:
    """Remove the source paths, stack traces and node histories the exporter records, in place."""
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    del model.metadata_props[:]
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        item.doc_string = ""
        del item.metadata_props[:]


def store_fp16(model: onnx.ModelProto) -> int:
    """Store matrices and kernels as FP16, each followed by a cast to FP32, in place.

    ONNX Runtime folds the casts when it loads the file, so the file halves and speed does not
    change. Vectors (biases, the parameters of normalisations) stay FP32.

    Returns:
        The number of tensors stored as FP16.

    Raises:
        CheckpointError: a weight is beyond the FP16 range.
    """
    graph = model.graph
    large = [
        tensor
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
        and len(tensor.dims) >= 2
        and numpy_helper.to_array(tensor).size >= MIN_FP16_ELEMENTS
    ]
    casts = [_round(tensor) for tensor in large]
    # Nodes must stand in topological order, and every weight may be read by any node.
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return len(casts)


def external_files(path: Path) -> list[Path]:
    """Return what an ONNX file keeps outside itself: nothing, or one file beside it.

    Raises:
        InputError: unreadable, or weights lie anywhere but in `<name>.data`; the file may have
            been made to read or leak others.
    """
    try:
        model = onnx.load_model(path, load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # Of protobuf's own kinds.
        raise InputError(f"{path} is no ONNX file: {error}.") from error
    if any(graph.sparse_initializer for graph in _graphs(model.graph)):
        raise InputError(f"{path} has sparse weights, which no exporter of CLIP writes.")
    size_bytes, is_external = 0, False
    expected = f"{path.name}.data"
    for tensor in onnx.external_data_helper._get_all_tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        facts = {entry.key: entry.value for entry in tensor.external_data}
        if facts.get("location") != expected:
            raise InputError(
                f"{path} keeps the weight {tensor.name[:80]!r} in {facts.get('location')!r:.200}; "
                f"only {expected!r} beside it is read."
            )
        is_external = True
        try:
            offset, length = int(facts.get("offset", "0")), int(facts.get("length", "0"))
        except ValueError as error:
            raise InputError(f"{path} says nonsense of {tensor.name[:80]!r}: {error}.") from error
        if offset < 0 or length < 0:
            raise InputError(f"{path} keeps {tensor.name[:80]!r} at {offset}, {length} bytes.")
        size_bytes = max(size_bytes, offset + length)
    if not is_external:
        return []
    data = path.with_name(expected)
    if data.is_symlink() or not data.is_file() or data.stat().st_size < size_bytes:
        raise InputError(f"{data} must be a file of at least {size_bytes} bytes, and is not.")
    return [data]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and those within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for each in (attribute.g, *attribute.graphs):
                if each.ByteSize():
                    yield from _graphs(each)


def _round(tensor: onnx.TensorProto) -> onnx.NodeProto:
    name = tensor.name
    values = numpy_helper.to_array(tensor)
    # A mask is 0 and minus infinity, which FP16 has.
    is_mask = ((values == 0) | (values == -math.inf)).all()
    largest = 0.0 if is_mask else float(abs(values).max(initial=0.0))
    if not largest <= FP16_MAX:  # Written so that NaN is refused too.
        raise CheckpointError(
            f"weight {name!r} reaches {largest:.4g}, beyond FP16's {FP16_MAX:.0f}; "
            "export with --precision fp32."
        )
    stored = numpy_helper.from_array(values.astype("float16"), f"{name}_fp16")
    tensor.CopyFrom(stored)
    return onnx.helper.make_node("Cast", [stored.name], [name], to=onnx.TensorProto.FLOAT)
