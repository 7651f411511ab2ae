"""What the embedded server is put together from, or what is missing and how to get it.

The wheel `nvidia-pytriton` brings tritonserver and its python backend; this Python brings its
library, NumPy and ONNX Runtime; the repository brings the models. Nothing is imported or started.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from clip_rt.errors import ServerStartError

OTHER_WAY = "Or name a running server with url=."
_INSTALL = f"Install it with pip install 'clip-rt[server]'. {OTHER_WAY}"

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

    def files(self) -> dict[str, str]:
        """Return the content of small files, by their path in the server's folder."""
        # The stub embeds Python and heeds none of its environment variables, but it looks for
        # `python3` in PATH, and a pyvenv.cfg beside that tells it where everything is.
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return {
            "python/pyvenv.cfg": f"home = {self.python.parent}\n",
            f"python/lib/{version}/site-packages/clip_rt.pth": "\n".join(map(str, self.packages)),
        }

    def links(self) -> dict[str, str]:
        """Return the targets of symbolic links, by their path in the server's folder."""
        links = {
            f"backends/python/{path.name}": str(path)
            for path in self.backend.iterdir()
            if path.is_file()
        }
        links[f"backends/python/{self.stub.name}"] = str(self.stub)
        links["python/bin/python3"] = str(self.python)
        if self.libpython is not None:
            links[f"lib/{self.libpython.name}"] = str(self.libpython)
        return links


def find_home() -> Home:
    """Find the parts, or say which is missing and how to get it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ServerStartError(
            f"the embedded server runs on Linux x86-64 only; this is {sys.platform} "
            f"{platform.machine()}. {OTHER_WAY}"
        )
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerStartError(f"the embedded server is not installed. {_INSTALL}")
    package = Path(spec.origin).parent
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
        if not os.access(part, os.X_OK):
            raise ServerStartError(
                f"{part.name} of nvidia-pytriton is missing or cannot be executed. {_INSTALL}"
            )
    return home


def _find_packages(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ServerStartError(f"the embedded server needs {name}. {_INSTALL}")
    return Path(spec.origin).parents[1]


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


def find_models(repository: Path) -> dict[str, Path]:
    """List the models of a repository that the embedded server can run, by name."""
    if not repository.is_dir():
        raise ServerStartError(
            f"the model repository {str(repository)!r} does not exist. Export a model with "
            f"python -m export.onnx, or name another folder with repository=. {OTHER_WAY}"
        )
    models, others = {}, []
    steps: dict[str, list[str]] = {}
    for config in sorted(repository.resolve().glob("*/config.pbtxt")):
        text, folder = config.read_text("utf-8", "replace"), config.parent
        if _find_strings("backend", text) == ["python"]:
            models[folder.name] = folder
        elif _find_strings("platform", text) == ["ensemble"]:
            steps[folder.name] = _find_strings("model_name", text)
        else:
            others.append(folder.name)
    for name, needed in steps.items():
        if models.keys() >= set(needed):
            models[name] = repository.resolve() / name
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
