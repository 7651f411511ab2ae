"""Which hosts images may be fetched from, as people name them."""

from __future__ import annotations

from collections.abc import Iterable

from clip_rt.errors import InputError


def check_hosts(hosts: Iterable[str]) -> None:
    """Refuse what images cannot be fetched from.

    Raises:
        InputError: one is no name of a host.
    """
    for host in hosts:
        if not host or set("/:@") & set(host) or host.endswith("."):
            raise InputError(
                f"image host {host[:80]!r} is no name of a host; leave out scheme, port and path."
            )
