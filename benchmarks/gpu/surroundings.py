"""What is installed here that could be measured, and why the rest cannot; what the driver tells.

Nothing of the card is set: clocks and power limit are read and left as they are.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu.peers import import_forms
from clip_rt.errors import ExportError
from export.engine import Runtime, load_runtime
from training.encoders.libraries import import_open_clip, import_transformers

ONNX_RUNTIME, TENSORRT, RTX = "ONNX Runtime CUDA", "TensorRT", "TensorRT for RTX"
OPEN_CLIP, TRANSFORMERS = "open_clip", "transformers"
QUERY = {
    "name": "name",
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "power.limit": "power_limit_w",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
}
"""What nvidia-smi calls it, and what a result does."""
SMI_TIMEOUT_S = 20.0


def find() -> dict[str, dict[str, str]]:
    """Return by name the version of what can be used, or why it cannot be."""
    probes: dict[str, Callable[[], str]] = {
        "torch with CUDA": _torch,
        ONNX_RUNTIME: _onnx_runtime,
        TENSORRT: lambda: _tensorrt("tensorrt"),
        RTX: lambda: _tensorrt("rtx"),
        "tritonserver": lambda: shutil.which("tritonserver") or _absent("not on the PATH"),
        OPEN_CLIP: _open_clip,
        TRANSFORMERS: _transformers,
        "torchvision": lambda: _module("torchvision", "torchvision"),
        "nvImageCodec": lambda: _module("nvidia.nvimgcodec", "nvidia-nvimgcodec-cu13"),
        "ModelOpt": lambda: _distribution("nvidia-modelopt"),
        "nvidia-smi": lambda: shutil.which("nvidia-smi") or _absent("not on the PATH"),
        "matplotlib": lambda: _distribution("matplotlib"),
    }
    found = {}
    for name, probe in probes.items():
        try:
            found[name] = {"version": probe()}
        except Exception as error:  # Libraries fail to load in many ways.
            sentence, *_ = re.split(r"\.\s|\n", str(error).strip() or repr(error))
            found[name] = {"absent": sentence[:200]}
    return found


def read_gpu() -> dict[str, Any]:
    """Return what the driver says of the first GPU now; empty where nvidia-smi is not there."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(QUERY)}", *_PLAIN]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    cells = [cell.strip() for cell in done.stdout.strip().split(",")]
    return {name: _number(cell) for name, cell in zip(QUERY.values(), cells, strict=False)}


@contextlib.contextmanager
def watch_power() -> Iterator[list[float]]:
    """Read the power the card draws all the while, in W, into the list that is given."""
    watts: list[float] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            power_w = read_gpu().get("power_w")
            if not isinstance(power_w, float):
                return
            watts.append(power_w)

    thread = threading.Thread(target=read, name="power", daemon=True)
    thread.start()
    try:
        yield watts
    finally:
        is_over.set()
        thread.join()


_PLAIN = ("--format=csv,noheader,nounits",)


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def _absent(reason: str) -> str:
    raise ExportError(reason)


def _torch() -> str:
    if not torch.cuda.is_available():
        _absent(f"torch {torch.__version__} sees no GPU")
    return torch.__version__


def _onnx_runtime() -> str:
    # After torch, whose CUDA libraries it finds loaded.
    onnxruntime: Any = importlib.import_module("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        _absent(f"onnxruntime {onnxruntime.__version__} has no CUDA provider")
    if not torch.cuda.is_available():
        _absent("there is no GPU")
    return str(onnxruntime.__version__)


def _tensorrt(runtime: Runtime) -> str:
    module = load_runtime(runtime)
    if not torch.cuda.is_available():
        _absent(f"{module.__name__} {module.__version__} is there, and no GPU to run its engines")
    return str(module.__version__)


def _open_clip() -> str:
    import_forms()
    return str(import_open_clip().__version__)


def _transformers() -> str:
    import_forms()
    return str(import_transformers().__version__)


def _distribution(name: str) -> str:
    return metadata.version(name)


def _module(name: str, distribution: str) -> str:
    importlib.import_module(name)
    return metadata.version(distribution)
