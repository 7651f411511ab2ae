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
from dataclasses import dataclass, field
from pathlib import Path

from clip_rt.errors import ServerStartError

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
_DTYPE_BYTES = {"UINT8": 1, "INT8": 1, "BOOL": 1, "FP16": 2, "BF16": 2, "INT16": 2, "UINT16": 2}
_MIB = 1024**2
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
    packages: tuple[Path, ...] = field(default_factory=tuple)

    def files(self, folder: Path) -> dict[str, str]:
        """Return the content of small files, by their path in the server's folder."""
        # The stub embeds Python and heeds none of its environment variables, but it looks for
        # `python3` in PATH, and a pyvenv.cfg beside that tells it where everything is: in the
        # server's folder, as in neither file every path can be written.
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = (f"{folder}/packages/{index}\n" for index in range(len(self.packages)))
        return {
            "python/pyvenv.cfg": f"home = {folder}/base/{self.python.parent.name}\n",
            f"python/lib/{version}/site-packages/clip_rt.pth": "".join(packages),
        }

    def links(self) -> dict[str, str]:
        """Return the targets of symbolic links, by their path in the server's folder."""
        links = {
            f"backends/python/{path.name}": str(path)
            for path in self.backend.iterdir()
            if path.is_file()
        }
        links["python/bin/python3"] = str(self.python)
        links["base"] = str(self.python.parent.parent)
        links["lib/nvidia"] = str(self.libraries)
        for index, packages in enumerate(self.packages):
            links[f"packages/{index}"] = str(packages)
        if self.libpython is not None:
            links[f"lib/{self.libpython.name}"] = str(self.libpython)
        return links

    def copies(self) -> dict[str, str]:
        """Return the sources of executable copies, by their path in the server's folder.

        Triton 2.51 changes the mode of a stub that it cannot execute, whatever the reason, so that
        it gets one of its own.
        """
        return {f"backends/python/{self.stub.name}": str(self.stub)}


