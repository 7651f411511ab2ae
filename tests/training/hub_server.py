"""A server on loopback that speaks the few endpoints of the model hub a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "someone/some-clip"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has, what it does wrong, and what it was asked."""

    files: dict[str, bytes]
    large: frozenset[str] = frozenset()
    """Files kept as LFS objects."""
    served: dict[str, bytes] = field(default_factory=dict)
    """Content that is sent instead of the stated one."""
    break_off: set[str] = field(default_factory=set)
    """Files whose next download ends 1,000 bytes early."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, file, range."""
    url: str = ""

    def checksum(self, name: str) -> str:
        content = self.files[name]
        if name in self.large:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def downloads(self, name: str) -> list[str | None]:
        return [
            byte_range
            for method, file, byte_range in self.requests
            if (method, file) == ("GET", name)
        ]

    def siblings(self) -> list[dict[str, object]]:
        entries: list[dict[str, object]] = []
        for name, content in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": "a" * 40}
            if name in self.large:
                lfs = {"sha256": self.checksum(name), "size": len(content), "pointerSize": 134}
                entry["lfs"] = lfs
            else:
                entry["blobId"] = self.checksum(name)
            entries.append(entry)
        return entries


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path in (f"/api/models/{REPOSITORY}/revision/{name}" for name in ("main", COMMIT)):
                info = {"id": REPOSITORY, "sha": COMMIT, "siblings": hub.siblings()}
                self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
                return
            prefix = f"/{REPOSITORY}/resolve/{COMMIT}/"
            name = path.removeprefix(prefix)
            if not path.startswith(prefix) or name not in hub.files:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            byte_range = self.headers.get("Range")
            hub.requests.append((self.command, name, byte_range))
            content = hub.served.get(name, hub.files[name])
            headers = {"ETag": f'"{hub.checksum(name)}"', "X-Repo-Commit": COMMIT}
            start = int(byte_range.removeprefix("bytes=").partition("-")[0]) if byte_range else 0
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            length = len(content) - start
            if body and name in hub.break_off:
                hub.break_off.remove(name)
                self.send(200, content[: length - 1000], headers, length=length)
                self.close_connection = True
                return
            self.send(
                206 if start else 200, content[start:] if body else b"", headers, length=length
            )

        def send(
            self, status: int, body: bytes, headers: dict[str, str], *, length: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)
