"""What every command does about errors: one line on stderr, and the exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from clip_rt.errors import ClipRTError, InputError

BROKEN_PIPE = 141
"""Of a program that SIGPIPE ended: 128 and the number of the signal."""


@contextmanager
def command(*, input_error_status: int = 1) -> Iterator[None]:
    """Run a command: errors of ours, and files that cannot be read, end it without a traceback.

    Args:
        input_error_status: Exit status where the caller's input is at fault; of other errors it is
            1.
    """
    try:
        yield
        # What was not written so far is an error of the command, too.
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has enough, as `head` has. Python would flush it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(BROKEN_PIPE) from None
    except InputError as error:
        print_error(error)
        raise SystemExit(input_error_status) from None
    except (ClipRTError, OSError) as error:
        print_error(error)
        raise SystemExit(1) from None


def print_error(error: object) -> None:
    """Print what went wrong, as all commands do."""
    sys.stderr.write(f"error: {error}\n")
