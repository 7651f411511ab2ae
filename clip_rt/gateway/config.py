"""What the gateway is told on its command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from clip_rt.errors import InputError
from clip_rt.inputs.hosts import check_hosts

TOKENS_VARIABLE = "CLIP_RT_TOKENS"


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Serve models over HTTP until told to end.

    Raises:
        InputError: a value is out of range, or two exclude each other.
    """

    repository: Path | None = None
    """Folder of models for a server of its own."""
    server: Literal["auto", "embedded", "in_process"] = "auto"
    """What runs the models of a repository: a Triton on loopback, this process, or the first of
    them that there is."""
    url: tuple[str, ...] = ()
    """Triton servers, host:port of gRPC; several are replicas."""
    model: tuple[str, ...] = ()
    """Served names; all that the server has without it. The first is used where a request names
    none."""
    alias: Mapping[str, str] = field(default_factory=dict)
    """Other names of models, as callers write them: ViT-B-32__openai ViT-B/32."""
    candidate: Mapping[str, str] = field(default_factory=dict)
    """Served names of release candidates, which answer some requests in place of a model:
    shop-v3 shop-v4. Vectors of the two mix only where `export compare` says so."""
    candidate_share: float = 0.0
    """Share of requests, 0 to 1, that candidates answer; a request's header X-Clip-RT-Candidate
    says always or never. One that its health check finds wrong is left out."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of this machine."""
    port: int = 8080
    token_file: Path | None = None
    """Bearer tokens that are let in, one a line. Without it: $CLIP_RT_TOKENS, with commas between
    them, else everybody is."""
    certificate: Path | None = None
    """PEM file of a certificate chain, for TLS."""
    private_key: Path | None = None
    """PEM file of its key."""
    image_host: tuple[str, ...] = ()
    """Hosts that images are fetched from by URL; without it none are."""
    immich_url: str | None = None
    """Where Immich's tasks other than CLIP are passed on to."""
    max_body_mib: float = 32.0
    """Largest request."""
    max_items: int = 256
    """Most images and texts of a request."""
    max_labels: int = 10_000
    """Most labels of a request."""
    max_concurrent_requests: int = 64
    """Requests being answered or waiting; one more is answered with 429."""
    max_wait_s: float = math.inf
    """Longest a new request may be expected to wait; one that would is answered with 429."""
    timeout_s: float = 30.0
    """Longest time of a request, and of reading its body."""
    start_timeout_s: float = 300.0
    """Longest wait for a server to be there and to have loaded its models."""
    idle_unload_s: float = math.inf
    """A tower of a model that runs here and was not asked for so long gives its memory back, and is
    loaded again when it is asked."""
    drain_s: float = 0.0
    """Told to end, go on accepting for so long with `/health/ready` at 503: load balancers need
    that to look elsewhere."""

    def __post_init__(self) -> None:
        if self.url and self.repository is not None:
            raise InputError("--url and --repository exclude each other; name servers or a folder.")
        if self.url and self.server != "auto":
            raise InputError(
                f"--url and --server {self.server} exclude each other; name servers, or what runs "
                "the models of a repository."
            )
        if (self.certificate is None) != (self.private_key is None):
            raise InputError("--certificate and --private-key go together; name both or neither.")
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port is {self.port}; it must be within 0 and 65535.")
        for name in ("max_body_mib", "max_items", "max_labels", "timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                option, value = name.replace("_", "-"), getattr(self, name)
                raise InputError(f"--{option} is {value}; it must be above 0 and finite.")
        if (number := self.max_concurrent_requests) < 1:
            raise InputError(f"--max-concurrent-requests is {number}; it must be 1 or more.")
        for name in ("max_wait_s", "idle_unload_s"):
            if not getattr(self, name) > 0:
                option, value = name.replace("_", "-"), getattr(self, name)
                raise InputError(f"--{option} is {value}; it must be above 0.")
        if not 0 <= self.candidate_share <= 1:
            raise InputError(
                f"--candidate-share is {self.candidate_share}; it must be within 0 and 1."
            )
        if self.candidate_share and not self.candidate:
            raise InputError("--candidate-share needs --candidate; name a model and its candidate.")
        check_hosts(self.image_host)
        if not 0 <= self.drain_s < math.inf:
            raise InputError(f"--drain-s is {self.drain_s}; it must be 0 or more.")

    @property
    def max_body_bytes(self) -> int:
        """Largest request body."""
        return int(self.max_body_mib * 1024**2)
