"""Whether a runtime survives a graph that is not ours: asked in a process of its own.

It may crash while it reads or optimises one, and the command would end without a word: ONNX Runtime
1.32 does with CoCa's text tower in FP16 (in `MatmulTransposeFusion`), OpenVINO 2026.4 with windows
of pooling that are larger than what they pool.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from clip_rt.errors import ExportError
from clip_rt.specs import Tower
from export.parity import IN_WORDS, FileRuntime

MAX_S = 900.0
"""For a load; of the largest models it takes a minute."""
PROGRAMS: dict[FileRuntime, str] = {
    "onnxruntime": "import sys, onnxruntime as it; "
    "it.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])",
    "openvino": "import sys, openvino as it; "
    "it.Core().compile_model(sys.argv[1], 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})",
}


def check_survive(
    path: Path,
    *,
    tower: Tower,
    precision: str,
    runtimes: Sequence[FileRuntime],
    other_way: str | None = None,
) -> None:
    """Load an ONNX file into each runtime, in a child process each.

    An error that one raises is left to the process that loads the file to use it.

    Args:
        path: Of the file.
        tower: Of which it is, for the message.
        precision: Of which it is.
        runtimes: That are to load it.
        other_way: What to do about a crash, where it is not `export.onnx` that asks.

    Raises:
        ExportError: one crashes, or does not come to an end.
    """
    for runtime in runtimes:
        what = f"{IN_WORDS[runtime]} {metadata.version(runtime)}"
        where = f"while loading the {tower} tower in {precision.upper()}"
        way_out = f"Try another version of {runtime}."
        if other_way is not None:
            way_out = other_way
        elif precision != "fp32":
            way_out = "Export in FP32: --precision fp32."
        elif runtime == "openvino":
            way_out = "Leave it out: --runtime onnxruntime."
        try:
            done = subprocess.run(
                [sys.executable, "-c", PROGRAMS[runtime], str(path)],
                env=os.environ | {"ORT_DISABLE_TELEMETRY": "1"},
                capture_output=True,
                timeout=MAX_S,
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"{what} takes more than {MAX_S:g} s {where}. {way_out}") from error
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            raise ExportError(f"{what} is ended by {name} {where}. {way_out}")
