"""A model repository in, a real Triton on loopback out, gone when its owner is.

The server is NVIDIA's own tritonserver 2.51 from the wheel `nvidia-pytriton`, run by
`supervisor.py`; the wheel's Python code is never imported. For development, tests and a single
user: the version has known vulnerabilities, so it never listens on anything but 127.0.0.1, and
production runs NVIDIA's container.

Source: triton-inference-server/server r24.10 `src/command_line_parser.cc`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from pathlib import Path
from types import TracebackType

from clip_rt import supervisor
from clip_rt.errors import ServerError, ServerStartError
from clip_rt.installation import OTHER_WAY, Home, find_home, find_models
from clip_rt.transport import Transport

START_TIMEOUT_S = 60.0
MAX_PORTS = 5
"""Ports tried when others take them first."""
TOKEN_KEY = "clip-rt-token"
RESTRICTED = "shared-memory,model-repository,statistics,trace,logging"
"""Protocols of Triton that answer only to the owner."""

_POLL_S = 0.02
_ANSWER_TIMEOUT_S = 1.0
_PIPE_BYTES = 512 * 1024
_F_SETPIPE_SZ = 1031
"""Linux's own number; Python names it since 3.10, and not everywhere."""
_MESSAGE_CHARS = 600

_log = logging.getLogger(__name__)


