"""A FP32 ONNX file and calibration data in, an OpenVINO model with INT8 matrix products out.

Weights become INT8 per output channel, activations INT8 by ranges seen in the calibration data;
what attention and normalisations compute stays FP32, and so do the final projection and the L2
normalisation. The ranges are fixed, so an embedding does not depend on the batch it is computed in,
as it does where a runtime finds the ranges anew in each batch.

Source: Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 3; Xiao et al.
2023, "SmoothQuant", for the transformers.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import ExportError, InputError

MAX_ROWS = 300
"""More change the ranges no further; as many as NNCF itself looks at."""
_INSTALL = "Install it: pip install 'clip-rt[int8]'"
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _in_own_thread(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Run a function that loads OpenVINO's CPU plugin in a thread that ends with it.

    Each plugin gives the thread that loads it another stack for signal handlers, and puts back the
    one before when it is freed. Of two whose lives overlap the second puts back the first's, which
    is gone: the next signal ends the process, SIGCHLD from a data loader's worker for example
    (OpenVINO 2026.4, src/plugins/intel_cpu/src/plugin.cpp).
    """

    @wraps(function)
    def call(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(function, *arguments, **named).result()

    return call


@_in_own_thread
def write_int8(onnx_file: Path, batches: list[NDArray[np.generic]], path: Path) -> None:
    """Quantise a tower.

    Args:
        onnx_file: FP32.
        batches: Pixels or tokens like those it will serve, of which the first
            `MAX_ROWS` are looked at, one row each.
        path: Where to write; ends in .xml. The weights go beside it, in .bin.

    Raises:
        InputError: there is no calibration data.
        ExportError: OpenVINO or NNCF is not installed.
    """
    if not batches:
        raise InputError("there is nothing to calibrate INT8 on; pass --calibration.")
    nncf, openvino = _import_libraries()
    model = openvino.Core().read_model(onnx_file)
    with contextlib.redirect_stdout(io.StringIO()):  # Bars of its own within our stages.
        quantised = nncf.quantize(
            model,
            nncf.Dataset(batches[:MAX_ROWS], lambda batch: {0: batch}),
            subset_size=min(len(batches), MAX_ROWS),
            model_type=None if _is_resnet(model) else nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=_tail(model)),
        )
    openvino.save_model(quantised, path, compress_to_fp16=False)


@_in_own_thread
def load_openvino(
    path: Path, num_threads: int
) -> Callable[[NDArray[np.generic]], NDArray[np.float32]]:
    """Load a tower from its .xml or .onnx file, with the settings it is served with.

    Returns:
        Pixels or tokens in, embeddings (rows, embed_dim) out.

    Raises:
        ExportError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise ExportError(f"OpenVINO is needed, and {error}. {_INSTALL}") from error
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": num_threads,
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def encode(batch: NDArray[np.generic]) -> NDArray[np.float32]:
        return request.infer({0: batch})[0]

    return encode


def library_versions() -> dict[str, str]:
    """Return what decides the bytes of an INT8 model beside its input.

    Raises:
        ExportError: OpenVINO or NNCF is not installed.
    """
    nncf, openvino = _import_libraries()
    return {"nncf": nncf.__version__, "openvino": openvino.__version__.split("-")[0]}


def _import_libraries() -> tuple[Any, Any]:
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise ExportError(f"INT8 needs OpenVINO and NNCF, and {error}. {_INSTALL}") from error
    nncf.set_log_level(logging.ERROR)
    return nncf, openvino


def _is_resnet(model: Any) -> bool:
    """Tell by its convolutions: a ViT has the one that cuts patches.

    What NNCF does for transformers costs a ResNet's accuracy.
    """
    types = [node.get_type_name() for node in model.get_ops()]
    return types.count("Convolution") > 1


def _tail(model: Any) -> list[str]:
    """Name the operators from the final projection on to the embedding.

    They are few and decide the embedding's direction and length, so they are not quantised.
    """
    names = []
    waiting = [model.outputs[0].get_node()]
    while waiting:
        node = waiting.pop()
        if node.get_type_name() in ("Parameter", "Constant") or node.get_friendly_name() in names:
            continue
        names.append(node.get_friendly_name())
        if node.get_type_name() != "MatMul":
            waiting += [each.get_source_output().get_node() for each in node.inputs()]
    return names
