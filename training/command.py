"""What every command of training does about errors: one line, and the exit status 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from clip_rt.errors import ClipRTError


@contextmanager
def command() -> Iterator[None]:
    """Run a command: errors of ours, and files that cannot be read, end it without a traceback."""
    try:
        yield
    except (ClipRTError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
