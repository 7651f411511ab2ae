"""A graph of another library that ends ONNX Runtime ends the export with one sentence."""

from __future__ import annotations

import external_models
import onnx
import pytest

from clip_rt.errors import ExportError
from export import half, trial_load
from export.onnx import OnnxConfig, export

BOTH = ("onnxruntime", "openvino")

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.usefixtures("open_clip")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return f"open_clip:{external_models.write_open_clip(tmp_path_factory.mktemp('clip'))}"


def config(model, folder):
    return OnnxConfig(
        model=model,
        name="clip",
        precision="fp16",
        repository=folder / "models",
        cache=folder / "cache",
        backend="onnxruntime",
    )


def test_a_crash_of_onnx_runtime_is_an_error_and_nothing_is_published(model, tmp_path, monkeypatch):
    """Without the types of its tensors, ONNX Runtime 1.32 crashes in a fusion of FP16 products."""

    def drop_all_types(graph):
        del graph.value_info[:]

    monkeypatch.setattr(half, "_drop_stale_types", drop_all_types)
    with pytest.raises(ExportError, match=r"is ended by SIGSEGV while loading the text tower") as e:
        export(config(model, tmp_path))
    assert "--precision fp32" in str(e.value)
    assert not (tmp_path / "models/clip_text").exists()


def test_a_crash_of_openvino_names_the_other_runtime(tmp_path):
    """A window of pooling that is larger than its map, and a Clip: OpenVINO 2026.4 crashes."""
    helper, of = onnx.helper, onnx.TensorProto.FLOAT
    pool = {"kernel_shape": [64, 64], "strides": [64, 64], "ceil_mode": 1}
    graph = helper.make_graph(
        [
            helper.make_node("AveragePool", ["x"], ["pooled"], **pool),
            helper.make_node("Clip", ["pooled", "least"], ["y"]),
        ],
        "pooling",
        [helper.make_tensor_value_info("x", of, ["n", 4, 2, 2])],
        [helper.make_tensor_value_info("y", of, ["n", 4, 1, 1])],
        [helper.make_tensor("least", of, [], [0.0])],
    )
    path = tmp_path / "model.onnx"
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    trial_load.check_survive(path, tower="image", precision="fp32", runtimes=["onnxruntime"])
    with pytest.raises(ExportError, match=r"OpenVINO .* by SIGSEGV .* --runtime onnxruntime"):
        trial_load.check_survive(path, tower="image", precision="fp32", runtimes=BOTH)


def test_a_signal_from_outside_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(trial_load.PROGRAMS, "onnxruntime", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ExportError, match="ended by SIGKILL while loading the image tower in FP32"):
        trial_load.check_survive(
            tmp_path / "none", tower="image", precision="fp32", runtimes=["onnxruntime"]
        )


def test_a_load_without_an_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setitem(trial_load.PROGRAMS, "onnxruntime", "import time; time.sleep(60)")
    monkeypatch.setattr(trial_load, "MAX_S", 0.5)
    with pytest.raises(ExportError, match=r"more than 0\.5 s"):
        trial_load.check_survive(tmp_path / "none", tower="text", precision="fp16", runtimes=BOTH)


def test_an_error_is_left_to_who_uses_the_file(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"none")
    trial_load.check_survive(tmp_path / "model.onnx", tower="text", precision="fp16", runtimes=BOTH)


def test_a_whole_file_is_loaded(tmp_path):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "g", [value], [out])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    trial_load.check_survive(
        tmp_path / "model.onnx", tower="text", precision="fp32", runtimes=["onnxruntime"]
    )
