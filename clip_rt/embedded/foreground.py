"""A Triton over a repository in the foreground, at a port one names, until it is told to end.

For development, and for showing on one machine what a rolling restart does: it listens on loopback
only, as the embedded server does and for the same reason. Production runs NVIDIA's container over
the same repository.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from clip_rt.deadline import START_TIMEOUT_S
from clip_rt.embedded.installation import find_home, find_models
from clip_rt.embedded.reload import Reloader, take_port
from clip_rt.embedded.server import EmbeddedServer
from clip_rt.errors import InputError, ServerStartError

URL = "127.0.0.1:8001"

_log = logging.getLogger(__name__)


def serve(
    repository: str | os.PathLike[str],
    *,
    url: str = URL,
    start_timeout_s: float = START_TIMEOUT_S,
    metrics_port: int | None = None,
    trace_url: str | None = None,
) -> None:
    """Serve a repository in the foreground until SIGTERM or SIGINT, then drain.

    One line on standard output says when it is ready; Triton's log goes to standard error. Asked to
    end, it accepts no more requests, answers those under way, and returns; the second time it
    ends at once. A server that dies is started again, and given up when it dies again and again.
    After `python -m clip_rt reload` another one takes its place; see `clip_rt.embedded.reload`.
    Outside the main thread, which alone hears signals, it serves as long as the process lives.

    Args:
        repository: Folder of models; those for Triton's python backend are served.
        url: Address of Triton's gRPC endpoint, host:port, on the loopback interface.
        start_timeout_s: Longest wait for the models to be loaded.
        metrics_port: Of Triton's metrics for Prometheus, on the loopback interface; None is none. A
            server with one takes no reload: two cannot share that port.
        trace_url: Where spans of requests that carry a trace go, by OTLP over HTTP.

    Raises:
        InputError: the address is not 127.0.0.1 or localhost with a port.
        ServerStartError: it cannot run here, the port is taken, or it dies again and again.
    """
    find_home()
    names = ", ".join(sorted(find_models(Path(repository))))
    port, listener = take_port(_find_port(url))

    make_server = functools.partial(
        EmbeddedServer,
        repository,
        start_timeout_s=start_timeout_s,
        port=port,
        shows_log=True,
        metrics_port=metrics_port,
        trace_url=trace_url,
    )
    with contextlib.closing(listener):
        reloader = Reloader(
            listener, Path(repository), make_server, may_overlap=metrics_port is None
        )
        try:
            with _raising_on_signals():
                while True:
                    server = reloader.server
                    try:
                        found = server.start()
                        if server is not reloader.server:  # It was replaced meanwhile.
                            server.stop()
                            continue
                        _print(
                            f"serving {names} from {repository} on {found}, for this machine only; "
                            "production runs NVIDIA's container"
                        )
                        reloader.open()
                        server.wait()
                    except ServerStartError:
                        if server is reloader.server:
                            raise
        except _TerminatedError as signalled:
            _log.info("told to end by %s: requests under way are answered first", signalled)
            reloader.close().drain()
        finally:
            reloader.close().stop()


def _print(line: str) -> None:
    # Standard output may have been closed when this process began, or nobody reads it.
    with contextlib.suppress(OSError, AttributeError):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


class _TerminatedError(BaseException):
    """A signal asks us to end; no Exception, so that nothing on its way takes it for a fault."""


@contextlib.contextmanager
def _raising_on_signals() -> Iterator[None]:
    """Raise in this thread on SIGTERM and SIGINT; afterwards signals do what they did."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: object) -> None:
        raise _TerminatedError(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _find_port(url: str) -> int:
    host, _, port = url.rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        raise InputError(
            f"url {url[:80]!r} is not 127.0.0.1:PORT, on the loopback interface. This Triton 2.51 "
            "has known vulnerabilities and is for this machine only; for others run NVIDIA's "
            "container, nvcr.io/nvidia/tritonserver, over the same repository."
        )
    if not (port.isdecimal() and int(port) < 65536):
        raise InputError(f"port {port[:40]!r} of url {url[:80]!r} is not within 0 and 65535.")
    return int(port)
