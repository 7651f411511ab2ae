"""What the embedded server is put together from, or what is missing and how to get it.

The wheel `nvidia-pytriton` brings tritonserver and its python backend; this Python brings its
library, NumPy and ONNX Runtime; the repository brings the models. Nothing is imported or started.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format

from clip_rt.errors import ServerStartError
from clip_rt.wire.model_config import CONFIG, DataType, ModelConfig, read_config

OTHER_WAY = "Or name a running server: clip_rt.Client(url=...)."
GLIBC = (2, 35)
"""The oldest that the wheel runs with: its tag is manylinux_2_35."""
SHARED_MEMORY = "/dev/shm"
REGION_BYTES = 1024**2
"""What Triton 2.51's python backend takes for each instance to begin with."""

_INSTALL = f"Install it with pip install 'clip-rt[server]'. {OTHER_WAY}"

_MORE_SHARED_MEMORY = "Give the container more: docker run --shm-size=1g."
_WAYS_OUT = (
    ("shared memory", _MORE_SHARED_MEMORY),
    ("No space left", "Free some space, or name a folder on another disk with TMPDIR."),
    ("quota exceeded", "Free some space, or name a folder on another disk with TMPDIR."),
    ("Read-only file system", "Name a writable folder with TMPDIR."),
    ("GLIBC_", f"It needs glibc {GLIBC[0]}.{GLIBC[1]} or newer: Debian 12, Ubuntu 22.04."),
    ("shared libraries", "Install the package of your system that brings this library."),
    ("Exec format error", "Its binaries are for x86-64; install it anew on this machine."),
    ("Permission denied", "Its files must be executable, and their disk not mounted noexec."),
    ("temporary directory", "Its /tmp must be writable, wherever TMPDIR is: mount a tmpfs there."),
    ("Resource temporarily unavailable", "Allow this user more processes with ulimit -u."),
)
"""What to do about a fault, by words of the system that tell it."""
_DTYPE_BYTES = {
    **dict.fromkeys(("UINT8", "INT8", "BOOL"), 1),
    **dict.fromkeys(("FP16", "BF16", "INT16", "UINT16"), 2),
    **dict.fromkeys(("FP64", "INT64", "UINT64"), 8),
}
"""Of 4 bytes are the others."""
_MIB = 1024**2
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_SAFE_NAME = re.compile(r"(?:[A-Za-z0-9_.+=,@%:~#!^-]|[^\x00-\x7f\s])+")
"""What a shell takes as it is within a word: no quotes, no patterns, nothing that ends it."""
_PARTS = {"clip_rt": ".", "numpy": "linalg", "onnxruntime": "capi", "pytriton": "tritonserver"}
"""A folder in a package that tells it from one that only has its name."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Home:
    """Where the parts lie that a server is put together from."""

    binary: Path
    backend: Path
    stub: Path
    libraries: Path
    libpython: Path | None
    python: Path
    packages: tuple[Path, ...]

    def files(self, folder: Path) -> dict[str, str]:
        """Return the content of small files, by their path in the server's folder."""
        # The stub embeds Python and heeds none of its environment variables, but it looks for
        # `python3` in PATH, and a pyvenv.cfg beside that tells it where everything is: in the
        # server's folder, as in neither file every path can be written.
        packages = (f"{folder}/packages/{index}\n" for index in range(len(self.packages)))
        return {
            "python/pyvenv.cfg": f"home = {folder}/base/{self.python.parent.name}\n",
            f"python/lib/python{_VERSION}/site-packages/clip_rt.pth": "".join(packages),
        }

    def links(self) -> dict[str, Path]:
        """Return the targets of symbolic links, by their path in the server's folder."""
        backend = (file for file in self.backend.iterdir() if file.is_file())
        return {
            **{f"backends/python/{file.name}": file for file in backend},
            **{f"packages/{index}": packages for index, packages in enumerate(self.packages)},
            **{f"lib/{file.name}": file for file in (self.libpython,) if file is not None},
            "lib/nvidia": self.libraries,
            "python/bin/python3": self.python,
            "base": self.python.parent.parent,
        }

    def copies(self) -> dict[str, Path]:
        """Return the sources of executable copies, by their path in the server's folder.

        Triton 2.51 changes the mode of a stub that it cannot execute, whatever the reason, so that
        it gets one of its own.
        """
        return {f"backends/python/{self.stub.name}": self.stub}


