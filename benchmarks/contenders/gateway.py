"""clip_rt's gateway: HTTP in front of a client and the embedded Triton."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import clip_rt
from benchmarks.contenders.implementation import installed
from benchmarks.contenders.kit import Form, Kit
from benchmarks.contenders.openai_server import Modality, OpenAIServer

START_LIMIT_S = 240.0
TIMEOUT_S = 600.0
LIMITS: Mapping[Modality, int] = {"image": 64, "text": 2048}
"""Of one request; of images, as many as fit into the body that it takes."""


class Gateway(OpenAIServer):
    """`clip-rt gateway` in a process of its own.

    Args:
        repository: What it serves.
        model: Name of the model.
        options: Further ones of its command line.
    """

    def __init__(self, repository: Path, model: str, *options: str) -> None:
        command = [sys.executable, "-m", "clip_rt", "gateway", "--port", "0"]
        command += ["--repository", str(repository), "--model", model]
        command += ["--max-items", str(max(LIMITS.values())), "--timeout-s", str(TIMEOUT_S)]
        server = subprocess.Popen(
            [*command, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        # Said when it is ready.
        self.url = server.stdout.readline().partition(" on ")[2].strip()
        super().__init__(server, f"{self.url}/v1/embeddings", model, LIMITS)
        if not self.url:
            self.close()
            raise RuntimeError(f"the gateway ended with exit code {server.returncode}.")
        self.versions = {"clip_rt": clip_rt.__version__, **installed("uvicorn", "starlette")}


def make(kit: Kit, *, form: Form) -> Gateway:
    """Start it over a repository of the kit.

    Raises:
        RuntimeError: it does not start.
    """
    return Gateway(kit.repository(form), kit.name)
