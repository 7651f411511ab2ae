"""ONNX Runtime on the exported towers, called directly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.contenders.bare import Bare, Encode
from benchmarks.contenders.implementation import count_cores, installed
from benchmarks.contenders.kit import Kit


def make(kit: Kit) -> Bare:
    """Load both towers."""
    image, text = (load(kit.tower("onnxruntime", tower)) for tower in ("image", "text"))
    return Bare(kit, image, text, installed("onnxruntime"))


def load(file: Path, *, is_default: bool = False, num_threads: int | None = None) -> Encode:
    """Load a tower with the options of export/python_model.py.

    Args:
        file: ONNX.
        is_default: Its threads spin while they wait as ONNX Runtime has it by default, for long.
        num_threads: Without it, one for each core.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or count_cores()
    options.inter_op_num_threads = 1
    if not is_default:
        options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def encode(batch: NDArray[np.generic]) -> NDArray[np.float32]:
        embeddings: NDArray[np.float32] = session.run(None, {name: batch})[0]
        return embeddings

    return encode
