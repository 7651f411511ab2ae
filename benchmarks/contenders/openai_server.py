"""A server that speaks OpenAI's embeddings over HTTP, and one HTTP client for each thread."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.contenders.implementation import Implementation
from benchmarks.findings import CallKind

ANSWER_LIMIT_S = 600.0
END_LIMIT_S = 30.0
PAUSE_S = 0.2
JSON = {"Content-Type": "application/json"}

Modality = Literal["image", "text"]


class OpenAIServer(Implementation):
    """A server process, and clients that keep their connections alive.

    Images go as base64 in data URIs. Bodies are made beforehand, because they cost the same whoever
    is asked. Embeddings come back as base64, which is what the library `openai` asks for and
    quicker than numbers in JSON.

    Args:
        server: Its process; ended by `close`.
        url: Of its path for embeddings.
        model: Name of the model in requests.
        limits: Most items of one request.
    """

    calls: frozenset[CallKind] = frozenset({"jpegs", "texts"})

    def __init__(
        self, server: subprocess.Popen[Any], url: str, model: str, limits: Mapping[Modality, int]
    ) -> None:
        self._server, self._model, self._limits = server, model, limits
        self.embeddings_url = url
        self._local = threading.local()

    def prepare(self, call: CallKind, items: Any) -> Any:
        """Make the bodies of the requests, as many as it takes."""
        if call == "jpegs":
            return self._make_bodies("image", [data_uri(jpeg) for jpeg in items])
        return self._make_bodies("text", items)

    def run(self, call: CallKind, prepared: Any) -> NDArray[np.float32]:
        """Post one body after the other."""
        if not hasattr(self._local, "client"):
            self._local.client = httpx.Client(timeout=ANSWER_LIMIT_S, trust_env=False)
        client: httpx.Client = self._local.client
        rows: list[NDArray[np.float32]] = []
        for body in prepared:
            response = client.post(self.embeddings_url, content=body, headers=JSON)
            if response.is_error:
                raise RuntimeError(f"HTTP {response.status_code}: {response.text[:500]}")
            rows += read_rows(response)
        return np.stack(rows).astype(np.float32)

    def pids(self) -> list[int]:
        """Return the server and its children."""
        try:
            children = psutil.Process(self._server.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [self._server.pid, *(child.pid for child in children)]

    def close(self) -> None:
        """End the server."""
        self._server.terminate()
        try:
            self._server.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def wait_until_healthy(self, url: str, limit_s: float) -> None:
        """Ask until its health check succeeds.

        Raises:
            RuntimeError: it ended, or did not become healthy.
        """
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            if self._server.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {self._server.returncode}.")
            try:
                if httpx.get(url, timeout=5.0, trust_env=False).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(PAUSE_S)
        raise RuntimeError(f"the server was not ready in {limit_s:g} s.")

    def _make_bodies(self, modality: Modality, inputs: Sequence[str]) -> list[bytes]:
        size = self._limits[modality]
        asked = {"model": self._model, "modality": modality, "encoding_format": "base64"}
        return [
            json.dumps(asked | {"input": list(inputs[start : start + size])}).encode()
            for start in range(0, len(inputs), size)
        ]


def data_uri(jpeg: bytes) -> str:
    """Return a JPEG file as it is written into JSON."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}"


def read_rows(response: httpx.Response) -> list[NDArray[np.float32]]:
    """Return the embeddings of an answer in base64, float32 (D,) each."""
    return [
        np.frombuffer(base64.b64decode(each["embedding"]), "<f4")
        for each in response.json()["data"]
    ]