class EmbeddedServer:
    """One tritonserver over one repository, owned by this process.

    It ends with `stop`, when the object is garbage collected, and within 5 s of the end of this
    process, however that ends. A forked child may use it but does not own it. Thread-safe.

    Args:
        repository: Folder of models; those for Triton's python backend are served.
        start_timeout_s: Longest wait for the models to be loaded.
    """

    def __init__(
        self, repository: str | os.PathLike[str], *, start_timeout_s: float = START_TIMEOUT_S
    ) -> None:
        self.repository = Path(repository)
        self.start_timeout_s = start_timeout_s
        self._lock = threading.RLock()
        self._run: _Run | None = None
        self._token = secrets.token_urlsafe(32)
        self._port = 0
        _servers.add(self)

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = self._run.url if self.is_running and self._run else "stopped"
        return f"EmbeddedServer({str(self.repository)!r}, {state})"

    @property
    def url(self) -> str:
        """Address of the running server, host:port.

        Raises:
            ServerStartError: it does not run.
        """
        return self._running().url

    @property
    def headers(self) -> dict[str, str]:
        """What a request must carry to be the owner's."""
        return {f"triton-grpc-protocol-{TOKEN_KEY}": self._token}

    @property
    def server_id(self) -> str:
        """Name the server answers to; nobody else on its port can know it."""
        return self._running().server_id

    @property
    def is_running(self) -> bool:
        """Whether the server is up, as far as its supervisor knows."""
        run = self._run
        return run is not None and run.is_alive()

    def start(self, *, timeout_s: float | None = None) -> str:
        """Start the server unless it runs, and wait until its models are ready.

        One that died comes back at the same address, unless somebody took its port meanwhile.

        Args:
            timeout_s: Instead of `start_timeout_s`.

        Returns:
            Its url, host:port.

        Raises:
            ServerStartError: it cannot run here; the message begins with the cause and ends with
                the way out.
        """
        with self._lock:
            if self._run is not None and self._run.is_alive():
                return self._run.url
            self._discard()
            timeout_s = self.start_timeout_s if timeout_s is None else timeout_s
            deadline = time.monotonic() + timeout_s
            home = find_home()
            models = find_models(self.repository)
            for _ in range(MAX_PORTS):
                run = _Run(home, models, self._port or _find_free_port(), self._token)
                try:
                    run.wait_until_ready(deadline, timeout_s)
                except _PortTakenError:
                    run.end()
                    self._port = 0
                    continue
                except BaseException:
                    run.end()
                    raise
                self._run, self._port = run, run.port
                _announce(self.repository, run.url)
                return run.url
        raise ServerStartError(f"{MAX_PORTS} free ports were all taken by others. Try again.")

    def stop(self) -> None:
        """End the server and remove all it used; harmless when it does not run."""
        with self._lock:
            self._discard()

    def _discard(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.end()

    def _running(self) -> _Run:
        if self._run is None:
            raise ServerStartError("the embedded server is not running. Call start().")
        return self._run


_shared: dict[Path, tuple[EmbeddedServer, int]] = {}
_shared_lock = threading.RLock()


def borrow(
    repository: str | os.PathLike[str], *, start_timeout_s: float = START_TIMEOUT_S
) -> EmbeddedServer:
    """Return this process's server over a repository, started; each borrower must `give_back` it.

    Raises:
        ServerStartError: see `EmbeddedServer.start`.
    """
    key = Path(os.path.realpath(repository))
    with _shared_lock:
        server, num_borrowers = _shared.get(key, (None, 0))
        if server is None:
            server = EmbeddedServer(key, start_timeout_s=start_timeout_s)
        server.start()
        _shared[key] = server, num_borrowers + 1
        return server


def give_back(server: EmbeddedServer) -> None:
    """End a borrowed server when this was its last borrower."""
    with _shared_lock:
        held, num_borrowers = _shared.get(server.repository, (None, 0))
        if held is not server:
            return
        if num_borrowers > 1:
            _shared[server.repository] = server, num_borrowers - 1
            return
        del _shared[server.repository]
        server.stop()


class _PortTakenError(Exception):
    """Somebody else listens on the port we chose."""


class _Run:
    """One life of a server: from its supervisor's start to its report."""

    def __init__(self, home: Home, models: dict[str, Path], port: int, token: str) -> None:
        nonce = secrets.token_hex(8)
        self.server_id = f"clip_rt-{nonce}"
        self.port = port
        self.url = f"127.0.0.1:{port}"
        self._folder = Path(tempfile.gettempdir()).resolve() / f"clip_rt-{os.getpid()}-{nonce}"
        self._shared_memory_prefix = f"cliprt_{os.getpid()}_{nonce}_"
        self._models = sorted(models)
        self._owner_pid = os.getpid()
        self._report: supervisor.Report | None = None
        self._process, self._lifeline = _start_supervisor(home.python)
        self._finalizer = weakref.finalize(self, _release, self._lifeline, os.getpid())
        try:
            os.write(self._lifeline, json.dumps(self._job(home, models, token)).encode() + b"\n")
        except OSError as error:
            self.end()
            raise ServerStartError(f"the supervisor did not start: {error}.") from error

    def is_alive(self) -> bool:
        if os.getpid() != self._owner_pid:
            return True  # A forked child cannot wait for its parent's children; the call will tell.
        return self._process.poll() is None

    def wait_until_ready(self, deadline: float, start_timeout_s: float) -> None:
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise self._failure()
            if self._is_listening():
                self._check_identity(deadline)
                # From now on the supervisor watches the processes of the models as well.
                with contextlib.suppress(OSError):
                    os.write(self._lifeline, b"\n")
                return
            time.sleep(_POLL_S)
        report = self.end()
        raise ServerStartError(
            f"the embedded server was not ready after {start_timeout_s:g} s, loading "
            f"{', '.join(self._models)}. Allow more time with start_timeout_s=.",
            url=self.url,
            log_tail=report["log_tail"],
        )

    def end(self) -> supervisor.Report:
        """Let go of the server, wait until it is gone, and return its supervisor's report."""
        if os.getpid() != self._owner_pid:
            return _NO_REPORT
        self._finalizer()
        if self._report is None:
            self._report = _read_report(self._process)
            # In case the supervisor itself was killed.
            supervisor.remove_leftovers(str(self._folder), self._shared_memory_prefix)
        return self._report

    def _is_listening(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _check_identity(self, deadline: float) -> None:
        """Triton listens once its models are loaded; make sure that it is ours, and ready."""
        with contextlib.closing(Transport(self.url)) as transport:
            while True:
                try:
                    found = transport.read_server(timeout_s=_ANSWER_TIMEOUT_S)
                    is_ready = transport.is_ready(timeout_s=_ANSWER_TIMEOUT_S)
                except ServerError as error:
                    if not self.is_alive():
                        raise self._failure() from error
                    if time.monotonic() > deadline:
                        raise
                    is_ready = False
                else:
                    if found.name != self.server_id:
                        raise _PortTakenError
                if is_ready:
                    return
                time.sleep(_POLL_S)

    def _failure(self) -> Exception:
        report = self.end()
        log_tail = report["log_tail"]
        if "already in use" in log_tail:
            return _PortTakenError()
        cause = report["problem"] or _find_cause(log_tail)
        return ServerStartError(
            f"the embedded server did not start: {cause}", url=self.url, log_tail=log_tail
        )

    def _job(self, home: Home, models: dict[str, Path], token: str) -> supervisor.Job:
        links = {
            f"models/{name}/{path.relative_to(folder)}": str(path)
            for name, folder in models.items()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }
        path = os.pathsep.join((f"{self._folder}/python/bin", os.environ.get("PATH", os.defpath)))
        libraries = (str(home.libraries), f"{self._folder}/lib", os.environ.get("LD_LIBRARY_PATH"))
        return {
            "command": self._command(home, token),
            "environment": os.environ
            | {"PATH": path, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))},
            "folder": str(self._folder),
            "files": home.files(),
            "links": links | home.links(),
            "shared_memory_prefix": self._shared_memory_prefix,
        }

    def _command(self, home: Home, token: str) -> list[str]:
        return [
            str(home.binary),
            f"--id={self.server_id}",
            f"--model-repository={self._folder}/models",
            f"--backend-directory={self._folder}/backends",
            "--allow-grpc=true",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.port}",
            f"--grpc-restricted-protocol={RESTRICTED}:{TOKEN_KEY}={token}",
            "--allow-http=false",
            "--allow-metrics=false",
            "--allow-sagemaker=false",
            "--allow-vertex-ai=false",
            "--model-control-mode=none",
            "--disable-auto-complete-config",
            "--strict-readiness=true",
            "--exit-on-error=true",
            "--exit-timeout-secs=2",
            "--pinned-memory-pool-byte-size=0",
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory_prefix}",
            "--backend-config=python,stub-timeout-seconds=30",
        ]


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _find_cause(log_tail: str) -> str:
    """Pick the reason out of a log: the models that failed, else the last error."""
    failures = {
        name: reason.partition(r"\n\nAt:")[0].rstrip('"')
        for name, reason in re.findall(r"failed to load '([^']+)' version \d+: (.*)", log_tail)
    }
    if failures:
        reasons = "; ".join(f"model {name!r}: {reason}" for name, reason in failures.items())
        return f"{reasons[:_MESSAGE_CHARS]}. Export it again, or remove its folder."
    errors = re.findall(r"^(?:E\d{4} .*?\] |error: )(.*)", log_tail, re.MULTILINE)
    lines = errors or log_tail.strip().splitlines()
    return lines[-1][:_MESSAGE_CHARS] if lines else "it ended without a word."


