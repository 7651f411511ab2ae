"""What was made before, found again by its content: a key of everything it depends on.

An export makes large files slowly. Each is kept in a folder named by the hash of its key, together
with the key and a checksum of every file, so that a second run reuses what nothing has changed, and
never what is damaged.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

RECORD = "made.json"
"""Key and checksums; written last."""
MAKING = ".making-"
MAX_MAKING_S = 24 * 3600.0
"""Nothing takes longer to make; what is older was left by an export that was killed."""


@dataclass(frozen=True)
class Artefact:
    """A file in the store; what belongs to it lies beside it."""

    path: Path
    reused: bool


class Store:
    """A folder of artefacts, shared by any number of exports at once.

    Args:
        folder: Made when the first artefact is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(
        self, name: str, key: Mapping[str, object], write: Callable[[Path], object]
    ) -> Artefact:
        """Return the artefact of a key, made now if it is not there whole.

        Args:
            name: Of the file.
            key: JSON values; everything the bytes depend on.
            write: Makes the file at the path it is given, in an empty folder; may put others
                beside it. What it raises is raised, and nothing is kept.
        """
        text = json.dumps(key, sort_keys=True)
        folder = self.folder / hashlib.sha256(f"{name}\0{text}".encode()).hexdigest()[:24]
        if _is_whole(folder):
            return Artefact(folder / name, reused=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.folder)
        with tempfile.TemporaryDirectory(prefix=MAKING, dir=self.folder) as staging:
            made = Path(staging) / "made"
            made.mkdir()
            write(made / name)
            sums = {path.name: sha256_of(path) for path in sorted(made.iterdir())}
            record = {"key": json.loads(text), "sha256": sums}
            (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
            _replace(made, folder, aside=Path(staging) / "damaged")
        return Artefact(folder / name, reused=False)


def default_folder() -> Path:
    """Return where artefacts are kept: `$XDG_CACHE_HOME/clip_rt/export`, or below ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "clip_rt" / "export"


def source_hash(*modules: ModuleType) -> str:
    """Return the hash of modules' source: what they wrote may differ when they do."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()[:16]


def _is_whole(folder: Path) -> bool:
    try:
        sums = json.loads((folder / RECORD).read_text("utf-8"))["sha256"]
        return bool(sums) and all(sha256_of(folder / name) == sums[name] for name in sums)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def sha256_of(path: Path) -> str:
    """Return the checksum of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _remove_leftovers(folder: Path) -> None:
    for left in folder.glob(f"{MAKING}*"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > MAX_MAKING_S:
                shutil.rmtree(left, ignore_errors=True)


def _replace(made: Path, folder: Path, *, aside: Path) -> None:
    """Move `made` into place, unless another process was faster."""
    if folder.exists() and not _is_whole(folder):
        shutil.move(folder, aside)
    try:
        os.rename(made, folder)
    except OSError:
        if not _is_whole(folder):
            raise
