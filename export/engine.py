"""An ONNX file in, a TensorRT engine out, by the Python API of TensorRT 10.12 and newer.

Networks are strongly typed, as TensorRT 11 has them only: the ONNX file says what is FP16, and its
quantisers what is FP8. Two runtimes share one API:

* `tensorrt` builds on the GPU that will serve; Triton's tensorrt backend loads its engines.
* `rtx`, TensorRT for RTX, compiles ahead of time without a GPU, for those NVIDIA calls RTX. Here it
  proves that a graph goes through NVIDIA's parser and compiler; Triton does not load its engines.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import shlex
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from rich.progress import Progress, TaskID

from clip_rt.errors import ExportError, InputError
from clip_rt.specs import EMBEDDINGS, PIXELS, TEXT_BUCKETS, TOKENS, EncoderFacts
from export.console import console
from export.store import source_hash
from export.triton_config import MAX_BATCH_SIZE

Runtime = Literal["tensorrt", "rtx"]
MODULES: dict[Runtime, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
"""Names under which each runtime is installed; the packages of one have had several."""
OLDEST = {"tensorrt": (10, 12), "rtx": (1, 0)}
FP8_CAPABILITY = (8, 9)
"""Of the first GPUs with FP8: Ada, then Hopper and Blackwell."""
CONTAINER = "nvcr.io/nvidia/tensorrt:26.07-py3"
"""Where TensorRT is at home; the same month's Triton container runs what it builds."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Profile:
    """Shapes an engine is built for: the smallest, the one it is tuned for, the largest."""

    smallest: tuple[int, ...]
    tuned_for: tuple[int, ...]
    largest: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What decides an engine besides its ONNX file and the GPU."""

    runtime: Runtime = "tensorrt"
    opt_batch_size: int = 8
    """Batch the kernels are tuned for: what you expect to be asked."""
    max_batch_size: int = MAX_BATCH_SIZE
    optimization_level: int = 3
    """0 to 5: how long TensorRT looks for fast kernels; 5 is for releases."""
    workspace_gib: float = 4.0
    """Most scratch memory a kernel may take."""
    compute_capabilities: tuple[str, ...] = ()
    """GPUs to compile for, such as 8.9, with rtx only; empty is the runtime's default."""

    def __post_init__(self) -> None:
        if not 1 <= self.opt_batch_size <= self.max_batch_size:
            raise InputError(
                f"opt_batch_size is {self.opt_batch_size}; it must be within 1 and max_batch_size, "
                f"{self.max_batch_size}."
            )
        if not 0 <= self.optimization_level <= 5:
            raise InputError(f"optimization_level is {self.optimization_level}; it must be 0 to 5.")
        if not 0 < self.workspace_gib <= 1024:
            raise InputError(f"workspace_gib is {self.workspace_gib}; it must be above 0.")
        if self.compute_capabilities and self.runtime != "rtx":
            raise InputError(
                "compute_capabilities are chosen with --runtime rtx only: TensorRT builds for the "
                "GPU it runs on."
            )


def image_profiles(facts: EncoderFacts, options: BuildOptions) -> tuple[Profile, ...]:
    """Return the one profile of the image engine: batches of 1, opt and max."""
    shape = (facts.side_px, facts.side_px, 3)
    return (_profile(options, shape),)


def text_profiles(facts: EncoderFacts, options: BuildOptions) -> tuple[Profile, ...]:
    """Return a profile of each length of text: batches vary, lengths within a profile do not."""
    return tuple(_profile(options, (length,)) for length in text_lengths(facts))


def text_lengths(facts: EncoderFacts) -> tuple[int, ...]:
    """Return the lengths, in tokens, that an engine reads: the buckets, and the context.

    Of a model whose embeddings depend on the padding, the context is the only one.
    """
    longest = facts.context_length
    if not facts.is_any_length_exact:
        return (longest,)
    return tuple(sorted({min(length, longest) for length in TEXT_BUCKETS} | {longest}))