def find_home() -> Home:
    """Find the parts, or say which is missing and how to get it."""
    _check_system()
    parent = _find_package("pytriton")
    if parent is None:
        raise ServerStartError(f"the embedded server is not installed. {_INSTALL}")
    package = parent / "pytriton"
    triton = package / "tritonserver"
    stubs = triton / "python_backend_stubs"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    home = Home(
        binary=triton / "bin" / "tritonserver",
        backend=triton / "backends" / "python",
        stub=stubs / version / "triton_python_backend_stub",
        libraries=package.parent / "nvidia_pytriton.libs",
        libpython=_find_libpython(version, package.parent / "nvidia_pytriton.libs"),
        python=_find_python(),
        packages=tuple(dict.fromkeys(map(_find_packages, ("numpy", "onnxruntime", "clip_rt")))),
    )
    if home.binary.exists() and not home.stub.exists():
        served = ", ".join(sorted(path.name for path in stubs.iterdir()))
        raise ServerStartError(
            f"the embedded server has no part for Python {version}, only for {served}. Use one of "
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
    name, _, version = _read_libc().partition(" ")
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


def _read_libc() -> str:
    """Return name and version of the C library, or nothing if it does not tell: musl does not."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):
        return ""


def find_way_out(fault: str, *, default: str = OTHER_WAY) -> str:
    """Say what can be done about a fault that the system or Triton has words for."""
    return next((way for words, way in _WAYS_OUT if words in fault), default)


def check_shared_memory(models: dict[str, Path]) -> None:
    """Make sure that /dev/shm holds a full batch for every instance of the models.

    Raises:
        ServerStartError: it does not.
    """
    need_by_model = {
        name: _estimate_shared_memory((folder / "config.pbtxt").read_text("utf-8", "replace"))
        for name, folder in models.items()
    }
    need_bytes = sum(need_by_model.values())
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        raise ServerStartError(
            f"the embedded server needs {SHARED_MEMORY}: {error.strerror}. Mount a tmpfs there. "
            f"{OTHER_WAY}"
        ) from error
    free_bytes = found.f_bavail * found.f_frsize
    if free_bytes < need_bytes:
        largest = max(need_by_model, key=lambda name: need_by_model[name])
        raise ServerStartError(
            f"{SHARED_MEMORY} has {free_bytes / _MIB:.1f} MiB left, and full batches of "
            f"{len(models)} models need {need_bytes / _MIB:.1f} MiB of shared memory, "
            f"{need_by_model[largest] / _MIB:.1f} MiB of it {largest!r}. {_MORE_SHARED_MEMORY} "
            f"Or export with smaller batches. {OTHER_WAY}"
        )


def _estimate_shared_memory(config: str) -> int:
    """Return how many bytes a model's instances need: each its region, or one batch in and out."""
    if _find_strings("backend", config) != ["python"]:
        return 0
    num_rows = max(1, *map(int, re.findall(r"^\s*max_batch_size\s*:\s*(\d+)", config, re.M)), 1)
    row_bytes = 0
    for block in _find_blocks("(?:input|output)", config):
        (dtype,) = re.findall(r"data_type\s*:\s*TYPE_(\w+)", block)[:1] or ["FP32"]
        sizes = re.findall(r"dims\s*:\s*\[?([-\d,\s]+)", block)
        lengths = [max(1, int(size)) for size in re.findall(r"-?\d+", ",".join(sizes))]
        row_bytes += math.prod(lengths) * _DTYPE_BYTES.get(dtype, 4)
    counts = [
        int(count)
        for block in _find_blocks("instance_group", config)
        for count in re.findall(r"\bcount\s*:\s*(\d+)", block)
    ]
    return max(1, sum(counts)) * max(REGION_BYTES, num_rows * row_bytes)


def _find_blocks(name: str, config: str) -> list[str]:
    """Return the bodies of a message's fields in protobuf's text format, lists unfolded."""
    bodies = []
    for match in re.finditer(rf"^\s*{name}\s*:?\s*(?=[\[{{])", config, re.MULTILINE):
        depth = 0
        for end in range(match.end(), len(config)):
            depth += (config[end] in "[{") - (config[end] in "]}")
            if depth == 0:
                break
        whole = config[match.end() : end + 1]
        bodies += re.findall(r"\{[^{}]*\}", whole)
    return bodies


def _find_packages(name: str) -> Path:
    parent = _find_package(name)
    if parent is None:
        raise ServerStartError(f"the embedded server needs {name}. {_INSTALL}")
    return parent


def _find_package(name: str) -> Path | None:
    """Find the folder that a package lies in.

    Not one that only has the same name, as a file of a user's project may: nothing of these is
    imported here, where that would show.
    """
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    others = (importlib.machinery.PathFinder.find_spec(name, [entry]) for entry in sys.path)
    for each in (spec, *others):
        if each is None or each.origin is None or not each.submodule_search_locations:
            continue
        package = Path(os.path.abspath(each.origin)).parent
        if (package / _PARTS[name]).is_dir():
            return package.parent
    return None


def _find_python() -> Path:
    """Find the base interpreter, also in an application that embeds Python."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
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
    """List the models of a repository that the embedded server can run, by name."""
    place = find_repository(repository)
    models, others = {}, []
    steps: dict[str, list[str]] = {}
    for config in sorted(place.glob("*/config.pbtxt")):
        folder = config.parent
        try:
            text = config.read_text("utf-8", "replace")
        except OSError as error:
            raise ServerStartError(
                f"{config} of the model repository cannot be read: {error.strerror}. {OTHER_WAY}"
            ) from error
        if _find_strings("backend", text) == ["python"]:
            if not _SAFE_NAME.fullmatch(folder.name):
                raise ServerStartError(
                    f"the model {folder.name[:100]!r} of the model repository cannot be served: "
                    "Triton 2.51 would give its name to a shell. Rename its folder, to letters, "
                    f"digits, _ . and -. {OTHER_WAY}"
                )
            models[folder.name] = folder
        elif _find_strings("platform", text) == ["ensemble"]:
            steps[folder.name] = _find_strings("model_name", text)
        else:
            others.append(folder.name)
    for name, needed in steps.items():
        if models.keys() >= set(needed):
            models[name] = place / name
        else:
            others.append(name)
    if others:
        _log.info("the embedded server leaves out %s: not for its backend", ", ".join(others))
    if not models:
        found = f" It holds {', '.join(others)}, for other backends." if others else ""
        raise ServerStartError(
            f"the model repository {str(repository)!r} holds no model that the embedded server can "
            f"run.{found} Export one with python -m export.onnx. {OTHER_WAY}"
        )
    return models


def _find_strings(field: str, config: str) -> list[str]:
    return re.findall(rf'^\s*{field}\s*:\s*"([^"]*)"', config, re.MULTILINE)
