"""Options that every command which asks a model has in common."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from clip_rt.errors import InputError

if TYPE_CHECKING:
    from clip_rt.client import Client


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is asked, and what runs it.

    Raises:
        InputError: two options exclude each other.
    """

    model: str | None = None
    """Served name; the only one of the server without it."""
    url: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Address of a running Triton, host:port of gRPC; several are replicas."""
    repository: Path | None = None
    """Folder of models; the bundled one without it."""
    server: Literal["auto", "embedded", "in_process"] = "auto"
    """What runs a repository: a Triton of this machine, this process, or the first there is."""
    timeout_s: float = 60.0
    """Longest wait for a part of the answers."""
    cache_dir: Path | None = None
    """Folder that keeps embeddings of labels for the next command. Without it: $CLIP_RT_CACHE_DIR,
    else ~/.cache/clip_rt/labels."""

    def __post_init__(self) -> None:
        if self.url and self.repository is not None:
            raise InputError("--url and --repository exclude each other; name servers or a folder.")
        if not self.timeout_s > 0:
            raise InputError(f"--timeout-s is {self.timeout_s}; it must be above 0.")

    def connect(self) -> Client:
        """Return a client, to be closed by the caller; nothing is asked before its first call."""
        # Only here: help needs none of it.
        from clip_rt.client import Client

        return Client(
            url=self.url or None,
            repository=self.repository,
            model=self.model,
            server=self.server,
            timeout_s=self.timeout_s,
            cache_dir=find_cache_dir(self.cache_dir),
        )


def find_cache_dir(given: Path | None) -> Path | None:
    """Return the folder that keeps embeddings of labels; None where there is no home for one."""
    from clip_rt.client import CACHE_VARIABLE
    from clip_rt.embedded.runtime_choice import default_folder

    if given is not None:
        return given
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else default_folder("labels")
