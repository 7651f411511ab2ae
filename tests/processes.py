"""Processes that tests start: they begin with the system's signals, and end with the test."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

END_LIMIT_S = 60.0


def make_signals_deliverable() -> None:
    """Let what this process starts hear SIGINT, SIGQUIT and SIGTERM, whoever started this one.

    A shell starts a job in the background with SIGINT and SIGQUIT ignored, some runners of
    continuous integration SIGTERM too, and a signal that is ignored stays so in every child. One
    that has a handler is set back to the system's default when a child begins. SIGHUP stays as it
    is: with `nohup` the tests and their processes are meant to outlive the terminal. SIGPIPE is
    for Python: it ignores it, and `subprocess` sets it back.
    """
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGQUIT: signal.SIG_DFL,
        signal.SIGTERM: signal.SIG_DFL,
    }
    for number, handler in handlers.items():
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)


@contextmanager
def running(command: Sequence[Any], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process for a `with` block, which ends it however it is left.

    Unlike `with Popen`, which waits without a limit for a process that may never end.
    """
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.kill()
        # Reads what is left of its output, too. A child of its own may keep that open.
        process.communicate(timeout=END_LIMIT_S)
