"""Hosts in network namespaces: what listens on loopback in one is reached over its link only."""

import socket
import subprocess
import sys
import time

import pytest
from processes import running

from benchmarks.hosts import Host, hosts, reachable

ECHO = """
import socket
with socket.create_server(("127.0.0.1", {port})) as server:
    while True:
        link, _ = server.accept()
        with link:
            while content := link.recv(65536):
                link.sendall(content)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def connect(address: str, port: int) -> socket.socket:
    deadline_s = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection((address, port), timeout=10)
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)


def namespaces() -> set[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=30)
    return {line.split()[0] for line in done.stdout.splitlines() if line.startswith("clip-rt-")}


def test_what_is_here_needs_nothing():
    assert Host().is_here
    with reachable(Host(), free_port()):
        pass


def test_a_port_of_a_namespace_is_reached_through_its_relay():
    port = free_port()
    with hosts(2) as (one, other):
        if one.is_here:
            pytest.skip("network namespaces take root and ip")
        assert one.address != other.address
        command = [*one.prefix, sys.executable, "-c", ECHO.format(port=port)]
        with running(command), reachable(one, port):
            content = bytes(range(256)) * 256
            deadline_s = time.monotonic() + 20
            found = b""
            while found != content:  # Until the server is up, connections are cut off.
                assert time.monotonic() < deadline_s
                found = b""
                try:
                    with connect(one.address, port) as link:
                        link.sendall(content)
                        link.shutdown(socket.SHUT_WR)
                        while part := link.recv(65536):
                            found += part
                except OSError:
                    time.sleep(0.1)
            with pytest.raises(OSError, match=r"refused|timed out"):
                socket.create_connection(("127.0.0.1", port), timeout=2)
            with pytest.raises(OSError, match=r"refused|timed out|unreachable"):
                socket.create_connection((other.address, port), timeout=2)
    assert not namespaces()
