"""What was made before, found again by its content: a key of everything it depends on.

An export makes large files slowly. Each is kept in a folder named by the hash of its key, together
with the key and a checksum of every file, so that a second run reuses what nothing has changed, and
never what is damaged. It only saves time: where nothing can be kept, files are made without.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from clip_rt.embedded.runtime_choice import default_folder
from export.console import console

RECORD = "made.json"
"""Key and checksums; written last."""
MAKING = ".making-"
_DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO))
"""What ends a file half-way that can be written elsewhere."""
MAX_MAKING_S = 24 * 3600.0
"""Nothing takes longer to make; what is older was left by an export that was killed."""


@dataclass(frozen=True)
class Artefact:
    """A file in the store; what belongs to it lies beside it."""

    path: Path
    reused: bool


class Store:
    """A folder of artefacts, shared by any number of exports at once.

    Where it cannot be made or written, a temporary one of this object's takes its place, and a line
    on the console says so.

    Args:
        folder: Made when the first artefact is; without it, that of the user.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder("export")
        self._temporary: Path | None = None

    def make(
        self, name: str, key: Mapping[str, object], write: Callable[[Path], object]
    ) -> Artefact:
        """Return the artefact of a key, made now if it is not there whole.

        Args:
            name: Of the file.
            key: JSON values; everything the bytes depend on.
            write: Makes the file at the path it is given, in an empty folder; may put others
                beside it. What it raises is raised, and nothing is kept; where the disk of the
                folder is full, it is called again for a path in another.

        Raises:
            OSError: there is no temporary folder to write to either.
        """
        text = json.dumps(key, sort_keys=True)
        hashed = hashlib.sha256(f"{name}\0{text}".encode()).hexdigest()[:24]
        if self.folder is not None and _is_whole(self.folder / hashed):
            return Artefact(self.folder / hashed / name, reused=True)
        folder = self._writable_folder()
        try:
            return _make(folder, hashed, name, text, write)
        except OSError as error:
            if self._temporary is not None or error.errno not in _DISK_ERRORS:
                raise
            self._give_up(str(error))
        return _make(self._writable_folder(), hashed, name, text, write)

    def keep(self, name: str, text: str) -> Path | None:
        """Write a small file beside the artefacts, over the one of that name.

        Returns:
            Its path; None where nothing is kept.
        """
        if self._temporary is not None or self.folder is None:
            return None
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        except OSError:
            return None
        return path

    def _writable_folder(self) -> Path:
        if self._temporary is None:
            if self.folder is None:
                self._give_up("there is no home folder")
            else:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    with tempfile.TemporaryDirectory(prefix=MAKING, dir=self.folder):
                        return self.folder
                except OSError as error:
                    self._give_up(str(error))
        assert self._temporary is not None
        return self._temporary

    def _give_up(self, why: str) -> None:
        self._temporary = Path(tempfile.mkdtemp(prefix="clip_rt-export-"))
        weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        console.print(
            f"nothing is kept for the next export ({why}); --cache names another folder",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def _make(
    parent: Path, hashed: str, name: str, key: str, write: Callable[[Path], object]
) -> Artefact:
    """Make an artefact in a folder that can be written to."""
    folder = parent / hashed
    if _is_whole(folder):
        return Artefact(folder / name, reused=True)
    _remove_leftovers(parent)
    with tempfile.TemporaryDirectory(prefix=MAKING, dir=parent) as staging:
        made = Path(staging) / "made"
        made.mkdir()
        write(made / name)
        sums = {path.name: sha256_of(path) for path in sorted(made.iterdir())}
        record = {"key": json.loads(key), "sha256": sums}
        (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        _replace(made, folder, aside=Path(staging) / "damaged")
    return Artefact(folder / name, reused=False)


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
        with suppress(OSError):
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
