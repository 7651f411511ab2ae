"""What runs a model file on this machine: OpenVINO or ONNX Runtime, the faster of them where asked.

NumPy and the standard library only, besides the runtime itself: an export copies this file, with
`processor` and `runtime_choice`, beside the model that Triton runs, where clip_rt may be missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if __package__:
    from clip_rt import processor
    from clip_rt.embedded import runtime_choice
else:  # A copy beside a model.
    import processor  # type: ignore[import-not-found, no-redef]
    import runtime_choice  # type: ignore[import-not-found, no-redef]

Encode: TypeAlias = Callable[[NDArray[Any]], Sequence[NDArray[np.float32]]]
"""A batch of pixels or tokens to the outputs of the file, in its order: embeddings, or hidden
states."""
Loaded: TypeAlias = tuple[Encode, str]
"""What embeds a batch, and the words of the log."""

PROVIDERS_BY_KIND = {"CPU": ["CPUExecutionProvider"], "GPU": ["CUDAExecutionProvider"]}
"""What an instance runs on unless `execution_providers` says otherwise.

TensorRT inside ONNX Runtime builds an engine during the first requests, for minutes, so it runs
only when it is asked for.
"""
RUNTIMES = ("auto", "onnxruntime", "openvino")
"""Values of `runtime`. auto on a processor is the faster of the two, as far as both are there and
take the model."""
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of all cores that a container may use in a period, and the period."""
IDLE_UNLOAD_VARIABLE = "CLIP_RT_IDLE_UNLOAD_S"
"""Seconds without a request after which a model's memory is given back until the next one."""
TEXT_LENGTH_TOKENS = 16
"""Of the text that runtimes are timed on."""


class RuntimeRefusedError(Exception):
    """A model cannot be run as it was asked to be; the message says why, and the way out."""


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A tower as it lies in its version's folder."""

    name: str
    """Of the Triton model."""
    folder: Path
    """Of the version."""
    kind: str
    """CPU or GPU."""
    device_id: int
    parameters: Mapping[str, str]
    """`runtime`, `intra_op_threads`, `execution_providers` and `context_length` are read."""
    dims: Sequence[int]
    """Of the input without its batch axis; -1 is any."""
    dtype: type[np.generic]
    """Of the input."""
    log: Callable[[str], object] = field(repr=False)
    warn: Callable[[str], object] = field(repr=False)

    @property
    def is_int8(self) -> bool:
        """Whether it is OpenVINO's, with integers inside."""
        return not (self.folder / "model.onnx").exists()

    @property
    def path(self) -> Path:
        """The file itself."""
        return self.folder / ("model.xml" if self.is_int8 else "model.onnx")

    @property
    def num_threads(self) -> int:
        """Threads of one run."""
        return int(self.parameters.get("intra_op_threads", 0)) or _count_cores()


def _count_cores() -> int:
    """Return how many cores this process may use, by its affinity and its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    try:
        quota, period = CGROUP_QUOTA.read_text("ascii").split()
        return min(num_cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # There is none, or it says "max".
        return num_cores


def load(model: ModelFile) -> Encode:
    """Load a model into the runtime that it asks for; return what embeds a batch.

    Raises:
        RuntimeRefusedError: it cannot be run where it was asked to.
    """
    _check_runtime(model)
    idle_unload_s = _read_idle_unload_s()
    if math.isinf(idle_unload_s):
        return _load(model)
    return _Idling(model, idle_unload_s)


class _Idling:
    """Embeds batches, and gives its memory back when it has not been asked for a while."""

    def __init__(self, model: ModelFile, idle_unload_s: float) -> None:
        self._model, self._idle_unload_s = model, idle_unload_s
        self._lock = threading.Lock()
        self._content = _name_content(model)
        self._encode: Encode | None = None
        self._used_s = time.monotonic()
        with self._lock:
            self._load()

    def __call__(self, batch: NDArray[Any]) -> Sequence[NDArray[np.float32]]:
        """Embed a batch, after loading the model again where that is needed.

        Raises:
            RuntimeRefusedError: its file was replaced meanwhile.
        """
        with self._lock:
            encode = self._encode or self._load()
            outputs = encode(batch)
            self._used_s = time.monotonic()
            return outputs

    def _load(self) -> Encode:
        model = self._model
        if _name_content(model) != self._content:
            # The other tower, or the client, may know the old one's embeddings.
            raise RuntimeRefusedError(
                f"{model.path} was replaced after {model.name} had been unloaded, which was idle "
                "for too long. Start its server again."
            )
        self._encode = _load(model)
        threading.Thread(target=self._unload_when_idle, name="idle unload", daemon=True).start()
        return self._encode

    def _unload_when_idle(self) -> None:
        while (left_s := self._used_s + self._idle_unload_s - time.monotonic()) > 0:
            time.sleep(left_s)
            # Whatever runs then has set it anew when the lock is free.
            with self._lock:
                pass
        with self._lock:
            self._encode = None
            gc.collect()
            _trim_heap()
        self._model.log(f"{self._model.name} was idle for {self._idle_unload_s:g} s: unloaded")


def set_idle_unload_s(idle_unload_s: float) -> None:
    """Have models that are loaded from now on, here or by a server started here, unload so."""
    if not math.isinf(idle_unload_s):
        os.environ[IDLE_UNLOAD_VARIABLE] = str(idle_unload_s)


def _read_idle_unload_s() -> float:
    said = os.environ.get(IDLE_UNLOAD_VARIABLE) or "inf"
    with contextlib.suppress(ValueError):
        if (idle_unload_s := float(said)) > 0:
            return idle_unload_s
    raise RuntimeRefusedError(
        f"${IDLE_UNLOAD_VARIABLE} is {said[:40]!r}; it must be a number of seconds above 0."
    )


def _name_content(model: ModelFile) -> tuple[int, int, int]:
    """Return what a replaced file does not have in common with the old one."""
    facts = model.path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _trim_heap() -> None:
    """Have malloc give back to the system what it keeps for later."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc alone has it.
        ctypes.CDLL(None).malloc_trim(0)


