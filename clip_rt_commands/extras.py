"""What a command needs to be installed: one sentence where it is not, and `--help` without it.

`training`, `export` and `benchmarks` call `begin` when they are imported, which comes before every
module of a command. A module that cannot be found then ends the command with the pip command that
brings it, and not with a traceback. Only the standard library is imported here.
"""

from __future__ import annotations

import contextlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from clip_rt_commands import find_console_module, find_module, find_root

ROOT = Path(find_root()).resolve()
OURS = (
    "benchmarks",
    "clip_rt",
    "clip_rt_commands",
    "examples",
    "export",
    "model_repository",
    "tests",
    "training",
)

EXTRAS = {
    "benchmarks": "server,export,int8,train,bench",
    "benchmarks.gpu": "export",
    "benchmarks.report": "bench",
    "benchmarks.run": "server,export,int8,bench",
    "benchmarks.serving": "server,export,int8,gateway,bench",
    "benchmarks.studies.bulk": "server,export,commands,train,bench",
    "benchmarks.studies.external_speed": "server,export,int8,open-clip,bench",
    "benchmarks.studies.families": "server,export,open-clip,transformers,bench",
    "benchmarks.studies.index_update": "search,bench",
    "benchmarks.studies.rollout": "server,export,gateway,bench",
    "benchmarks.studies.search_quality": "server,search,train,bench",
    "benchmarks.studies.search_start": "server,search,bench",
    "benchmarks.studies.text_length": "export,bench,peers",
    "benchmarks.studies.training_step": "train,bench,peers",
    "benchmarks.studies.vector_stores": "search,bench",
    "export": "export",
    "export.checksums": "",
    "export.compare": "server,export",
    "export.models": "",
    "training": "train",
}
"""Extras of pyproject.toml by command, or by the package of commands it is in."""

SLOW_MODULES = frozenset(
    "braceexpand duckdb faiss httpx huggingface_hub jinja2 lancedb markupsafe matplotlib modelopt "
    "nncf onnx onnx_ir onnxruntime onnxscript open_clip openvino prometheus_client psutil pyarrow "
    "pydantic resvg_py safetensors scipy rich sentencepiece skimage sklearn sqlite_vec tensorboard "
    "tensorrt tensorrt_rtx timm tomli torch torchvision tqdm transformers usearch "
    "webdataset".split()
)
"""What no text of `--help` depends on: everything but the client's own."""


def begin() -> None:
    """Prepare for what may be missing, if this process was started as one of our commands."""
    name = find_command(sys.orig_argv, getattr(sys, "argv", []))
    if name is None or isinstance(sys.excepthook, _Explain):
        return
    sys.excepthook = _Explain(name)
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.meta_path.insert(0, _StandInFinder())


def find_command(orig_argv: list[str], argv: list[str]) -> str | None:
    """Return the dotted name of our command that a process was started as, or None.

    Args:
        orig_argv: All of the process's arguments, the interpreter's included.
        argv: `sys.argv`, while a package is imported: "-m" or a file comes first.
    """
    name = find_console_module() or find_module(orig_argv, argv)
    if not name and argv and argv[0].endswith(".py"):
        with contextlib.suppress(OSError, ValueError):  # The working folder is gone; not of ours.
            path = Path(argv[0]).resolve().relative_to(ROOT)
            name = ".".join(path.with_suffix("").parts)
    return name if name.partition(".")[0] in ("benchmarks", "export", "training") else None


def extras_of(command: str) -> str:
    """Return the extras a command needs, with commas between them."""
    while command not in EXTRAS:
        command = command.rpartition(".")[0]
    return EXTRAS[command]


def sentence(command: str, module: str) -> str:
    """Say what a command needs and how to get it."""
    extras = extras_of(command)
    if not extras:
        return f"{command} needs {module}: pip install clip-rt, or in a checkout pip install -e ."
    # [server] needs the bundled model, a distribution of its own.
    bundled = "./model_repository " if "server" in extras.split(",") else ""
    return (
        f"{command} needs {module}: pip install 'clip-rt[{extras}]', or in a checkout "
        f"pip install -c constraints.txt {bundled}-e '.[{extras}]'"
    )


class _Explain:
    """An excepthook that says what is not installed, and leaves other errors to Python's own."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __call__(
        self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        module = (getattr(error, "name", None) or "").partition(".")[0]
        is_missing = isinstance(error, ModuleNotFoundError) and module
        if is_missing and module not in OURS and module not in sys.stdlib_module_names:
            sys.stderr.write("error: " + sentence(self._command, module) + "\n")
        else:
            sys.__excepthook__(kind, error, traceback)


class _StandIn(ModuleType):
    """A module that is imported and never used: whatever is taken from it is itself again."""

    def __getattr__(self, name: str) -> _StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> _StandIn:
        return self

    def __getitem__(self, _: Any) -> _StandIn:
        return self

    def __or__(self, _: Any) -> _StandIn:
        return self

    __ror__ = __or__

    def __mro_entries__(self, _: Any) -> tuple[type, ...]:
        return ()


class _StandInFinder(MetaPathFinder, Loader):
    """Finds `SLOW_MODULES`, installed or not, without importing them: help is there at once."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in SLOW_MODULES:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module as it is."""
