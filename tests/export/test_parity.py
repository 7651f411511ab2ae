"""The gate: what passes, what must not, and that nothing is published behind it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from clip_rt.errors import ParityError
from clip_rt.specs import END_OF_TEXT
from export import parity, parity_report, probes


@pytest.fixture(scope="module")
def clip(exported_vit):
    return exported_vit.clip


@pytest.fixture(scope="module")
def files(exported_vit):
    return exported_vit.image, exported_vit.text


@pytest.fixture(scope="module")
def encoders(files):
    return tuple(parity.onnx_encoder(path) for path in files)


def corrupt(source, target, *, scale=1.0, value=None):
    """Copy an ONNX file with its largest matrix scaled, or one entry of it replaced."""
    model = onnx.load(source)
    largest = max(
        (tensor for tensor in model.graph.initializer if tensor.data_type == 1),
        key=lambda tensor: np.prod(tensor.dims),
    )
    array = numpy_helper.to_array(largest) * np.float32(scale)
    if value is not None:
        array.flat[:] = value
    largest.CopyFrom(numpy_helper.from_array(array.astype(np.float32), largest.name))
    onnx.save(model, target)
    return target


def test_an_honest_export_passes_every_case(clip, files):
    report = parity.check_files(clip, image=files[0], text=files[1], precision="fp32")
    assert report.passed
    assert report.top1_agreement == 1.0
    assert {case.tower for case in report.cases} == {"image", "text"}
    names = [case.name for case in report.cases]
    for expected in ("1 images", "2 images", "3 images", "1 texts of 16", "3 texts of 77"):
        assert f"{expected} by ONNX Runtime" in names
    assert any("texts of 32" in name for name in names)
    assert json.loads(json.dumps(report.to_json()))["passed"] is True


def test_both_runtimes_pass_and_each_is_named(clip, files):
    pytest.importorskip("openvino")
    assert parity.installed_runtimes() == ("onnxruntime", "openvino")
    report = parity.check_files(
        clip, image=files[0], text=files[1], precision="fp32", runtimes=parity.installed_runtimes()
    )
    names = {case.name for case in report.cases}
    assert {"3 images by ONNX Runtime", "3 images by OpenVINO"} <= names
    assert len(names) == len(report.cases)
    assert max(case.max_difference for case in report.cases) < 4e-6


def test_a_runtime_that_drifts_is_named_though_the_other_does_not(clip, files, monkeypatch):
    load = parity.load_openvino

    def load_drifting(path, num_threads):
        encode = load(path, num_threads)
        return lambda batch: encode(batch) + np.float32(1e-4)

    monkeypatch.setattr(parity, "load_openvino", load_drifting)
    with pytest.raises(ParityError, match=r"by OpenVINO: cosine") as caught:
        parity.check_files(
            clip,
            image=files[0],
            text=files[1],
            precision="fp32",
            runtimes=("onnxruntime", "openvino"),
        )
    for case in caught.value.report["cases"]:
        assert case["passed"] == case["name"].endswith(" by ONNX Runtime")


def test_a_corrupted_tower_fails_and_the_message_says_where(clip, files, tmp_path):
    broken = corrupt(files[0], tmp_path / "image.onnx", scale=1.01)
    with pytest.raises(ParityError, match=r"worst is the image tower") as caught:
        parity.check_files(clip, image=broken, text=files[1], precision="fp32")
    drifting = [case for case in caught.value.report["cases"] if not case["passed"]]
    assert {case["tower"] for case in drifting} == {"image"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_fail(clip, files, tmp_path, value):
    broken = corrupt(files[0], tmp_path / "image.onnx", value=value)
    with pytest.raises(ParityError, match=r"[1-9][0-9]* not finite"):
        parity.check_files(clip, image=broken, text=files[1], precision="fp32")


def test_what_depends_on_the_batch_fails(clip, encoders, monkeypatch):
    encode_images, encode_texts = encoders

    def encode(pixels):
        found = encode_images(pixels)
        return found + np.float32(3e-5) if len(found) == 3 else found

    tolerance = dataclasses.replace(parity_report.TOLERANCES["fp32"], max_difference=1.0)
    monkeypatch.setitem(parity_report.TOLERANCES, "fp32", tolerance)
    with pytest.raises(ParityError, match=r"3 images.*with the batch 3\.\d\de-05"):
        parity.check(clip, encode_images=encode, encode_texts=encode_texts, precision="fp32")


def test_a_length_that_is_not_one_fails_in_every_precision(clip, encoders):
    encode_images, encode_texts = encoders
    for precision in ("fp16", "int8"):
        with pytest.raises(ParityError, match=r"of the length from 1 2\.0e-02"):
            parity.check(
                clip,
                encode_images=lambda pixels: encode_images(pixels) * np.float32(1.02),
                encode_texts=encode_texts,
                precision=precision,
            )


def test_the_largest_batch_is_tried_where_there_is_one(clip, encoders):
    sizes = []

    def encode(pixels):
        sizes.append(len(pixels))
        found = encoders[0](pixels)
        return np.zeros_like(found) if len(pixels) == 64 else found

    with pytest.raises(ParityError, match="64 images"):
        parity.check(
            clip,
            encode_images=encode,
            encode_texts=encoders[1],
            precision="fp16",
            max_batch_size=64,
        )
    assert set(sizes) == {1, 2, 3, 13, 64}


def test_fewer_lengths_than_the_whole_context_are_compared_rightly(clip, encoders):
    report = parity.check(
        clip,
        encode_images=encoders[0],
        encode_texts=encoders[1],
        precision="fp32",
        text_lengths=(16,),
    )
    assert report.top1_agreement == 1.0


@pytest.mark.parametrize("change", ["mean", "order", "length", "dtype"])
def test_a_broken_contract_fails(clip, encoders, change):
    encode_images, encode_texts = encoders
    wrong = {
        # What a graph without the subtraction of the mean, or with BGR, would answer.
        "mean": lambda pixels: encode_images(pixels // 2),
        "order": lambda pixels: encode_images(np.ascontiguousarray(pixels[..., ::-1])),
        "length": lambda pixels: encode_images(pixels)[:, :-1],
        "dtype": lambda pixels: encode_images(pixels).astype(np.float64),
    }
    with pytest.raises(ParityError):
        parity.check(clip, encode_images=wrong[change], encode_texts=encode_texts, precision="fp32")


def test_a_cut_that_is_not_exact_fails(clip, encoders):
    encode_images, encode_texts = encoders

    def encode_last(tokens):
        """Read the last end of text, as arg-max on equal ids might."""
        mirrored = tokens.copy()
        for row in mirrored:
            first = np.flatnonzero(row == END_OF_TEXT)[0]
            last = np.flatnonzero(row == END_OF_TEXT)[-1]
            if last > first:
                row[first] = 1
        return encode_texts(mirrored)

    with pytest.raises(ParityError, match="text tower"):
        parity.check(clip, encode_images=encode_images, encode_texts=encode_last, precision="fp32")


def test_disagreement_on_the_best_prompt_counts_but_ties_do_not():
    expected = np.array([[0.30, 0.20], [0.30, 0.2999]], np.float32)
    found = expected[:, ::-1].copy()
    assert parity._top1_agreement(expected, found, tie=1e-3) == 0.5
    assert parity._top1_agreement(expected, expected, tie=0.0) == 1.0


class TestProbes:
    def test_images_reach_black_and_white_and_noise(self):
        pixels = probes.images(32)
        assert pixels.dtype == np.uint8
        assert pixels.shape[1:] == (32, 32, 3)
        assert {0.0, 255.0} <= {image.mean() for image in pixels}

    @pytest.mark.parametrize("context_length", [16, 77])
    def test_every_row_has_an_end_of_text(self, context_length):
        tokens = probes.tokens(context_length)
        assert tokens.dtype == np.int32
        assert (tokens == END_OF_TEXT).any(axis=1).all()

    def test_ends_of_text_stand_at_both_sides_of_each_cut(self):
        first = set(np.argmax(probes.tokens(77) == END_OF_TEXT, axis=1))
        assert {15, 16, 31, 32, 76} <= first

    def test_two_calls_give_the_same_arrays(self):
        assert np.array_equal(probes.images(32), probes.images(32))
        assert np.array_equal(probes.tokens(77), probes.tokens(77))