_servers: weakref.WeakSet[EmbeddedServer] = weakref.WeakSet()
_lifelines: set[int] = set()
"""Write ends of the pipes that keep servers alive; a forked child closes its copies."""
_NO_REPORT: supervisor.Report = {"exit_code": None, "log_tail": "", "problem": ""}


def _start_supervisor(python: Path) -> tuple[subprocess.Popen[bytes], int]:
    reader, writer = os.pipe()
    _lifelines.add(writer)
    try:
        process = subprocess.Popen(
            [str(python), "-I", "-S", supervisor.__file__],
            stdin=reader,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A session of its own: Ctrl-C in the terminal reaches us, not the server.
            start_new_session=True,
        )
    except OSError as error:
        _release(writer, os.getpid())
        raise ServerStartError(f"the supervisor did not start: {error}. {OTHER_WAY}") from error
    finally:
        os.close(reader)
    assert process.stdout is not None
    # Imported here, because only Linux gets this far and only Unix has it.
    import fcntl

    # So that the report fits even when nobody reads it.
    with contextlib.suppress(OSError):
        fcntl.fcntl(process.stdout, _F_SETPIPE_SZ, _PIPE_BYTES)
    return process, writer


def _release(lifeline: int, owner_pid: int) -> None:
    if os.getpid() == owner_pid and lifeline in _lifelines:
        _lifelines.discard(lifeline)
        os.close(lifeline)


def _read_report(process: subprocess.Popen[bytes]) -> supervisor.Report:
    output, _ = process.communicate()
    with contextlib.suppress(ValueError):
        report: supervisor.Report = json.loads(output)
        return report
    return {"exit_code": None, "log_tail": "", "problem": output.decode("utf-8", "replace")}


def _let_go_in_child() -> None:
    """Leave the servers to the parent, and renew the locks its other threads may hold."""
    global _shared_lock
    while _lifelines:
        with contextlib.suppress(OSError):
            os.close(_lifelines.pop())
    _shared_lock = threading.RLock()
    for server in _servers:
        server._lock = threading.RLock()


def _announce(repository: Path, url: str) -> None:
    _log.info(
        "embedded Triton over %s listens on %s; it is for development and a single user on "
        "loopback, production runs NVIDIA's container",
        repository,
        url,
    )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
