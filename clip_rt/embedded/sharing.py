"""Where embedded servers lie, and how the processes of a user find the one they can share.

All lie in one folder that only this user can enter, each in a folder of its own, which its
supervisor holds locked while it lives. Who looks for a server, or starts one, holds the lock of the
common folder: of two that start at once, the second finds the first one's server.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from clip_rt import fork
from clip_rt._version import __version__
from clip_rt.embedded import supervisor
from clip_rt.embedded.installation import OTHER_WAY, Home
from clip_rt.errors import ServerStartError
from clip_rt.wire.model_config import CONFIG

_CONNECT_TIMEOUT_S = 5.0
_SAFE_PATH = re.compile(r"/[\w./+,=@%-]{0,1000}", re.ASCII)
"""Triton 2.51 gives a path to a shell, and lists of paths are separated by colons."""
_ENVIRONMENT = (
    *("CUDA_", "DNNL_", "GOMP_", "KMP_", "LD_", "MKL_", "NVIDIA_", "OMP_", "ONEDNN_"),
    *("OPENBLAS_", "ORT_", "OV_", "CLIP_RT_IDLE_"),
)
"""Variables that begin so: devices, threads and libraries that a server computes with, and
when a model is unloaded."""

_descriptors: set[int] = set()
"""Open folders, perhaps locked; a forked child closes its copies."""


def make_key(home: Home, models: dict[str, Path]) -> str:
    """Name what a server is made of: processes with equal keys may share one.

    It covers the place and the content of the models, this package, the Python and its libraries,
    and what decides where and how fast it computes: environment, processors, namespaces. After an
    export the key is another one, so that new clients get a new server and others keep theirs.

    Returns:
        32 hexadecimal digits.
    """
    files = []
    for path in sorted(path for folder in models.values() for path in folder.rglob("*")):
        # One may go while we look, when somebody exports.
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            if "__pycache__" not in path.parts and stat.S_ISREG(found.st_mode):
                text = path.read_text("utf-8", "replace") if path.name == CONFIG else ""
                files.append((str(path), found.st_size, found.st_mtime_ns, text))
    # Of one version there may be two in a checkout, before and after a change of their protocol.
    supervisor = hashlib.sha256(Path(__file__).with_name("supervisor.py").read_bytes()).hexdigest()
    made_of = (
        *(__version__, supervisor, os.getuid(), sys.version, repr(home), files),
        sorted(item for item in os.environ.items() if item[0].startswith(_ENVIRONMENT)),
        sorted(os.sched_getaffinity(0)),
        # A container may share the folder with its host, but not the loopback interface.
        [os.readlink(f"/proc/self/ns/{name}") for name in ("net", "mnt")],
    )
    return hashlib.sha256(json.dumps(made_of).encode("utf-8", "replace")).hexdigest()[:32]


@contextlib.contextmanager
def open_folder(deadline_s: float) -> Iterator[Path]:
    """Lock and yield the folder in which the servers of this user lie.

    Raises:
        ServerStartError: no place is safe to use, or somebody holds the lock for too long.
    """
    faults = []
    for folder in _list_places():
        if not _SAFE_PATH.fullmatch(str(folder)):
            faults.append(f"{str(folder)[:100]!r}: Triton cannot work at every path")
            continue
        try:
            descriptor = _open_locked(folder, deadline_s)
        except OSError as error:
            faults.append(f"{folder}: {error.strerror or error}")
            continue
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # Unless there is a server in it.
            _close(descriptor)
        return
    raise ServerStartError(
        f"no folder can be used for the embedded server: {'; '.join(faults)}. Remove what is in "
        "the way, or name a writable folder of your own with TMPDIR, its path made of ASCII "
        f"letters, digits, _ . and -. {OTHER_WAY}"
    )


def name_folder(key: str, nonce: str) -> str:
    """Name the folder of a server that this process starts; no key for one that is not shared."""
    return f"clip_rt-{os.getpid()}-{nonce}" + (f"-{key}" if key else "")


def name_shared_memory(folder: Path) -> str:
    """Name what the entries in /dev/shm begin with that belong to the server in a folder."""
    _, pid, nonce = folder.name.split("-")[:3]
    return f"cliprt_{pid}_{nonce}_"


def connect(folder: Path) -> socket.socket:
    """Connect to the supervisor of the server in a folder.

    Raises:
        OSError: it has ended.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(_CONNECT_TIMEOUT_S)
    try:
        # The path itself may be longer than the address of a socket may be.
        link.connect(f"/proc/self/fd/{descriptor}/{supervisor.SOCKET}")
    except OSError:
        link.close()
        raise
    finally:
        os.close(descriptor)
    return link


def remove_dead_server(folder: Path, *, timeout_s: float = 1.0) -> None:
    """Remove what a server left behind whose supervisor was killed.

    Args:
        folder: The server's own.
        timeout_s: For the kernel, which may close a dead process's connections before it releases
            its lock.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if supervisor.lock(descriptor, timeout_s=timeout_s):  # Else it lives.
                supervisor.remove_leftovers(str(folder), name_shared_memory(folder))
        finally:
            os.close(descriptor)


def _list_places() -> list[Path]:
    """List where the folder may lie, best first; the last one is never on a network."""
    places = []
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        places.append(Path(runtime) / "clip_rt")
    name = f"clip_rt-{os.getuid()}"
    with contextlib.suppress(OSError):
        places.append(Path(tempfile.gettempdir()).resolve() / name)
        if not _SAFE_PATH.fullmatch(str(places[-1])):
            places.append(Path("/tmp").resolve() / name)
    return [*places, supervisor.SHARED_MEMORY / name]


def _open_locked(folder: Path, deadline_s: float) -> int:
    while True:
        _check_parent(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # The last server of all ended just now, and its folder with it.
        _descriptors.add(descriptor)
        try:
            _check_owner(descriptor)
            if not supervisor.lock(descriptor, timeout_s=deadline_s - time.monotonic()):
                raise ServerStartError(
                    f"another process holds {folder} for too long; it may be stopped. End it, "
                    f"or allow more time with start_timeout_s=. {OTHER_WAY}"
                )
            # Still this one, and not a new one in its place?
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(folder.lstat(), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)


def _check_parent(parent: Path) -> None:
    found = parent.stat()
    if found.st_uid not in (0, os.getuid()):
        raise PermissionError(f"{parent} belongs to the user with the id {found.st_uid}")
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise PermissionError(f"others may replace what is in {parent}")


def _check_owner(descriptor: int) -> None:
    found = os.fstat(descriptor)
    if found.st_uid != os.getuid():
        raise PermissionError(f"it belongs to the user with the id {found.st_uid}")
    if found.st_mode & 0o077:
        raise PermissionError(f"its mode {stat.S_IMODE(found.st_mode):o} lets others in")


def _close(descriptor: int) -> None:
    if descriptor in _descriptors:
        _descriptors.discard(descriptor)
        os.close(descriptor)


def _close_in_child() -> None:
    # A lock lives as long as any copy of its descriptor.
    while _descriptors:
        with contextlib.suppress(OSError):
            os.close(_descriptors.pop())


fork.in_child(_close_in_child)
