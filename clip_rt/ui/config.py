"""What the page is told on its command line: all that the gateway is, and the index."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from clip_rt.gateway.config import GatewayConfig

LOCAL_NAME = "localhost"


@dataclass(frozen=True, kw_only=True)
class UiConfig(GatewayConfig):
    """Serve a page that classifies and searches images, until told to end.

    Raises:
        InputError: a value is out of range, or two exclude each other.
    """

    port: int = 8081
    index: Path | None = None
    """Folder of the index that is searched. Without it: $CLIP_RT_INDEX, else
    ~/.local/share/clip_rt/index."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return is_local_name(self.host)


def is_local_name(host: str) -> bool:
    """Whether a name or address of a host is this machine's own loopback."""
    if host.lower() == LOCAL_NAME:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
