"""A model repository in, a real Triton on loopback out, gone when its last owner is.

The server is NVIDIA's own tritonserver 2.51 from the wheel `nvidia-pytriton`, run by
`supervisor.py`; the wheel's Python code is never imported. For development, tests and a single
user: the version has known vulnerabilities, so it never listens on anything but 127.0.0.1, and
production runs NVIDIA's container.

Source: triton-inference-server/server r24.10 `src/command_line_parser.cc`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from clip_rt import fork
from clip_rt.deadline import START_TIMEOUT_S
from clip_rt.embedded import sharing, supervisor
from clip_rt.embedded.installation import (
    OTHER_WAY,
    Home,
    check_shared_memory,
    find_home,
    find_models,
    find_repository,
)
from clip_rt.embedded.ownership import Facts, Run, find_cause, launch, make_start_error
from clip_rt.errors import ServerStartError

MAX_TRIES = 5
"""When others take the port first, or one that others started dies before we have joined it."""
MAX_CRASHES = 3
"""Crashes in a row, each within `STABLE_AFTER_S`, that make a crash loop."""
STABLE_AFTER_S = 10.0
COOL_DOWN_S = 10.0
"""How long a server in a crash loop is not started again."""
TOKEN_KEY = "clip-rt-token"
RESTRICTED = "shared-memory,trace,logging"
"""Protocols of Triton that answer only to who has the token; other users of this machine can read
it in the list of processes. Loading and unloading models is off."""
RESTRICTED_IF_OWN = f"{RESTRICTED},model-repository,statistics"
"""The same of a server for its owners, all of whom have it. Clients of one at a port of its own
know none, and may list its models and read its statistics."""

_FIRST_BACKOFF_S = 0.25

_log = logging.getLogger(__name__)


class EmbeddedServer:
    """One tritonserver over one repository, owned by this process, alone or with others.

    It ends with `stop` of its last owner, when the object is garbage collected, and within 5 s of
    the end of the last process that owns it, however that ends. A forked child owns it as well
    from its first use there, and may outlive its parent. One that dies is started again by the
    next `start`: after a pause, and not at once when that happens again and again. Thread-safe.

    Args:
        repository: Folder of models; those for Triton's python backend are served.
        start_timeout_s: Longest wait for the models to be loaded.
        is_shared: Join the server that another process of this user shares over the same
            repository, if there is one, and let others join this one.
        port: Serve all clients of this machine on this one, beside another server of this user
            that does too; 0 is any that is free, for owners only.
        shows_log: Pass the server's log on to standard error.
        metrics_port: Serve Triton's metrics for Prometheus by HTTP, `/metrics`, on this port of
            127.0.0.1, to whoever asks; None is not at all.
        trace_url: Send spans of requests that carry a trace there, by OTLP over HTTP, such as
            http://127.0.0.1:4318/v1/traces; None is nowhere.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str],
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        is_shared: bool = False,
        port: int = 0,
        shows_log: bool = False,
        metrics_port: int | None = None,
        trace_url: str | None = None,
    ) -> None:
        self.repository = Path(repository)
        self.start_timeout_s = start_timeout_s
        self._is_shared = is_shared
        self._fixed_port = port
        self._shows_log = shows_log
        self._metrics_port = metrics_port
        self._trace_url = trace_url
        self._lock = threading.RLock()
        self._run: Run | None = None
        self._crashes = _Crashes()
        self.content_key = ""
        """Of one that is shared: what it was made of, see `sharing.make_key`."""
        self._token = secrets.token_urlsafe(32)
        self._port = port
        fork.restart_in_child(self, EmbeddedServer._renew_lock)

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = self._run.facts.url if self.is_running and self._run else "stopped"
        return f"EmbeddedServer({str(self.repository)!r}, {state})"

    @property
    def url(self) -> str:
        """Address of the running server, host:port.

        Raises:
            ServerStartError: it does not run.
        """
        return self._running().facts.url

    @property
    def headers(self) -> dict[str, str]:
        """What a request must carry to be an owner's."""
        return {f"triton-grpc-protocol-{TOKEN_KEY}": self._token}

    @property
    def server_id(self) -> str:
        """Name the server answers to; nobody else on its port can know it."""
        return self._running().facts.server_id

    @property
    def is_running(self) -> bool:
        """Whether the server is up, as far as its supervisor knows."""
        run = self._run
        return run is not None and run.is_alive()

    def start(self, *, timeout_s: float | None = None) -> str:
        """Start the server unless it runs, and wait until its models are ready.

        One that died comes back at the same address and with the same headers, unless somebody
        took its port meanwhile, or another process that shares it was first to start it.

        Args:
            timeout_s: Instead of `start_timeout_s`.

        Returns:
            Its url, host:port.

        Raises:
            ServerStartError: it cannot run here, or dies again and again; the message begins with
                the cause and ends with the way out.
        """
        timeout_s = self.start_timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=min(max(timeout_s, 0.0), threading.TIMEOUT_MAX)):
            raise ServerStartError(
                f"the embedded server was not ready after {timeout_s:g} s, in which another thread "
                "was starting it. Allow more time with start_timeout_s=."
            )
        try:
            return self._start(deadline_s, timeout_s)
        finally:
            self._lock.release()

    def _start(self, deadline_s: float, timeout_s: float) -> str:
        if self._run is not None:
            if self._run.is_alive():
                return self._run.facts.url
            self._record_crash(self._run)
        if self._metrics_port:
            _check_free(self._metrics_port)
        home = find_home()
        models = find_models(self.repository)
        if self._is_shared:
            self.content_key = sharing.make_key(home, models)
            self._crashes = _crashes_by_key.setdefault(self.content_key, _Crashes())
        for _ in range(MAX_TRIES):
            self._crashes.back_off(deadline_s)
            run = self._join_or_launch(home, models, deadline_s, timeout_s)
            try:
                is_ready = run.wait_until_ready(deadline_s, timeout_s, sorted(models))
            except BaseException:
                run.end()
                raise
            if is_ready:
                self._run, self._port, self._token = run, run.facts.port, run.facts.token
                _log.info(
                    "embedded Triton over %s listens on %s; it is for development and a single "
                    "user on loopback, production runs NVIDIA's container",
                    *(self.repository, run.facts.url),
                )
                return run.facts.url
            self._raise_unless_another_try_helps(run)
        raise ServerStartError(
            f"the embedded server did not start in {MAX_TRIES} tries: its port was taken by "
            f"others, or it was killed, each time. Try again. {OTHER_WAY}"
        )

    def wait(self) -> None:
        """Return when the server has ended.

        Raises:
            ServerStartError: it was not running.
        """
        self._running().wait()

    def drain(self) -> None:
        """End the server once its requests under way have; it accepts no others meanwhile.

        Those that take longer than 30 s are cut off. Other owners lose it, too.
        """
        with self._lock:
            run = self._run
        if run is not None:
            run.drain()
        self.stop()

    def stop(self) -> None:
        """Release the server; its last owner ends it and removes all it used.

        Harmless when it does not run.
        """
        with self._lock:
            run, self._run = self._run, None
            if run is not None:
                run.end()

    def _record_crash(self, run: Run) -> None:
        self._run = None
        report = run.end()
        self._crashes.add(run.facts.server_id, report, lived_s=run.lived_s())
        _log.warning(
            "the embedded Triton over %s ended by itself: %s",
            *(self.repository, find_cause(report)),
        )

    def _raise_unless_another_try_helps(self, run: Run) -> None:
        """Deal with a server that died before it was ready."""
        report = run.end()
        if "already in use" in report["log_tail"]:
            if self._fixed_port:
                raise make_port_error(self._fixed_port)
            self._port = 0
            return
        self._crashes.add(run.facts.server_id, report, lived_s=0.0)
        # One that others have may have been in use, and killed for reasons of its own.
        was_killed = report["exit_code"] is None or report["exit_code"] < 0
        if not (run.is_joined and was_killed):
            raise make_start_error(report, run.facts.url)

    def _join_or_launch(
        self, home: Home, models: dict[str, Path], deadline_s: float, timeout_s: float
    ) -> Run:
        key = self.content_key
        with sharing.open_folder(deadline_s) as parent:
            for folder in sorted(parent.glob(f"clip_rt-*-{key}")) if key else ():
                with contextlib.suppress(OSError, ServerStartError):
                    return Run(sharing.connect(folder), folder, deadline_s=deadline_s)
            check_shared_memory(models)
            for folder in parent.glob("clip_rt-*-*"):
                sharing.remove_dead_server(folder, timeout_s=0.0)
            nonce = secrets.token_hex(8)
            folder = parent / sharing.name_folder(key, nonce)
            facts = Facts(f"clip_rt-{nonce}", self._port or _find_free_port(), self._token)
            job = self._job(home, models, folder, facts)
            return launch(home, job, deadline_s, timeout_s)

    def _job(
        self, home: Home, models: dict[str, Path], folder: Path, facts: Facts
    ) -> supervisor.Job:
        links = {
            f"models/{name}/{path.relative_to(model)}": path
            for name, model in models.items()
            for path in sorted(model.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }
        # Triton starts the stub by way of a shell.
        path = (f"{folder}/python/bin", os.environ.get("PATH"), os.defpath)
        libraries = (f"{folder}/lib/nvidia", f"{folder}/lib", os.environ.get("LD_LIBRARY_PATH"))
        shared_memory_prefix = sharing.name_shared_memory(folder)
        restricted = RESTRICTED if self._fixed_port else RESTRICTED_IF_OWN
        return {
            "command": [
                str(home.binary),
                f"--id={facts.server_id}",
                f"--model-repository={folder}/models",
                f"--backend-directory={folder}/backends",
                "--allow-grpc=true",
                "--grpc-address=127.0.0.1",
                f"--grpc-port={facts.port}",
                f"--reuse-grpc-port={'true' if self._fixed_port else 'false'}",
                f"--grpc-restricted-protocol={restricted}:{TOKEN_KEY}={facts.token}",
                "--allow-http=false",
                *self._metrics_options(),
                *_trace_options(self._trace_url),
                "--allow-sagemaker=false",
                "--allow-vertex-ai=false",
                "--model-control-mode=none",
                "--disable-auto-complete-config",
                "--strict-readiness=true",
                "--exit-on-error=true",
                f"--exit-timeout-secs={supervisor.DRAIN_TIMEOUT_S:.0f}",
                "--pinned-memory-pool-byte-size=0",
                f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix}",
                "--backend-config=python,stub-timeout-seconds=30",
            ],
            "environment": {
                **{key: value for key, value in os.environ.items() if key != "BASH_ENV"},
                "PATH": os.pathsep.join(filter(None, path)),
                "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            },
            "folder": str(folder),
            "files": home.files(folder),
            "links": {name: str(path) for name, path in (links | home.links()).items()},
            "copies": {name: str(path) for name, path in home.copies().items()},
            "shared_memory_prefix": shared_memory_prefix,
            "for_owners": asdict(facts),
            "shows_log": self._shows_log,
        }

    def _metrics_options(self) -> tuple[str, ...]:
        if self._metrics_port is None:
            return ("--allow-metrics=false",)
        return (
            "--allow-metrics=true",
            "--metrics-address=127.0.0.1",
            f"--metrics-port={self._metrics_port}",
        )

    def _renew_lock(self) -> None:
        """In a forked child: another thread of the parent may hold it."""
        self._lock = threading.RLock()

    def _running(self) -> Run:
        run = self._run
        if run is None:
            raise ServerStartError("the embedded server is not running. Call start().")
        return run


def acquire_server(
    repository: str | os.PathLike[str], *, start_timeout_s: float = START_TIMEOUT_S
) -> EmbeddedServer:
    """Return a reference to the server that this user's processes share over a repository.

    It is started, and ends with `stop` of the last reference. After the repository has changed, a
    new one is to a new server, and others keep theirs.

    Raises:
        ServerStartError: see `EmbeddedServer.start`.
    """
    place = find_repository(repository)
    server = EmbeddedServer(place, start_timeout_s=start_timeout_s, is_shared=True)
    server.start()
    return server


@dataclass
class _Crashes:
    """Restart with backoff: how often in a row a server ended by itself, and how the last time."""

    count: int = 0
    at_s: float = 0.0
    last: supervisor.Report | None = None
    last_id: str = ""

    def add(self, server_id: str, report: supervisor.Report, *, lived_s: float) -> None:
        """Count a crash, once however many in this process have seen it."""
        if server_id == self.last_id:
            return
        self.last_id = server_id
        self.count = 1 if lived_s >= STABLE_AFTER_S else self.count + 1
        self.at_s = time.monotonic()
        self.last = report

    def back_off(self, deadline_s: float) -> None:
        """Wait before a restart, longer after each crash; refuse one in a crash loop."""
        since_s = time.monotonic() - self.at_s
        if self.last is None or since_s > COOL_DOWN_S:
            return
        if self.count >= MAX_CRASHES:
            raise ServerStartError(
                f"the embedded server ended {self.count} times in a row, last of all so: "
                f"{find_cause(self.last)} It is not started again for "
                f"{COOL_DOWN_S - since_s:.0f} s; see .log_tail.",
                log_tail=self.last["log_tail"],
            )
        # Jittered, so that of several processes one starts it and the others find it there.
        backoff_s = _FIRST_BACKOFF_S * 2 ** (self.count - 1) * random.uniform(0.5, 1.0)
        time.sleep(max(0.0, min(backoff_s - since_s, deadline_s - time.monotonic())))


_crashes_by_key: dict[str, _Crashes] = {}
"""Of servers that are shared: whoever starts one anew remembers how often it failed."""


def make_port_error(port: int) -> ServerStartError:
    """Make the error that says that somebody else listens on a port."""
    return ServerStartError(
        f"port {port} of 127.0.0.1 is taken by another process. End that one, or name another "
        "port.",
        url=f"127.0.0.1:{port}",
    )


def _trace_options(url: str | None) -> tuple[str, ...]:
    """Have Triton go on with traces that requests carry, and begin none (a rate of 0)."""
    if url is None:
        return ()
    settings = ("mode=opentelemetry", "level=TIMESTAMPS", "rate=0", f"opentelemetry,url={url}")
    return tuple(f"--trace-config={each}" for each in settings)


def _check_free(port: int) -> None:
    """Refuse a port for metrics that somebody has: Triton 2.51 ends of that once it was ready.

    Raises:
        ServerStartError: it is taken.
    """
    with socket.socket() as probe:
        # As Triton does: a server that ended a moment ago is no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise make_port_error(port) from None
            raise ServerStartError(
                f"port {port} of 127.0.0.1 cannot be used: {error.strerror}. Name another port.",
                url=f"127.0.0.1:{port}",
            ) from error


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