def _profile(options: BuildOptions, shape: tuple[int, ...]) -> Profile:
    batches = (1, options.opt_batch_size, options.max_batch_size)
    smallest, tuned_for, largest = ((batch, *shape) for batch in batches)
    return Profile(smallest, tuned_for, largest)


def load_runtime(runtime: Runtime) -> ModuleType:
    """Import TensorRT.

    Raises:
        ExportError: it is not installed, too old, or there is no GPU that it needs; the message
            says what is missing and which command works instead.
    """
    for name in MODULES[runtime]:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            missing = error
            continue
        version = tuple(int(part) for part in module.__version__.split(".")[:2])
        if version < OLDEST[runtime]:
            oldest = ".".join(map(str, OLDEST[runtime]))
            raise ExportError(f"{name} is {module.__version__}; {oldest} or newer is needed.")
        if runtime == "tensorrt" and not gpu_names():
            raise ExportError(
                f"TensorRT builds on the GPU that will serve, and none is visible here. {way_out()}"
            )
        if runtime == "tensorrt" and not torch.cuda.is_available():
            raise ExportError(
                f"the gate runs engines beside torch {torch.__version__}, which sees no GPU: it is "
                f"a build without CUDA, or for another driver. {way_out()}"
            )
        return module
    if runtime == "rtx":
        raise ExportError(
            f"TensorRT for RTX is not installed ({missing}). It needs no GPU: pip install "
            "tensorrt-rtx-cu12-libs tensorrt-rtx-cu12-bindings"
        ) from missing
    raise ExportError(f"TensorRT is not installed ({missing}). {way_out()}") from missing


def way_out() -> str:
    """Return the command that does on a GPU machine what was asked for here."""
    asked = shlex.join(sys.argv[1:])
    words = {"open_clip:": "open-clip", "hf:": "transformers", "fp8": "fp8"}
    extras = ",".join(["export", *(extra for word, extra in words.items() if word in asked)])
    inside = f"pip install -e '.[{extras}]' && python -m export.trt {asked}"
    return (
        "On a machine with an NVIDIA GPU and Docker, with the weights below this folder:\n\n"
        f'    docker run --rm --gpus all -v "$PWD":/clip_rt -w /clip_rt {CONTAINER} bash -c '
        f"{shlex.quote(inside)}\n\n"
        "Without a GPU, --runtime rtx checks that the graphs compile."
    )


