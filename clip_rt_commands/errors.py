"""What every command does about errors: one line on stderr, and the exit status 1."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from clip_rt.errors import ClipRTError


@contextmanager
def command() -> Iterator[None]:
    """Run a command: errors of ours, and files that cannot be read, end it without a traceback."""
    try:
        yield
    except (ClipRTError, OSError) as error:
        print_error(error)
        raise SystemExit(1) from None


def print_error(error: object) -> None:
    """Print what went wrong, as all commands do."""
    sys.stderr.write(f"error: {error}\n")
