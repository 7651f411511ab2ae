"""OpenVINO on the exported towers, FP32 or INT8, called directly, and what it counts inside."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from benchmarks.contenders.bare import Bare, Encode
from benchmarks.contenders.implementation import count_cores, installed
from benchmarks.contenders.kit import Kit
from benchmarks.findings import CallKind
from clip_rt.telemetry import TOTAL

OPERATORS = {
    "matrix products": ("FullyConnected", "MatMul"),
    "convolution": ("Convolution",),
    "attention": ("ScaledDotProductAttention", "Subgraph", "Softmax"),
    "normalisation": ("MVN",),
    "layout": ("Transpose", "Reorder", "Reshape"),
}
"""By kind, the operators that OpenVINO names after it has fused them. A Subgraph is what it
compiles itself: in these models, attention."""
ELEMENTWISE = "elementwise"
"""All other operators."""
KINDS = (*OPERATORS, ELEMENTWISE)
KIND_OF = {operator: kind for kind, operators in OPERATORS.items() for operator in operators}
PROFILE_LIMIT_S = 300.0


class OpenVINO(Bare):
    """The towers in OpenVINO.

    Args:
        kit: Whose model it is.
        files: Of the image tower and of the text tower.
    """

    def __init__(self, kit: Kit, files: tuple[Path, Path]) -> None:
        self._image_file, text_file = files
        image, text = load(self._image_file), load(text_file)
        super().__init__(kit, image, text, installed("openvino"))

    def profile(self, call: CallKind, prepared: Any, num_calls: int) -> list[dict[str, float]]:
        """Return for each of some runs the seconds by kind of operator, and `total`.

        In a process of its own that ends with it: a second copy of the tower is not among the
        memory that this contender needs.

        Raises:
            ValueError: the call is another than "pixels".
        """
        if call != "pixels":
            raise ValueError(f"only the image tower is taken apart, with pixels; this is {call}.")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found = pool.submit(_profile, self._image_file, prepared, num_calls)
            return found.result(timeout=PROFILE_LIMIT_S)


def make(kit: Kit, *, is_int8: bool) -> OpenVINO:
    """Load both towers."""
    if is_int8:
        files = (kit.tower("int8", "image", "model.xml"), kit.tower("int8", "text", "model.xml"))
    else:
        files = (kit.tower("onnxruntime", "image"), kit.tower("onnxruntime", "text"))
    return OpenVINO(kit, files)


def _profile(file: Path, batch: NDArray[Any], num_calls: int) -> list[dict[str, float]]:
    """Count in each of some runs after the first, which sets things up."""
    request = _compile(file, is_counting=True)
    request.infer({0: batch}, share_inputs=True)
    before_s = _spent_s(request, num_runs=1)
    calls = []
    for num_runs in range(2, num_calls + 2):
        start_s = time.perf_counter()
        request.infer({0: batch}, share_inputs=True, share_outputs=True)
        total_s = time.perf_counter() - start_s
        spent_s = _spent_s(request, num_runs)
        # What a model has none of is left out.
        kinds = {kind: spent_s[kind] - before_s[kind] for kind in KINDS if spent_s[kind] > 0}
        calls.append({**kinds, TOTAL: total_s})
        before_s = spent_s
    return calls


def _spent_s(request: openvino.InferRequest, num_runs: int) -> Counter[str]:
    """Return the seconds of all runs so far by kind; OpenVINO's counters are the means of these."""
    spent_s: Counter[str] = Counter()
    for operator in request.profiling_info:
        kind = KIND_OF.get(operator.node_type, ELEMENTWISE)
        spent_s[kind] += num_runs * operator.real_time.total_seconds()
    return spent_s


def _compile(file: Path, *, is_counting: bool) -> openvino.InferRequest:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": count_cores(),
        "ENABLE_CPU_PINNING": False,
        "PERF_COUNT": is_counting,
    }
    return openvino.Core().compile_model(str(file), "CPU", settings).create_infer_request()


def load(file: Path) -> Encode:
    """Load a tower, ONNX or OpenVINO's own, with the settings of export/python_model.py."""
    request = _compile(file, is_counting=False)

    def encode(batch: NDArray[np.generic]) -> NDArray[np.float32]:
        embeddings: NDArray[np.float32] = request.infer({0: batch}, share_inputs=True)[0]
        return embeddings

    return encode
