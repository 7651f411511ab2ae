"""Whether ONNX Runtime survives a graph that is not ours: asked in a process of its own.

It may crash while it optimises one, as version 1.32 does with CoCa's text tower in FP16 (in
`MatmulTransposeFusion`), and the command would end without a word.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import onnxruntime

from clip_rt.errors import ExportError

MAX_S = 900.0
"""For the load; of the largest models it takes a minute."""
PROGRAM = """
import sys, onnxruntime
onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
"""


def check_survives(path: Path, *, tower: str, precision: str) -> None:
    """Load an ONNX file into ONNX Runtime in a child process.

    An error that it raises is left to the process that loads the file to use it.

    Args:
        path: Of the file.
        tower: Of which it is, for the message.
        precision: Of which it is.

    Raises:
        ExportError: ONNX Runtime crashes, or does not come to an end.
    """
    way_out = (
        "Try another version of onnxruntime."
        if precision == "fp32"
        else "Export in FP32: --precision fp32."
    )
    command = [sys.executable, "-c", PROGRAM, str(path)]
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    what = f"ONNX Runtime {onnxruntime.__version__}"
    where = f"while loading the {tower} tower in {precision.upper()}"
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=MAX_S)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{what} takes more than {MAX_S:g} s {where}. {way_out}") from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ExportError(f"{what} is ended by {name} {where}. {way_out}")
