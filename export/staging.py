"""Changing a repository alone, and preparing a change where no server sees it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(repository: Path) -> Iterator[None]:
    """Wait until no other export changes the repository, and keep others out."""
    descriptor = os.open(repository, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staging_folder(repository: Path) -> Iterator[Path]:
    """Make a folder on the file system of the repository, and outside it where possible.

    A server that starts while a staging folder is in its repository fails to load it as a model.
    What an export that was killed has left is removed; the caller is alone with the repository.
    """
    parent = repository.resolve().parent
    same = parent.stat().st_dev == repository.stat().st_dev and os.access(parent, os.W_OK)
    # Its own, whatever repositories lie beside it.
    prefix = f".clip_rt-{hashlib.sha256(os.fsencode(repository.resolve())).hexdigest()[:16]}-"
    folder = parent if same else repository
    for left in folder.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as staging:
        yield Path(staging)