def find_home() -> Home:
    """Find the parts, or say which is missing and how to get it."""
    _check_system()
    parent = _find_package("pytriton")
    triton = parent / "pytriton" / "tritonserver"
    stubs = triton / "python_backend_stubs"
    libraries = parent / "nvidia_pytriton.libs"
    home = Home(
        binary=triton / "bin" / "tritonserver",
        backend=triton / "backends" / "python",
        stub=stubs / _VERSION / "triton_python_backend_stub",
        libraries=libraries,
        libpython=_find_libpython(_VERSION, libraries),
        python=_find_python(),
        packages=tuple(dict.fromkeys(map(_find_package, ("numpy", "onnxruntime", "clip_rt")))),
    )
    if home.binary.exists() and not home.stub.exists():
        served = ", ".join(sorted(path.name for path in stubs.iterdir()))
        raise ServerStartError(
            f"the embedded server has no part for Python {_VERSION}, only for {served}. Use one of "
            f"those. {OTHER_WAY}"
        )
    for part in (home.binary, home.stub):
        if not part.exists():
            raise ServerStartError(f"{part.name} of nvidia-pytriton is missing. {_INSTALL}")
        if not os.access(part, os.X_OK):
            raise ServerStartError(
                f"{part} cannot be executed. Its disk may be mounted noexec, or chmod +x it. "
                f"{OTHER_WAY}"
            )
    return home


def _check_system() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ServerStartError(
            f"the embedded server runs on Linux x86-64 only; this is {sys.platform} "
            f"{platform.machine()}. {OTHER_WAY}"
        )
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):  # musl does not tell.
        libc = ""
    name, _, version = libc.partition(" ")
    if name != "glibc":
        raise ServerStartError(
            "the embedded server needs glibc, and the C library of this system is another (musl, "
            f"as in Alpine?). Use an image made from Debian or Ubuntu. {OTHER_WAY}"
        )
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < GLIBC:
        raise ServerStartError(
            f"the embedded server needs glibc {GLIBC[0]}.{GLIBC[1]} or newer; this system has "
            f"{version}. Use Debian 12, Ubuntu 22.04 or newer. {OTHER_WAY}"
        )


def find_way_out(fault: str, *, default: str = OTHER_WAY) -> str:
    """Say what can be done about a fault that the system or Triton has words for."""
    return next((way for words, way in _WAYS_OUT if words in fault), default)


def check_shared_memory(models: dict[str, Path]) -> None:
    """Make sure that /dev/shm holds a full batch for every instance of the models.

    Raises:
        ServerStartError: it does not.
    """
    need_by_model = {
        name: _estimate_shared_memory(_read_config(folder)) for name, folder in models.items()
    }
    need_bytes = sum(need_by_model.values())
    try:
        free_bytes = shutil.disk_usage(SHARED_MEMORY).free
    except OSError as error:
        raise ServerStartError(
            f"the embedded server needs {SHARED_MEMORY}: {error.strerror}. Mount a tmpfs there. "
            f"{OTHER_WAY}"
        ) from error
    if free_bytes < need_bytes:
        largest = max(need_by_model, key=lambda name: need_by_model[name])
        raise ServerStartError(
            f"{SHARED_MEMORY} has {free_bytes / _MIB:.1f} MiB left, and full batches of "
            f"{len(models)} models need {need_bytes / _MIB:.1f} MiB of shared memory, "
            f"{need_by_model[largest] / _MIB:.1f} MiB of it {largest!r}. {_MORE_SHARED_MEMORY} "
            f"Or export with smaller batches. {OTHER_WAY}"
        )


def _estimate_shared_memory(config: ModelConfig) -> int:
    """Return how many bytes a model's instances need: each its region, or one batch in and out."""
    if config.backend != "python":
        return 0
    row_bytes = 0
    for tensor in (*config.input, *config.output):
        dtype = DataType.Name(tensor.data_type).removeprefix("TYPE_")
        num_elements = math.prod(max(1, size) for size in tensor.dims)
        row_bytes += num_elements * _DTYPE_BYTES.get(dtype, 4)
    batch_bytes: int = max(1, config.max_batch_size) * row_bytes
    num_instances: int = max(1, sum(group.count for group in config.instance_group))
    return num_instances * max(REGION_BYTES, batch_bytes)


