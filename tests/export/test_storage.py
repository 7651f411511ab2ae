"""Weights stored as FP16: half the file, the same arithmetic."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from clip_rt.errors import CheckpointError, InputError
from export import parity, storage

FLOAT16 = onnx.TensorProto.FLOAT16


def test_the_file_halves_and_only_casts_read_fp16(exported, tmp_path):
    paths = {}
    for tower, source in (("image", exported.image), ("text", exported.text)):
        model = onnx.load(source)
        assert storage.store_fp16(model) > 0
        onnx.checker.check_model(model, full_check=True)
        halves = {tensor.name for tensor in model.graph.initializer if tensor.data_type == FLOAT16}
        readers = [node for node in model.graph.node if halves & set(node.input)]
        assert {node.op_type for node in readers} == {"Cast"}
        assert len(readers) == len(halves)
        paths[tower] = tmp_path / f"{tower}.onnx"
        onnx.save(model, paths[tower])
        assert paths[tower].stat().st_size < 0.7 * source.stat().st_size
    assert paths["text"].stat().st_size < 0.52 * exported.text.stat().st_size
    report = parity.check_files(exported.clip, **paths, precision="fp16_weights")
    # Rounding must be visible: a report of zeros would mean that nothing was compared.
    assert max(case.max_difference for case in report.cases) > 2e-5


def test_vectors_and_small_matrices_stay_fp32(exported):
    model = onnx.load(exported.image)
    storage.store_fp16(model)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        large = array.ndim >= 2 and array.size >= storage.MIN_FP16_ELEMENTS
        assert large or tensor.data_type != FLOAT16


@pytest.mark.parametrize("value", [1e5, np.nan])
def test_a_weight_that_fp16_cannot_hold_is_refused_by_name(exported_vit, value):
    model = onnx.load(exported_vit.text)
    tensor = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    array = numpy_helper.to_array(tensor).copy()
    array[0, 0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.raises(CheckpointError, match=f"{tensor.name}.*65504"):
        storage.store_fp16(model)


@pytest.fixture
def external(exported_vit, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save_model(
        onnx.load(exported_vit.image), path, save_as_external_data=True, location="model.onnx.data"
    )
    return path


def test_weights_beside_the_file_are_found(external, exported_vit):
    assert storage.external_files(external) == [external.with_name("model.onnx.data")]
    assert storage.external_files(exported_vit.image) == []


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "other.data", "model.onnx.data/"])
def test_weights_anywhere_else_are_refused(external, location):
    model = onnx.load_model(external, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    external.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"only 'model\.onnx\.data' beside it is read"):
        storage.external_files(external)


def test_weights_of_no_stated_length_are_not_forgotten(external):
    model = onnx.load_model(external, load_external_data=False)
    for tensor in model.graph.initializer:
        kept = [entry for entry in tensor.external_data if entry.key == "location"]
        del tensor.external_data[:]
        tensor.external_data.extend(kept)
    external.write_bytes(model.SerializeToString())
    assert storage.external_files(external) == [external.with_name("model.onnx.data")]


def test_weights_at_a_negative_place_are_refused(external):
    model = onnx.load_model(external, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = "-8"
    external.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="at -8"):
        storage.external_files(external)


def test_sparse_weights_are_refused(exported_vit, tmp_path):
    model = onnx.load(exported_vit.image)
    sparse = model.graph.sparse_initializer.add()
    sparse.values.data_location = onnx.TensorProto.EXTERNAL
    sparse.values.external_data.add(key="location", value="/etc/passwd")
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="sparse weights"):
        storage.external_files(tmp_path / "model.onnx")


@pytest.mark.parametrize("change", ["missing", "short", "link"])
def test_weights_that_are_not_there_whole_are_refused(external, change, tmp_path):
    data = external.with_name("model.onnx.data")
    content = data.read_bytes()
    data.unlink()
    if change == "short":
        data.write_bytes(content[:-1])
    elif change == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="must be a file of at least"):
        storage.external_files(external)


def test_what_is_no_onnx_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08 no protobuf \xff")
    with pytest.raises(InputError, match="is no ONNX file"):
        storage.external_files(tmp_path / "model.onnx")
