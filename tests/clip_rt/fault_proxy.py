"""A network between a client and a server that fails as a test wants it to.

with FaultProxy(server.url) as proxy, clip_rt.Client(proxy.url, model="tiny") as client:
    proxy.fault = Stall()         # from now on, for connections that exist and for new ones
    ...
    proxy.fault = None            # well again
    proxy.freeze()                # connections that exist are dead and do not know it
    proxy.reset()                 # connections that exist are torn down
    proxy.refuse()                # nobody listens any more ...
    proxy.listen()                # ... and again
    proxy.target = other.url      # new connections go elsewhere
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Literal

Direction = Literal["to server", "to client"]
CHUNK_BYTES = 65536
POLL_S = 0.02
"""How soon a change is noticed by a connection that is waiting."""


@dataclass(frozen=True)
class Stall:
    """Nothing gets through; what was sent meanwhile arrives when it is over."""


@dataclass(frozen=True)
class Delay:
    """Everything arrives later."""

    delay_s: float


@dataclass(frozen=True)
class Drip:
    """Few bytes arrive at a time."""

    bytes_per_s: int


@dataclass(frozen=True)
class Corrupt:
    """One byte of each chunk of more than `min_bytes` is flipped."""

    direction: Direction
    min_bytes: int = 0


@dataclass(frozen=True)
class CutAfter:
    """A connection is torn down after so many more bytes; in the middle of a message, mostly."""

    num_bytes: int
    direction: Direction


Fault = Stall | Delay | Drip | Corrupt | CutAfter


class FaultProxy:
    """Forwards TCP connections of a port of `host`, free unless named, to `target`, host:port."""

    def __init__(self, target: str, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.target = target
        self.fault: Fault | None = None
        self.num_accepted = 0
        self.num_bytes_to_server = 0
        self._host, self._port = host, port
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> FaultProxy:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self.reset()

    @property
    def url(self) -> str:
        return f"{self._host}:{self._port}"

    @property
    def num_open(self) -> int:
        return len(self._connections)

    def listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self._host, self._port))
        listener.listen(128)
        self._port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def refuse(self) -> None:
        """Stop listening; connections that exist go on."""
        listener, self._listener = self._listener, None
        if listener is not None:
            # Wakes the thread that waits in accept, which closing does not.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def reset(self) -> None:
        """Tear down the connections that exist."""
        for connection in self._list():
            connection.tear_down()

    def freeze(self) -> None:
        """Let nothing through the connections that exist, for good, without closing them."""
        for connection in self._list():
            connection.is_frozen = True

    def forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _list(self) -> list[_Connection]:
        with self._lock:
            return list(self._connections)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            host, port = self.target.rsplit(":", 1)
            try:
                server = socket.create_connection((host, int(port)), timeout=5.0)
            except OSError:
                _abort(client)
                continue
            server.settimeout(None)
            connection = _Connection(self, client, server)
            with self._lock:
                self.num_accepted += 1
                self._connections.add(connection)
            connection.start()


class _Connection:
    def __init__(self, proxy: FaultProxy, client: socket.socket, server: socket.socket) -> None:
        self.is_frozen = False
        self._proxy = proxy
        self._client = client
        self._server = server
        self._is_over = threading.Event()
        self._num_bytes: dict[Direction, int] = {"to server": 0, "to client": 0}

    def start(self) -> None:
        for each in (self._client, self._server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pumps: tuple[tuple[socket.socket, socket.socket, Direction], ...] = (
            (self._client, self._server, "to server"),
            (self._server, self._client, "to client"),
        )
        for pump in pumps:
            threading.Thread(target=self._pump, args=pump, daemon=True).start()

    def tear_down(self) -> None:
        """Reset both ends. The pumps see it and end."""
        self._is_over.set()
        for each in (self._client, self._server):
            _abort(each)
        self._proxy.forget(self)

    def _pump(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        counted_for: Fault | None = None
        try:
            while not self._is_over.is_set():
                if not select.select([source], [], [], POLL_S)[0]:
                    continue
                if self._is_held():  # Left in the buffers of the kernel, which fill up.
                    self._is_over.wait(POLL_S)
                    continue
                fault = self._proxy.fault
                if fault is not counted_for:
                    counted_for, self._num_bytes[direction] = fault, 0
                chunk = source.recv(CHUNK_BYTES)
                if not chunk:
                    break
                if direction == "to server":
                    self._proxy.num_bytes_to_server += len(chunk)
                self._forward(chunk, sink, direction, fault)
        except (OSError, ValueError):  # A socket that was closed meanwhile has no number.
            pass
        self.tear_down()

    def _is_held(self) -> bool:
        return self.is_frozen or isinstance(self._proxy.fault, Stall)

    def _forward(
        self, chunk: bytes, sink: socket.socket, direction: Direction, fault: Fault | None
    ) -> None:
        if isinstance(fault, Delay):
            self._is_over.wait(fault.delay_s)
        elif isinstance(fault, Drip):
            for byte in chunk:
                sink.sendall(bytes([byte]))
                time.sleep(1 / fault.bytes_per_s)
                if self._proxy.fault is not fault or self._is_over.is_set():
                    raise OSError("dripped long enough")
            return
        elif isinstance(fault, Corrupt) and fault.direction == direction:
            if len(chunk) > fault.min_bytes:
                middle = len(chunk) // 2
                chunk = chunk[:middle] + bytes([chunk[middle] ^ 0xFF]) + chunk[middle + 1 :]
        elif isinstance(fault, CutAfter) and fault.direction == direction:
            left = fault.num_bytes - self._num_bytes[direction]
            self._num_bytes[direction] += len(chunk)
            if len(chunk) >= left:
                sink.sendall(chunk[:left])
                raise OSError("cut")
        sink.sendall(chunk)


def _abort(end: socket.socket) -> None:
    """Close an end so that the other hears of it by a reset."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Wakes a thread that waits for it.
        end.shutdown(socket.SHUT_RD)
    end.close()
