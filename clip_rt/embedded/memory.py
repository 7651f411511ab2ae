"""How much memory models hold, as Linux tells; elsewhere it is not known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

STUB = b"triton_python_backend_stub"
"""Name of the processes in which Triton's python backend runs models, one for each instance."""


def find_own_bytes() -> int:
    """Return the memory of this process; 0 if it is not known."""
    return _read_bytes(Path("/proc/self"))


def find_model_bytes(names: Iterable[str]) -> dict[str, int]:
    """Return the memory of the processes on this machine in which Triton runs models.

    What processes share is counted in parts. Models without a process that may be asked are left
    out.

    Args:
        names: Of Triton models.
    """
    found: dict[str, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It has ended, or is somebody else's.
            command, *arguments = (process / "cmdline").read_bytes().split(b"\0")
            if not command.endswith(STUB):
                continue
            for name in names:
                if any(f"/{name}/".encode() in each for each in arguments):
                    found[name] = found.get(name, 0) + _read_bytes(process)
    return {name: num_bytes for name, num_bytes in found.items() if num_bytes}


def _read_bytes(process: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in (process / "smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
