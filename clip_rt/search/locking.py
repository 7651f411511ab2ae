"""One writer at a time: a lock that the system takes back however its process ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

from clip_rt.errors import SearchIndexLockedError

if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class WriterLock:
    """Held from construction to `close`.

    Args:
        path: File to lock; made where it is missing, and left behind.

    Raises:
        SearchIndexLockedError: another process, or another object of this one, holds it.
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        try:
            _lock(self._file)
        except OSError as error:
            self._file.close()
            raise SearchIndexLockedError(
                f"the index {path.parent} is being written by another process. Searching goes on "
                "meanwhile; to write, wait for that one or end it."
            ) from error

    def close(self) -> None:
        """Let others write."""
        self._file.close()