def _find_package(name: str) -> Path:
    """Return the folder that a package lies in.

    Not one that only has the same name, as a file of a user's project may: nothing of these is
    imported here, where that would show.
    """
    spec = importlib.util.find_spec(name)
    others = (importlib.machinery.PathFinder.find_spec(name, [entry]) for entry in sys.path)
    for each in (spec, *others) if spec is not None else ():
        if each is not None and each.origin is not None and each.submodule_search_locations:
            package = Path(os.path.abspath(each.origin)).parent
            if (package / _PARTS[name]).is_dir():
                return package.parent
    raise ServerStartError(f"the embedded server needs {name}, which is not installed. {_INSTALL}")


def _find_python() -> Path:
    """Find the base interpreter, also in an application that embeds Python."""
    version = f"python{_VERSION}"
    candidates = (
        Path(sys.base_exec_prefix) / "bin" / version,
        Path(os.path.realpath(sys.executable)) if sys.executable else None,
        Path(shutil.which(version) or ""),
    )
    for path in candidates:
        if path is not None and path.name.startswith("python") and os.access(path, os.X_OK):
            return path
    raise ServerStartError(
        f"no {version} was found in {sys.base_exec_prefix!r} to run the server with. {OTHER_WAY}"
    )


def _find_libpython(version: str, bundled: Path) -> Path | None:
    """Find the shared library of this Python; None where the wheel brings its own (3.13)."""
    major, minor = version.split(".")
    if any(bundled.glob(f"libpython{major}-*.{minor}.so*")):
        return None
    name = f"libpython{version}.so.1.0"
    configured = (sysconfig.get_config_var(key) for key in ("LIBDIR", "LIBPL"))
    folders = [Path(folder) for folder in configured if folder]
    folders += [Path(sys.base_exec_prefix) / "lib", Path("/usr/lib/x86_64-linux-gnu")]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise ServerStartError(
        f"{name} was not found in {', '.join(dict.fromkeys(map(str, folders)))}; the embedded "
        f"server needs it. On Debian or Ubuntu: apt install python{version}-dev. With pyenv: "
        f"install Python with PYTHON_CONFIGURE_OPTS=--enable-shared. {OTHER_WAY}"
    )


def find_repository(repository: str | os.PathLike[str]) -> Path:
    """Return the folder that a path leads to, whatever the working folder will be.

    Raises:
        ServerStartError: there is none.
    """
    reason = "does not exist"
    try:
        place = Path(os.path.realpath(repository))
        if place.is_dir():
            return place
    except OSError as error:  # Its name is too long, or the working folder was removed.
        reason = f"cannot be found: {error.strerror}"
    except ValueError:
        reason = "cannot be found: no path holds a zero byte"
    raise ServerStartError(
        f"the model repository {os.fspath(repository)[:300]!r} {reason}. Export a model with "
        f"python -m export.onnx, or name another folder with repository=. {OTHER_WAY}"
    )


def find_models(repository: Path) -> dict[str, Path]:
    """List the models of a repository that the embedded server can run, by name.

    Raises:
        ServerStartError: there is none, or one of them cannot be read or served.
    """
    place = find_repository(repository)
    folders = [file.parent for file in sorted(place.glob(f"*/{CONFIG}"))]
    configs = {folder: _read_config(folder) for folder in folders}
    models = {folder.name: folder for folder in folders if configs[folder].backend == "python"}
    for name in models:
        if not _SAFE_NAME.fullmatch(name):
            raise ServerStartError(
                f"the model {name[:100]!r} of the model repository cannot be served: Triton 2.51 "
                "would give its name to a shell. Rename its folder, to letters, digits, _ . and "
                f"-. {OTHER_WAY}"
            )
    for folder, config in configs.items():
        steps = {step.model_name for step in config.ensemble_scheduling.step}
        if config.platform == "ensemble" and steps <= models.keys():
            models[folder.name] = folder
    others = [folder.name for folder in folders if folder.name not in models]
    if others:
        _log.info("the embedded server leaves out %s: not for its backend", ", ".join(others))
    if not models:
        found = f" It holds {', '.join(others)}, for other backends." if others else ""
        raise ServerStartError(
            f"the model repository {str(repository)!r} holds no model that the embedded server can "
            f"run.{found} Export one with python -m export.onnx. {OTHER_WAY}"
        )
    return models


def _read_config(folder: Path) -> ModelConfig:
    try:
        return read_config(folder, allow_unknown_field=True)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ServerStartError(
            f"{folder / CONFIG} of the model repository cannot be read: {reason}. Export the model "
            f"again, or remove its folder. {OTHER_WAY}"
        ) from error
