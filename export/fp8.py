"""A FP32 image tower in ONNX and images in, the same tower with FP8 products of matrices out.

NVIDIA's ModelOpt looks at what goes through each product and puts a quantiser with a fixed range
before each of its operands, attention's among them; the rest is what `export.half` makes of it. So
are the patch embedding and the last projection: few products, which decide much.

E4M3 has three bits of mantissa: the root mean square of the error of a product of two rounded
numbers is 3.7 %, which alone leaves a cosine of 0.9993. Sums of the residual stream, which ModelOpt
would quantise too, stay as they are: with them ViT-B/32 of random weights had 0.9990, without
0.9994.

Text towers stay FP16: of short texts there is little to gain, a class is embedded once for all the
images that it is compared with, and they lose more.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning".
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from clip_rt.errors import ExportError, InputError
from export import half, onnx_writer, storage
from export.int8 import MAX_ROWS


def write_fp8(
    onnx_file: Path,
    batches: Sequence[NDArray[np.uint8]],
    path: Path,
    *,
    has_fp8_attention: bool = True,
) -> None:
    """Quantise an image tower.

    Args:
        onnx_file: FP32, of a vision transformer.
        batches: Pixels like those to come, uint8 (1, S, S, 3), of which the first `int8.MAX_ROWS`
            are looked at.
        path: Where to write; ends in .onnx.
        has_fp8_attention: Quantise the two products of attention too.

    Raises:
        InputError: it is no vision transformer.
        ExportError: ModelOpt is not installed.
    """
    modelopt = _import_modelopt()
    model = onnx.load(onnx_file)
    num_convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    if num_convolutions > 1:
        raise InputError(
            f"the image tower has {num_convolutions} convolutions, and FP8 is for vision "
            "transformers, whose work is products of matrices. Leave --precision fp16."
        )
    half.name_nodes(model.graph)
    last_steps = [re.escape(name) for name in half.last_steps(model.graph)]
    input_name = model.graph.input[0].name
    is_large = bool(storage.external_files(onnx_file))
    # It leaves files beside its input.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        given, made = Path(folder) / "given.onnx", Path(folder) / "made.onnx"
        onnx_writer.save(model, given)
        del model
        with contextlib.redirect_stdout(io.StringIO()):  # Says what is said above.
            modelopt.quantize(
                str(given),
                quantize_mode="fp8",
                calibration_data={input_name: np.concatenate(batches[:MAX_ROWS])},
                calibration_method="max",
                calibration_eps=["cpu"],
                op_types_to_quantize=["MatMul", "Gemm"],
                nodes_to_exclude=last_steps,
                disable_mha_qdq=not has_fp8_attention,
                high_precision_dtype="fp32",
                use_external_data_format=is_large,
                output_path=str(made),
                log_level="CRITICAL",
            )
        onnx_writer.save(half.to_fp16(onnx.load(made)), path)


def library_versions() -> dict[str, str]:
    """Return what decides the bytes of an FP8 model beside its input.

    Raises:
        ExportError: ModelOpt is not installed.
    """
    _import_modelopt()
    import modelopt

    return {"modelopt": modelopt.__version__}


def _import_modelopt() -> Any:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Looks for a GPU, and complains.
            from modelopt.onnx import quantization
    except ImportError as error:
        raise ExportError(
            f"FP8 needs NVIDIA's ModelOpt, and {error}. Install it: pip install 'clip-rt[fp8]'"
        ) from error
    return quantization
