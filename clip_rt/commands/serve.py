"""`clip-rt serve` and `clip-rt reload`: a server in the foreground, and what it serves anew."""

from __future__ import annotations

import logging
import math
import sys

from clip_rt.deadline import START_TIMEOUT_S
from clip_rt.errors import InputError


def serve(
    *,
    repository: str,
    port: int = 8001,
    start_timeout_s: float = START_TIMEOUT_S,
    idle_unload_s: float = math.inf,
    metrics_port: int | None = None,
    trace_url: str | None = None,
) -> int:
    """Run a Triton over a repository in the foreground.

    Args:
        repository: Folder of models.
        port: Of 127.0.0.1; 0 is any free one.
        start_timeout_s: To load the models in.
        idle_unload_s: A tower that was not asked for so long gives its memory back, and is loaded
            again when it is asked.
        metrics_port: Of 127.0.0.1, where Prometheus finds Triton's metrics; none without it.
        trace_url: Where spans of requests that carry a trace go, by OTLP over HTTP, such as
            http://127.0.0.1:4318/v1/traces.
    """
    from clip_rt.embedded import runtimes
    from clip_rt.embedded.foreground import serve

    if not idle_unload_s > 0:
        raise InputError(f"--idle-unload-s is {idle_unload_s}; it must be above 0.")
    runtimes.set_idle_unload_s(idle_unload_s)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        serve(
            repository,
            url=f"127.0.0.1:{port}",
            start_timeout_s=start_timeout_s,
            metrics_port=metrics_port,
            trace_url=trace_url,
        )
    except KeyboardInterrupt:
        return 130  # Asked twice, so it did not wait for the requests under way.
    return 0


def reload(*, port: int = 8001, timeout_s: float = 90.0) -> int:
    """Have `serve` take what its repository holds now.

    Args:
        port: Of `serve`.
        timeout_s: Longest wait for the outcome.
    """
    from clip_rt.embedded.reload import reload

    is_new = reload(port, timeout_s=timeout_s)
    what = "what its repository holds now" if is_new else "what it did: nothing new is there"
    sys.stdout.write(f"the server on port {port} serves {what}\n")
    return 0
