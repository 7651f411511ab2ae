"""Programs of Debian's packages, for tests: unpacked into a folder, without being root.

A machine that has a program is taken at its word. Elsewhere apt fetches the package, verified as it
always is, with lists of its own, so that nothing of the system changes; it is not installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

UPDATE_TIMEOUT_S, DOWNLOAD_TIMEOUT_S = 120.0, 120.0


def find_program(name: str, package: str, folder: Path) -> tuple[Path | None, str]:
    """Return a program, and why there is none.

    Args:
        name: Of the program.
        package: Of Debian, that has it.
        folder: Where it is unpacked, and found the next time.
    """
    if found := shutil.which(name):
        return Path(found), ""
    unpacked = folder / package / "usr/bin" / name
    if unpacked.is_file():
        return unpacked, ""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None, f"{name} is not installed, and there is no apt-get to fetch it"
    work = folder / f"{package}.{os.getpid()}"
    try:
        _fetch(package, work)
        os.replace(work / "unpacked", folder / package)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", b"") or b""
        return None, f"{package} cannot be fetched: {error} {said.decode(errors='replace')[-300:]}"
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return (unpacked, "") if unpacked.is_file() else (None, f"{package} has no {name}")


def _fetch(package: str, work: Path) -> None:
    for each in ("lists/partial", "archives/partial", "unpacked"):
        (work / each).mkdir(parents=True)
    options = {
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work,
        "Dir::Cache::archives": work / "archives",
        "Debug::NoLocking": "true",
        # It would not be let into a folder of this user's.
        "APT::Sandbox::User": "",
    }
    apt = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in options.items())]
    _run([*apt, "update"], work, UPDATE_TIMEOUT_S)
    _run([*apt, "download", package], work, DOWNLOAD_TIMEOUT_S)
    (archive,) = work.glob("*.deb")
    _run(["dpkg-deb", "-x", str(archive), str(work / "unpacked")], work, DOWNLOAD_TIMEOUT_S)


def _run(command: list[str], folder: Path, timeout_s: float) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=timeout_s)