def _load(model: ModelFile) -> Encode:
    runtime = model.parameters.get("runtime", "auto")
    on_processor = model.kind == "CPU" and "execution_providers" not in model.parameters
    if model.is_int8 or runtime == "openvino":
        encode, words = _load_openvino(model)
    elif runtime == "auto" and on_processor:
        encode, words = _load_fastest(model)
    else:
        encode, words = _load_onnx(model)
    model.log(f"{model.name} is run by {words}")
    return encode


def _load_fastest(model: ModelFile) -> Loaded:
    """Load into the runtime that is remembered as the faster here, or measure both first."""
    folder, machine = runtime_choice.default_folder(), _name_machine()
    content = _name_model(model)
    choice = runtime_choice.recall(folder, machine, content, model.name)
    has_both = all(map(runtime_choice.installed, runtime_choice.RUNTIMES))
    if choice is None and has_both:
        # One after the other, or the towers and instances of a model would slow each other.
        with runtime_choice.alone(folder) as is_alone:
            choice = runtime_choice.recall(folder, machine, content, model.name)
            if choice is None and is_alone:
                return _measure(model, (folder, machine, content))
    reason = ""
    if choice is not None:
        reason = f"{choice}, measured at an earlier start"
    elif has_both and is_alone is None:
        reason = "not measured: no folder can be written to for a lock"
        if os.name != "posix":
            reason = "not measured: files are not locked on this system"
    elif has_both:
        reason = "not measured: other models still were"
    order = sorted(LOADERS, key=lambda name: choice is not None and name != choice.runtime)
    return _load_first_of(order, model, reason)


def _load_first_of(order: Sequence[str], model: ModelFile, reason: str) -> Loaded:
    """Load into the first runtime that takes the model; the last one's refusal is raised."""
    first, second = order
    try:
        encode, words = LOADERS[first](model)
    except Exception as error:
        model.warn(
            f"{model.name}: not by {runtime_choice.RUNTIMES[first]}, by "
            f"{runtime_choice.RUNTIMES[second]} instead: {error}"
        )
        return LOADERS[second](model)
    return encode, f"{words} ({reason})" if reason else words


def _measure(model: ModelFile, place: tuple[Path | None, str, str]) -> Loaded:
    """Load into both runtimes, time one row, and keep the faster; of one that fails, the other.

    A model that is loaded slowly, or that memory might not hold twice, is OpenVINO's without.
    """
    folder, machine, content = place
    first, second = LOADERS
    start_s = time.perf_counter()
    try:
        loaded = {first: LOADERS[first](model)}
    except Exception:
        return _load_first_of([first, second], model, "")
    load_s = time.perf_counter() - start_s
    num_bytes = runtime_choice.model_bytes(model.path)
    reason = None
    if load_s > runtime_choice.MAX_LOAD_S:
        reason = f"not measured: it took {load_s:.0f} s to load"
    elif not runtime_choice.fits_twice(num_bytes):
        reason = f"not measured: {num_bytes / 2**20:.0f} MiB twice might not fit into memory"
    else:
        batch = _make_row(model)
        try:
            loaded[second] = LOADERS[second](model)
            choice = runtime_choice.choose(
                runtime_choice.time_by_turns(
                    {each: partial(encode, batch) for each, (encode, _) in loaded.items()}
                )
            )
        except Exception as error:  # The first runs it, as it did before there was a second.
            model.warn(f"{model.name}: not measured: {error}")
            reason = "not measured"
        else:
            is_kept = runtime_choice.remember(folder, machine, content, choice, name=model.name)
            when = "now" if is_kept else "at each start: nothing can be kept"
            encode, words = loaded[choice.runtime]
            return encode, f"{words} ({choice}, measured {when})"
    encode, words = loaded[first]
    return encode, f"{words} ({reason})"


