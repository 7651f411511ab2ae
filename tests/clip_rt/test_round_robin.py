"""One name for many servers: gRPC asks a DNS server, and calls go to all that it names in turn."""

from __future__ import annotations

import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fault_proxy import FaultProxy
from owners import wait_until

import clip_rt
from clip_rt.testing import FakeServer

NAME = "replicas.test"
ADDRESSES = ("127.0.0.1", "127.0.0.2")
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 224, 224, 3), dtype=np.uint8)
TYPE_A, CLASS_IN, TTL_S = 1, 1, 0

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="all of 127.0.0.0/8 is loopback on Linux only"
)


class Question(socketserver.DatagramRequestHandler):
    """One question, of any name; about IPv4 it is answered with `ADDRESSES` (RFC 1035)."""

    def handle(self) -> None:
        message = self.rfile.read()
        end = message.index(b"\0", 12) + 5  # Of the name, and of type and class behind it.
        (kind,) = struct.unpack("!H", message[end - 4 : end - 2])
        addresses = ADDRESSES if kind == TYPE_A else ()
        header = message[:2] + struct.pack("!5H", 0x8180, 1, len(addresses), 0, 0)
        records = [
            # 0xC00C: the name is the one at byte 12, where the question is.
            struct.pack("!3HIH", 0xC00C, TYPE_A, CLASS_IN, TTL_S, 4) + socket.inet_aton(address)
            for address in addresses
        ]
        self.wfile.write(header + message[12:end] + b"".join(records))


@pytest.fixture
def names() -> Iterator[socketserver.UDPServer]:
    with socketserver.UDPServer(("127.0.0.1", 0), Question) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(60)


@pytest.fixture
def replicas() -> Iterator[tuple[FakeServer, FakeServer, FaultProxy]]:
    """Two servers that listen on one port, each on an address of its own."""
    with FakeServer() as first, FakeServer() as second:
        port = int(first.url.rpartition(":")[2])
        with FaultProxy(second.url, host=ADDRESSES[1], port=port) as way:
            yield first, second, way


def num_inferred(server: FakeServer) -> int:
    return server.num_calls["ModelInfer"]


def test_calls_go_to_all_servers_of_a_name_and_to_the_others_when_one_is_gone(
    names: socketserver.UDPServer, replicas: tuple[FakeServer, FakeServer, FaultProxy]
) -> None:
    first, second, way = replicas
    port = first.url.rpartition(":")[2]
    url = f"dns://127.0.0.1:{names.server_address[1]}/{NAME}:{port}"
    with clip_rt.Client(url=url, timeout_s=20.0) as client, ThreadPoolExecutor(4) as pool:
        expected = client.encode_images([*PIXELS])

        def ask_one_by_one() -> None:
            rows = list(pool.map(lambda row: client.encode_images([PIXELS[row]]), range(16)))
            np.testing.assert_array_equal(np.concatenate(rows), expected)

        def both_are_asked() -> bool:
            before = [num_inferred(each) for each in (first, second)]
            ask_one_by_one()
            return all(
                num_inferred(server) > num
                for server, num in zip((first, second), before, strict=True)
            )

        assert wait_until(both_are_asked)

        way.refuse()
        way.reset()
        num_before = num_inferred(first)
        for _ in range(3):
            ask_one_by_one()
        assert num_inferred(first) > num_before

        way.listen()
        assert wait_until(both_are_asked)
