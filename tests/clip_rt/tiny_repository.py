"""Write a model repository with a tiny CLIP whose answers can be foreseen.

Images are embedded by their mean colour plus a little of each patch; texts by their words, and the
words red, green and blue point where images of that colour point. Weights are fixed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from clip_rt import specs
from clip_rt.wire.manifest import Manifest
from export.version_folder import copy_python_model

SIDE_PX = 64
EMBEDDING_DIM = 8
WORDS = {"red</w>": 736, "green</w>": 1901, "blue</w>": 1746}
"""Token ids of the words the text tower understands, in the order of the channels."""

MANIFEST = Manifest(
    model="tiny",
    architecture="RN26@64px",
    fingerprint="a" * 64,
    embedding_dim=EMBEDDING_DIM,
    side_px=SIDE_PX,
    context_length=77,
    text_buckets=(),
    logit_scale=20.0,
    logit_bias=0.0,
    activation="quick_gelu",
    mean=specs.CLIP_MEAN,
    std=specs.CLIP_STD,
    precision="fp16",
    libraries={"onnx": onnx.__version__},
)


def write(
    repository: Path,
    name: str = "tiny",
    *,
    image: dict[str, object] | None = None,
    text: dict[str, object] | None = None,
    max_batch_size: int = 32,
    queue_policy: str = "",
    kind: str = "KIND_CPU",
    text_config: str = "",
) -> Path:
    """Add the pair of models `name`; `image` and `text` replace fields of their manifests."""
    slug = specs.slug(name)
    pair = (
        ("image", specs.PIXELS, "TYPE_UINT8", [SIDE_PX, SIDE_PX, 3], image, _image_graph()),
        ("text", specs.TOKENS, "TYPE_INT32", [-1], text, _text_graph()),
    )
    for tower, input_name, dtype, dims, changes, graph in pair:
        manifest = replace(MANIFEST, model=name, **(changes or {}))  # type: ignore[arg-type]
        folder = repository / f"{slug}_{tower}"
        (folder / "1").mkdir(parents=True)
        copy_python_model(folder / "1")
        onnx.save(graph, folder / "1" / "model.onnx")
        parameters = manifest.to_parameters() | {"intra_op_threads": "1"}
        (folder / "config.pbtxt").write_text(
            f"""name: "{folder.name}"
backend: "python"
max_batch_size: {max_batch_size}
input [ {{ name: "{input_name}" data_type: {dtype} dims: {dims} }} ]
output [ {{ name: "embeddings" data_type: TYPE_FP32 dims: [ {manifest.embedding_dim} ] }} ]
instance_group [ {{ kind: {kind} count: 1 }} ]
dynamic_batching {{ {queue_policy} }}
"""
            + (text_config if tower == "text" else "")
            + "".join(
                f"parameters {{ key: {json.dumps(key)} value {{ string_value: "
                f"{json.dumps(value)} }} }}\n"
                for key, value in parameters.items()
            )
        )
    return repository


def write_bare(repository: Path) -> Path:
    """Add a model that does nothing, for a server that is up at once."""
    folder = repository / "bare"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text("class TritonPythonModel:\n    pass\n")
    (folder / "config.pbtxt").write_text(
        """name: "bare"
backend: "python"
max_batch_size: 1
input [ { name: "x" data_type: TYPE_FP32 dims: [1] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [1] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
    )
    return repository


def _image_graph() -> onnx.ModelProto:
    """uint8 (N, S, S, 3) -> mean colour - 0.5, a constant, and four sums over 8 x 8 patches."""
    rng = np.random.default_rng(0)
    weights = np.zeros((193, EMBEDDING_DIM), np.float32)
    weights[:192, :3] = np.tile(np.eye(3, dtype=np.float32), (64, 1)) / 64
    weights[:192, 4:] = rng.normal(0, 0.02, (192, 4))
    weights[192, :4] = (-0.5, -0.5, -0.5, 0.1)
    constants = {
        "patches": np.array([0, 8, 8, 8, 8, 3], np.int64),
        "patch_axes": np.array([2, 4], np.int64),
        "flat": np.array([0, 192], np.int64),
        "scale": np.array(255, np.float32),
        "one": np.ones((1, 1), np.float32),
        "weights": weights,
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["unit"]),
        helper.make_node("Reshape", ["unit", "patches"], ["grid"]),
        helper.make_node("ReduceMean", ["grid", "patch_axes"], ["means"], keepdims=0),
        helper.make_node("Reshape", ["means", "flat"], ["row"]),
        helper.make_node("Slice", ["row", "zero", "first", "axis"], ["column"]),
        helper.make_node("Mul", ["column", "zero_float"], ["zeros"]),
        helper.make_node("Add", ["zeros", "one"], ["ones"]),
        helper.make_node("Concat", ["row", "ones"], ["features"], axis=1),
        helper.make_node("MatMul", ["features", "weights"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["embeddings"], axis=1, p=2),
    ]
    constants |= {
        "zero": np.array([0], np.int64),
        "first": np.array([1], np.int64),
        "axis": np.array([1], np.int64),
        "zero_float": np.array(0, np.float32),
    }
    return _model(nodes, constants, "pixels", TensorProto.UINT8, ["N", SIDE_PX, SIDE_PX, 3])


def _text_graph() -> onnx.ModelProto:
    """int32 (N, L) -> the sum of the rows of its tokens, stored in FP16."""
    rng = np.random.default_rng(1)
    table = rng.normal(0, 0.01, (specs.VOCAB_SIZE, EMBEDDING_DIM)).astype(np.float16)
    table[0] = 0
    for channel, token in enumerate(WORDS.values()):
        table[token] = 0
        table[token, :3] = -0.5
        table[token, channel] = 0.5
    nodes = [
        helper.make_node("Cast", ["table_fp16"], ["table"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["table", "tokens"], ["rows"], axis=0),
        helper.make_node("ReduceSum", ["rows", "axis"], ["sum"], keepdims=0),
        helper.make_node("LpNormalization", ["sum"], ["embeddings"], axis=1, p=2),
    ]
    constants = {"table_fp16": table, "axis": np.array([1], np.int64)}
    return _model(nodes, constants, "tokens", TensorProto.INT32, ["N", "L"])


def _model(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    input_name: str,
    input_type: int,
    input_shape: list[str | int],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(input_name, input_type, input_shape)],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["N", EMBEDDING_DIM])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model
