"""What counts as a default that is not the fastest."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from benchmarks.studies.defaults import judge

FOUND: dict[str, Any] = {
    "int8_is_fast": True,
    "served": {
        "image, batch 1": {
            "times_ms": {"onnxruntime": 69.0, "openvino": 57.0, "openvino int8": 17.0},
            "auto": "openvino",
        },
        "image, batch 8": {
            "times_ms": {"onnxruntime": 300.0, "openvino": 390.0, "openvino int8": 110.0},
            "auto": "openvino",
        },
    },
    "training": {"times_s": {"fp32": 2.0, "bf16": 1.0}, "auto": "bf16"},
}


def found(**changes: Any) -> dict[str, Any]:
    made = copy.deepcopy(FOUND)
    made["served"]["image, batch 1"]["auto"] = changes.get("auto", "openvino")
    made["served"]["image, batch 1"]["times_ms"] |= changes.get("times_ms", {})
    made["training"]["auto"] = changes.get("precision", "bf16")
    made["int8_is_fast"] = changes.get("int8_is_fast", True)
    return {"AVX2": made}


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, []),
        ({"auto": "onnxruntime"}, ["onnxruntime takes 69.0 ms, openvino 57.0"]),
        ({"auto": "onnxruntime", "times_ms": {"onnxruntime": 60.0}}, []),
        ({"precision": "fp32"}, ["fp32 is the default"]),
        ({"times_ms": {"openvino int8": 76.0}}, ["INT8 takes 76.0 ms, FP32 57.0"]),
        ({"times_ms": {"openvino int8": 76.0}, "int8_is_fast": False}, []),
        ({"int8_is_fast": False}, ["int8_is_fast is False"]),
        ({"precision": "fp32", "auto": "onnxruntime"}, ["onnxruntime takes", "fp32 is"]),
    ],
)
def test_a_default_slower_than_its_alternative_is_named(changes, faults) -> None:
    said = judge(found(**changes), tolerance=0.1)
    assert len(said) == len(faults)
    for fault, words in zip(said, faults, strict=True):
        assert fault.startswith("AVX2, ")
        assert words in fault
