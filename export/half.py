"""An exported FP32 graph of another library to FP16, by ONNX Runtime's own converter.

Our own towers choose a precision for each layer in torch (`export.precision`); of graphs that are
not ours only the operators are known. Those that sum or exponentiate stay FP32, as do the first
steps, which normalise pixels of up to 255, and the last, which project and normalise the embedding.
The parity gate decides whether that is enough: a residual stream beyond the range of FP16 fails it.
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
QUANTISERS = frozenset(("QuantizeLinear", "DequantizeLinear"))
"""What an FP8 graph has before each product, in the product's precision."""


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with FP16 weights and arithmetic; inputs and outputs keep their types.

    Args:
        model: FP32, with its weights inside; it is changed.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    name_nodes(model.graph)
    num_bytes = sum(len(each.raw_data) for each in model.graph.initializer)
    blocked = {*_first_steps(model.graph), *last_steps(model.graph)}
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
    _join_fp32(converted.graph)
    _drop_stale_types(converted.graph)
    # The converter puts its casts at the end, which the format forbids.
    OnnxModel(converted).topological_sort()
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


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name, where the exporter gave none."""
    for index, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{index}"


def _first_steps(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield what comes between the input and the first product, if the input is pixels."""
    if graph.input[0].type.tensor_type.elem_type != onnx.TensorProto.UINT8:
        return
    reached = {graph.input[0].name}
    for node in graph.node:
        if reached.intersection(node.input) and node.op_type not in (*PRODUCTS, *QUANTISERS):
            yield node.name
            reached.update(node.output)


def last_steps(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the last product, and what comes between it and the output."""
    wanted = {graph.output[0].name}
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            yield node.name
            if node.op_type not in PRODUCTS:
                wanted.update(node.input)


def _join_fp32(graph: onnx.GraphProto) -> None:
    """Let FP32 operators hand FP32 to each other, where the converter rounds to FP16 between them.

    It would round the length of an embedding, by which all its numbers are divided.
    """
    halves = {node.output[0]: node.input[0] for node in _casts(graph, onnx.TensorProto.FLOAT16)}
    wholes = {
        node.output[0]: halves[node.input[0]]
        for node in _casts(graph, onnx.TensorProto.FLOAT)
        if node.input[0] in halves
    }
    outputs = {each.name for each in graph.output}
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = wholes.get(name, name)
        # The output keeps its name, and becomes a cast of FP32 to itself.
        if node.op_type == "Cast" and node.output[0] in outputs & set(wholes):
            node.input[0] = wholes[node.output[0]]
    _drop_unused_casts(graph, outputs)


def _casts(graph: onnx.GraphProto, to: int) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == to:
            yield node


def _drop_stale_types(graph: onnx.GraphProto) -> None:
    """Keep what is said of the tensors that nodes make; of names of before it is wrong.

    Without any, ONNX Runtime 1.32 crashes in its fusion of transposed products.
    """
    made = {name for node in graph.node for name in node.output}
    kept = [each for each in graph.value_info if each.name in made]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _drop_unused_casts(graph: onnx.GraphProto, outputs: set[str]) -> None:
    while True:
        used = {name for node in graph.node for name in node.input} | outputs
        unused = [
            node for node in graph.node if node.op_type == "Cast" and used.isdisjoint(node.output)
        ]
        if not unused:
            return
        for node in unused:
            graph.node.remove(node)
