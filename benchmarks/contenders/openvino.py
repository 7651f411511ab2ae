"""OpenVINO on the exported towers, FP32 or INT8, called directly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
from numpy.typing import NDArray

from benchmarks.contenders.bare import Bare, Encode
from benchmarks.contenders.implementation import count_cores, installed
from benchmarks.contenders.kit import Kit


def make(kit: Kit, *, is_int8: bool) -> Bare:
    """Load both towers."""
    image, text = (
        _load(kit.tower("int8", tower, "model.xml") if is_int8 else kit.tower("onnxruntime", tower))
        for tower in ("image", "text")
    )
    return Bare(kit, image, text, installed("openvino"))


def _load(file: Path) -> Encode:
    # The options of export/python_model.py.
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": count_cores(),
        "ENABLE_CPU_PINNING": False,
    }
    request = openvino.Core().compile_model(str(file), "CPU", settings).create_infer_request()

    def encode(batch: NDArray[np.generic]) -> NDArray[np.float32]:
        embeddings: NDArray[np.float32] = request.infer(
            {0: batch}, share_inputs=True, share_outputs=True
        )[0]
        return embeddings

    return encode