def _make_row(model: ModelFile) -> NDArray[Any]:
    """Make one row of zeros, as the model reads them."""
    length = min(
        TEXT_LENGTH_TOKENS, int(model.parameters.get("context_length", TEXT_LENGTH_TOKENS))
    )
    dims = [length if side < 0 else side for side in model.dims]
    return np.zeros((1, *dims), model.dtype)


def _name_machine() -> str:
    return runtime_choice.digest_machine(asdict(processor.read()))


def _name_model(model: ModelFile) -> str:
    # As config.pbtxt has them: in words.
    dims = [str(side) for side in model.dims]
    return runtime_choice.digest_model(model.path, dims, model.num_threads)


def _check_runtime(model: ModelFile) -> None:
    """Raise when what is asked for contradicts itself, the file or the device."""
    runtime, kind, is_int8 = model.parameters.get("runtime", "auto"), model.kind, model.is_int8
    has_providers = "execution_providers" in model.parameters
    named = " Its execution_providers are ONNX Runtime's." if has_providers else ""
    fault = None
    if runtime not in RUNTIMES:
        fault = f"has runtime {runtime[:40]!r}; there are {', '.join(RUNTIMES)}."
    elif is_int8 and kind != "CPU":
        fault = (
            f"is configured for {kind}; its INT8 model runs on CPU only. Export it in FP16 for a "
            "GPU."
        )
    elif is_int8 and (runtime == "onnxruntime" or has_providers):
        fault = (
            f"is an INT8 model, which only OpenVINO runs, and has runtime {runtime}.{named} "
            "Leave runtime auto and name no providers, or export it in FP32."
        )
    elif runtime == "openvino" and kind != "CPU":
        fault = (
            f"is configured for {kind} and has runtime openvino, which is for CPU. "
            "Change one: python -m export.repository --runtime auto, or --device cpu."
        )
    elif runtime == "openvino" and has_providers:
        fault = f"has runtime openvino.{named} Remove one of the two."
    if fault:
        raise RuntimeRefusedError(f"{model.name} {fault}")


def _load_onnx(model: ModelFile) -> Loaded:
    # Or it keeps an identifier in the user's cache folder and sends to its maker what it runs.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    kind, available = model.kind, onnxruntime.get_available_providers()
    wanted = PROVIDERS_BY_KIND[kind]
    if "execution_providers" in model.parameters:
        wanted = [name.strip() for name in model.parameters["execution_providers"].split(",")]
    device = {"device_id": model.device_id} if kind == "GPU" else {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = model.num_threads
    options.inter_op_num_threads = 1
    # Between the parts of a run threads spin for a moment, which saves 1 ms of 30 on one image;
    # longer, or between runs, they would take the cores from the client beside them.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        str(model.path),
        options,
        providers=[(name, device) for name in wanted if name in available],
    )
    taken = session.get_providers()
    # ONNX Runtime goes on with the processor when a GPU provider cannot start. We do not.
    if not set(wanted) & set(taken):
        raise RuntimeRefusedError(
            f"{model.name} is configured for {kind} and wants {' or '.join(wanted)}; "
            f"ONNX Runtime {onnxruntime.__version__} can use {', '.join(available)} here. "
            "Install onnxruntime-gpu with its CUDA libraries, or export for CPU."
        )
    name = session.get_inputs()[0].name
    words = f"ONNX Runtime {onnxruntime.__version__} with {', '.join(taken)}"
    return lambda batch: session.run(None, {name: batch}), words


def _load_openvino(model: ModelFile) -> Loaded:
    # Or it forks this process to send to its maker that it is used.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise RuntimeRefusedError(
            f"{model.name} is to be run by OpenVINO, and {error}. Install it beside the "
            "server: pip install openvino. Or, unless it is INT8, let ONNX Runtime run it: "
            "python -m export.repository --runtime onnxruntime"
        ) from error
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        # What is not INT8: OpenVINO prefers BF16, which is slower than FP32 without AMX.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": model.num_threads,
        # Threads bound to a core wait for whoever else has it.
        "ENABLE_CPU_PINNING": False,
    }
    request = openvino.Core().compile_model(str(model.path), "CPU", settings).create_infer_request()
    words = f"OpenVINO {openvino.__version__.split('-')[0]}"
    # Not shared outputs: a response is copied when all are made, and each run would overwrite them.
    return lambda batch: request.infer({0: batch}, share_inputs=True).to_tuple(), words


LOADERS: Mapping[str, Callable[[ModelFile], Loaded]] = {
    "openvino": _load_openvino,
    "onnxruntime": _load_onnx,
}
"""By runtime, in the order in which they are taken where nothing was measured. Each returns what
embeds a batch, and the words of the log."""
