"""Hosts for tests on one machine: network namespaces, each with an address and a link of its own.

What runs in one listens on its loopback only, as the embedded server does; a relay in the same
namespace, `python -m benchmarks.hosts ADDRESS PORT`, makes a port of it reachable over the link.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

NETWORK = "10.213.{}.{}"
"""Of the pairs of addresses, one pair for each host; nothing is routed beyond."""
_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where a process runs, and at which address others reach it."""

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    """Of a command, to run it there."""

    @property
    def is_here(self) -> bool:
        """Whether it shares its network with this process."""
        return not self.prefix


@contextlib.contextmanager
def hosts(number: int) -> Iterator[list[Host]]:
    """Yield hosts in network namespaces where that is possible, else this one as often.

    It takes root and `ip`; namespaces and links are gone after the `with` block.
    """
    with contextlib.ExitStack() as undo:
        try:
            found = [_make(index, undo) for index in range(number)]
        except (OSError, subprocess.CalledProcessError):
            undo.close()
            found = [Host()] * number
        yield found


def _make(index: int, undo: contextlib.ExitStack) -> Host:
    if shutil.which("ip") is None or os.geteuid() != 0:
        raise OSError("namespaces take root and ip")
    name = f"clip-rt-{os.getpid()}-{index}"
    # Names of links have 15 characters at most.
    ours, theirs = (f"crt{os.getpid() % 10**7}{index}{side}" for side in "ab")
    near, far = (NETWORK.format(index, last) for last in (1, 2))
    _ip("netns", "add", name)
    undo.callback(_ip, "netns", "delete", name)  # Its link goes with it.
    _ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
    _ip("addr", "add", f"{near}/30", "dev", ours)
    _ip("link", "set", ours, "up")
    _ip("-n", name, "addr", "add", f"{far}/30", "dev", theirs)
    for link in (theirs, "lo"):
        _ip("-n", name, "link", "set", link, "up")
    return Host(address=far, prefix=("ip", "netns", "exec", name))


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


@contextlib.contextmanager
def reachable(host: Host, port: int) -> Iterator[None]:
    """Have a port of a host's loopback be reached at its address in a `with` block."""
    if host.is_here:
        yield
        return
    command = [*host.prefix, sys.executable, "-m", "benchmarks.hosts", host.address, str(port)]
    relay = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert relay.stdout is not None
        relay.stdout.readline()
        yield
    finally:
        relay.kill()
        relay.communicate(timeout=30)


async def _relay(address: str, port: int) -> None:
    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while content := await source.read(_CHUNK_BYTES):
            target.write(content)
            await target.drain()
        target.write_eof()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.transport.abort()  # As if nobody listened.
            return
        try:
            await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))
        except OSError:  # One side is gone, so the other is let go.
            writer.transport.abort()
        finally:
            inner_writer.close()
            writer.close()

    server = await asyncio.start_server(serve, address, port)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_relay(sys.argv[1], int(sys.argv[2])))
