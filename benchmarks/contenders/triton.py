"""The whole stack: `clip_rt.Client`, and Triton, its own or one somewhere."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

import clip_rt
from benchmarks.contenders.implementation import TEMPLATES, Implementation, installed
from benchmarks.contenders.kit import Form, Kit
from benchmarks.findings import CallKind
from clip_rt.embedded.server import EmbeddedServer, acquire_server

TIMEOUT_S = 1800.0
START_TIMEOUT_S = 240.0


class Triton(Implementation):
    """A client, and the embedded server where it has one.

    It may be called from any number of threads.

    Args:
        client: Remembers class embeddings.
        cold: The same, and does not.
        server: Acquired; released at the end.
        versions: Of what runs the model.
    """

    def __init__(
        self,
        client: clip_rt.Client,
        cold: clip_rt.Client,
        server: EmbeddedServer | None,
        versions: dict[str, str],
    ) -> None:
        self.client: clip_rt.Client = client
        self._cold = cold
        self._server = server
        self.versions = {"clip_rt": clip_rt.__version__, **versions}

    def prepare(self, call: CallKind, items: Any) -> Any:
        """Make lists of images; embed the labels of "zero_shot", which it then knows."""
        if call == "pixels":
            return list(items)
        if call == "zero_shot":
            self.client.class_embeddings(items[1])
        return items

    def run(self, call: CallKind, prepared: Any) -> NDArray[np.float32]:
        """Ask the server."""
        if call in ("pixels", "jpegs"):
            return self.client.encode_images(prepared)
        if call == "texts":
            return self.client.encode_texts(prepared)
        if call == "classifier":
            # One that keeps nothing, so that every call is the first.
            return self._cold.class_embeddings(prepared, templates=TEMPLATES)
        return self.client.zero_shot(*prepared).probabilities

    def pids(self) -> list[int]:
        """Return those of the embedded server: Triton, its models, and who looks after it."""
        if self._server is None:
            return []
        mark = f"--id={self._server.server_id}"
        found: list[int] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if mark in process.cmdline():
                    found += [process.pid, *(each.pid for each in process.children(recursive=True))]
                    if (parent := process.parent()) is not None:
                        found.append(parent.pid)
        return found

    def close(self) -> None:
        """Hang up, and release the server."""
        self.client.close()
        self._cold.close()
        if self._server is not None:
            self._server.stop()


def make(
    kit: Kit, *, form: Form | None = None, url: str | None = None, model: str | None = None
) -> Triton:
    """Connect to a server at a URL, or start one over a repository of the kit."""
    server = None
    place: dict[str, Any] = {"url": url, "model": model}
    versions = installed("tritonclient")
    if form is not None:
        place = {"repository": kit.repository(form), "model": kit.name}
        engine = "onnxruntime" if form == "onnxruntime" else "openvino"
        versions |= installed("nvidia-pytriton", engine)
        server = acquire_server(kit.repository(form), start_timeout_s=START_TIMEOUT_S)

    def connect(**options: Any) -> clip_rt.Client:
        options |= {"timeout_s": TIMEOUT_S, "start_timeout_s": START_TIMEOUT_S}
        return clip_rt.Client(**place, **options)

    try:
        client = connect()
        _ = client.manifest  # Connects, so that it is ready when we say so.
        return Triton(client, connect(cache_bytes=0), server, versions)
    except BaseException:
        if server is not None:
            server.stop()
        raise
