"""An ONNX graph after the exporter: large weights stored as FP16, build traces removed.

Never changes what is computed beyond rounding the stored weights: arithmetic stays FP32.
"""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from clip_rt.errors import CheckpointError

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


def _round(tensor: onnx.TensorProto) -> onnx.NodeProto:
    name = tensor.name
    values = numpy_helper.to_array(tensor)
    # The causal mask holds minus infinity, which FP16 has too.
    largest = float(abs(values[abs(values) != float("inf")]).max(initial=0.0))
    if not largest <= FP16_MAX:  # Written so that NaN is refused too.
        raise CheckpointError(
            f"weight {name!r} reaches {largest:.4g}, beyond FP16's {FP16_MAX:.0f}; "
            "export with --weights-dtype fp32."
        )
    stored = numpy_helper.from_array(values.astype("float16"), f"{name}_fp16")
    tensor.CopyFrom(stored)
    return onnx.helper.make_node("Cast", [stored.name], [name], to=onnx.TensorProto.FLOAT)