def gpu_names() -> list[str]:
    """Return name and compute capability of each GPU that CUDA sees; none without CUDA.

    The name matters to an engine: two GPUs of one capability have different fastest kernels.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for device in range(count.value):
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h.
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        cuda.cuDeviceGetName(name, len(name), device)
        found.append(f"{name.value.decode(errors='replace')}, {major.value}.{minor.value}")
    return found


def engine_key(
    onnx_sha256: Sequence[str], profiles: Sequence[Profile], options: BuildOptions, trt: ModuleType
) -> dict[str, object]:
    """Return all that an engine depends on, for `export.store`."""
    return {
        "onnx": list(onnx_sha256),
        "version": trt.__version__,
        "gpu": gpu_names()[:1] if options.runtime == "tensorrt" else [],
        "code": source_hash(sys.modules[__name__]),
        "profiles": [asdict(profile) for profile in profiles],
        "options": asdict(options),
    }


def build_engine(
    onnx: Path,
    path: Path,
    *,
    profiles: Sequence[Profile],
    options: BuildOptions,
    trt: Any,
    timing_cache: Path | None = None,
) -> None:
    """Build one engine.

    Args:
        onnx: Of `export.onnx_writer`; weights may lie beside it.
        path: Where to write.
        profiles: At least one.
        options: See `BuildOptions`.
        trt: What `load_runtime` returned.
        timing_cache: Read and written where it is; kernels timed once are not timed again. Not used
            by rtx, which times nothing.

    Raises:
        ExportError: TensorRT cannot parse or build it; carries what TensorRT said.
    """
    logger = _make_logger(trt)
    builder = trt.Builder(logger)
    # Always on in TensorRT 11, where the flag remains and is ignored.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    flags = 0 if strongly_typed is None else 1 << int(strongly_typed)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise ExportError(f"TensorRT cannot read {onnx.name}: {'; '.join(errors)[:2000]}")
    _check_network(trt, network)
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * 2**30))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    targets = check_targets(trt, options)
    if targets:
        config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(target, index)
    for each in profiles:
        profile = builder.create_optimization_profile()
        profile.set_shape(network.get_input(0).name, each.smallest, each.tuned_for, each.largest)
        config.add_optimization_profile(profile)
    if timing_cache is not None and options.runtime == "tensorrt":
        known = timing_cache.read_bytes() if timing_cache.is_file() else b""
        # Refused where it was timed on another GPU; then a new one is begun.
        if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        config.progress_monitor = monitor = _make_monitor(trt, progress)
        plan = builder.build_serialized_network(network, config)
        config.progress_monitor = None
        del monitor
    if plan is None:
        raise ExportError(f"TensorRT cannot build {onnx.name}: {logger.last_error[:2000]}")
    path.write_bytes(plan)
    if timing_cache is not None and options.runtime == "tensorrt":
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=timing_cache.parent, delete=False) as staged:
            staged.write(config.get_timing_cache().serialize())
        os.replace(staged.name, timing_cache)


def _check_network(trt: Any, network: Any) -> None:
    """Refuse a network that does not obey the tensor contract."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    found = [(each.name, each.dtype) for each in (*inputs, *outputs)]
    contracts = (
        [(PIXELS, trt.DataType.UINT8), (EMBEDDINGS, trt.DataType.FLOAT)],
        [(TOKENS, trt.DataType.INT32), (EMBEDDINGS, trt.DataType.FLOAT)],
    )
    if found not in contracts:
        raise ExportError(
            f"the network reads and writes {found}, not what the tensor contract says."
        )


def check_targets(trt: Any, options: BuildOptions) -> list[Any]:
    """Return the GPUs to compile for, as `trt` calls them.

    Raises:
        InputError: it does not compile for one of them; lists those it does.
    """
    if not options.compute_capabilities:
        return []
    known = {
        f"{int(value) // 10}.{int(value) % 10}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    unknown = [target for target in options.compute_capabilities if target not in known]
    if unknown:
        raise InputError(
            f"TensorRT for RTX does not compile for {', '.join(unknown)}; it does for "
            f"{', '.join(known)}."
        )
    return [known[target] for target in options.compute_capabilities]


def check_fp8(options: BuildOptions) -> None:
    """Refuse FP8 for GPUs that have none.

    Raises:
        InputError: names the GPU's compute capability and the first that has it.
    """
    targets = list(options.compute_capabilities)
    if options.runtime == "tensorrt":
        targets = [name.rpartition(", ")[2] for name in gpu_names()[:1]]
    for target in targets:
        if tuple(map(int, target.split("."))) < FP8_CAPABILITY:
            oldest = ".".join(map(str, FP8_CAPABILITY))
            raise InputError(
                f"GPUs of compute capability {target} have no FP8; those of {oldest} and newer "
                "have. Leave --precision fp16."
            )


def _make_logger(trt: Any) -> Any:
    """Send what TensorRT says to `logging`, and keep its last error."""
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.WARNING,
        trt.ILogger.Severity.INFO: logging.INFO,
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = "it did not say why"

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                self.last_error = message
            _log.log(level, "%s", message)

    return Logger()


def _make_monitor(trt: Any, progress: Progress) -> Any:
    """Show the phases of a build as bars. TensorRT calls it from several threads."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._tasks: dict[str, TaskID] = {}

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            with self._lock:
                self._tasks[name] = progress.add_task(name, total=num_steps)

        def step_complete(self, name: str, step: int) -> bool:
            with self._lock:
                if name in self._tasks:
                    progress.update(self._tasks[name], completed=step + 1)
            return True

        def phase_finish(self, name: str) -> None:
            with self._lock:
                task = self._tasks.pop(name, None)
                if task is not None:
                    progress.remove_task(task)

    return Monitor()
