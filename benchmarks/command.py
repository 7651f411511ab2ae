"""How every command here ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from clip_rt.errors import ClipRTError


@contextmanager
def command(exit_code: int = 1) -> Iterator[None]:
    """Run a command: errors of ours end it with one sentence on stderr and no traceback."""
    try:
        yield
    except ClipRTError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
        raise SystemExit(exit_code) from None
