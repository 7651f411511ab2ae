"""An exported FP32 graph of another library to FP16, by ONNX Runtime's own converter.

Our own towers choose a precision for each layer in torch (`export.precision`); of graphs that are
not ours only the operators are known. Those that sum or exponentiate stay FP32, as do the first
steps, which normalise pixels of up to 255, and the last, which normalise the embedding. The parity
gate decides whether that is enough: a residual stream beyond the range of FP16 fails it.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx

FP32_OPERATORS = (
    *("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"),
    *("Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare"),
    *("Pow", "Sqrt", "Reciprocal", "Exp", "Erf", "Range", "CumSum", "Sin", "Cos"),
)
"""What loses most of FP16: sums of many numbers, and functions that leave its range."""
MAX_MESSAGE_BYTES = 2**31 - 2**24
PRODUCTS = frozenset(("Conv", "MatMul", "Gemm"))
"""What a tower begins and ends with, once the pixels are and before the embedding is normalised."""


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with FP16 weights and arithmetic; inputs and outputs keep their types.

    Args:
        model: FP32, with its weights inside; it is changed.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    _name_nodes(model.graph)
    num_bytes = sum(len(each.raw_data) for each in model.graph.initializer)
    blocked = {*_first_steps(model.graph), *_last_steps(model.graph)}
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # Of weights that FP16 rounds to nothing.
        converted: onnx.ModelProto = convert_float_to_float16(
            model,
            keep_io_types=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FP32_OPERATORS],
            node_block_list=sorted(blocked),
            # It takes no message of 2 GiB, and torch's exporter has written every type.
            disable_shape_infer=num_bytes > MAX_MESSAGE_BYTES,
        )
    return converted


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("onnxruntime.transformers")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _name_nodes(graph: onnx.GraphProto) -> None:
    for index, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{index}"


def _first_steps(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield what comes between the input and the first product, if the input is pixels."""
    if graph.input[0].type.tensor_type.elem_type != onnx.TensorProto.UINT8:
        return
    reached = {graph.input[0].name}
    for node in graph.node:
        if reached.intersection(node.input) and node.op_type not in PRODUCTS:
            yield node.name
            reached.update(node.output)


def _last_steps(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield what comes between the last product and the output."""
    wanted = {graph.output[0].name}
    for node in reversed(graph.node):
        if wanted.intersection(node.output) and node.op_type not in PRODUCTS:
            yield node.name
            wanted.update(node.input)
