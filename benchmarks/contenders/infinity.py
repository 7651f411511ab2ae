r"""infinity, a server that people put in front of CLIP, over its HTTP on loopback.

It pins older versions of what we use, so it lives in an environment of its own. Its extras would
also bring a second, CUDA torch; the least that serves CLIP over HTTP is

    python -m venv infinity-venv
    infinity-venv/bin/pip install --no-deps infinity-emb==0.0.78
    infinity-venv/bin/pip install torch==2.13.0 pillow 'numpy<2' 'click<8.2' fastapi orjson \
        'uvicorn[standard]<0.33' 'typer<0.13' 'rich<14' prometheus-fastapi-instrumentator \
        'pydantic<3' posthog 'transformers<5' 'sentence-transformers<4' aiohttp
    infinity-venv/bin/pip uninstall torchvision
    export CLIP_RT_INFINITY=$PWD/infinity-venv

where pip takes a CPU build of torch if an index offers one. torchvision goes where its wheel was
built for the CUDA torch and cannot be imported beside another; transformers then prepares images
with Pillow.

Longer texts than 20 tokens get wrong answers, and so no speed: 0.0.78 cuts texts at the
`max_length` of the model's configuration (`infinity_emb/transformer/vision/torch_vision.py`), and
transformers 4 says 20 where the configuration of a CLIP model says nothing.

It is found by the option of `make`, else by $CLIP_RT_INFINITY, else as `infinity_emb`
on the PATH or beside this Python.
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.contenders.implementation import Implementation, UnfitError, count_cores
from benchmarks.contenders.kit import Kit
from benchmarks.findings import CallKind

VARIABLE = "CLIP_RT_INFINITY"
START_LIMIT_S = 180.0
ANSWER_LIMIT_S = 600.0
END_LIMIT_S = 10.0
PAUSE_S = 0.2
IMAGES_PER_REQUEST, TEXTS_PER_REQUEST = 32, 2048
"""The most that it takes in one request."""


class Infinity(Implementation):
    """A server process of infinity, and HTTP clients, one for each thread, that keep alive.

    Images go as base64 in data URIs, made beforehand; embeddings come back as base64, which is
    what the OpenAI client asks for and quicker than numbers in JSON.
    """

    calls: frozenset[CallKind] = frozenset({"jpegs", "texts"})

    def __init__(self, kit: Kit, executable: Path) -> None:
        self._local = threading.local()
        self._model = str(kit.hub)
        port = _find_free_port()
        self._url = f"http://127.0.0.1:{port}"
        threads = str(count_cores())
        # In our group, so that it ends with us in any case; its log becomes ours.
        self._server = subprocess.Popen(
            [
                *(str(executable), "v2", "--model-id", self._model, "--engine", "torch"),
                *("--device", "cpu", "--host", "127.0.0.1", "--port", str(port)),
            ],
            env=os.environ
            | {
                "HF_HUB_OFFLINE": "1",
                "DO_NOT_TRACK": "1",
                "INFINITY_ANONYMOUS_USAGE_STATS": "0",
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
            },
            stdin=subprocess.DEVNULL,
        )
        try:
            self._wait_until_ready()
            self.versions = _ask_versions(executable)
        except BaseException:
            self.close()
            raise

    def prepare(self, call: CallKind, items: Any) -> Any:
        """Make the bodies of the requests, as many as it takes."""
        if call == "jpegs":
            uris = [
                f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}" for jpeg in items
            ]
            return _bodies(self._model, "image", uris, IMAGES_PER_REQUEST)
        return _bodies(self._model, "text", items, TEXTS_PER_REQUEST)

    def run(self, call: CallKind, prepared: Any) -> NDArray[np.float32]:
        """Post one body after the other."""
        if not hasattr(self._local, "client"):
            self._local.client = httpx.Client(base_url=self._url, timeout=ANSWER_LIMIT_S)
        client: httpx.Client = self._local.client
        rows = []
        for body in prepared:
            response = client.post("/embeddings", json=body)
            if response.is_error:
                raise RuntimeError(f"HTTP {response.status_code}: {response.text[:500]}")
            rows += [
                np.frombuffer(base64.b64decode(each["embedding"]), "<f4")
                for each in response.json()["data"]
            ]
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

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline_s:
            if self._server.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {self._server.returncode}.")
            try:
                if httpx.get(f"{self._url}/health", timeout=5.0).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(PAUSE_S)
        raise RuntimeError(f"the server was not ready in {START_LIMIT_S:g} s.")


def find_executable(option: Path | None = None) -> Path | None:
    """Return where infinity is, or None."""
    if given := option or os.environ.get(VARIABLE):
        path = Path(given).expanduser().absolute()
        path = path / "bin" / "infinity_emb" if path.is_dir() else path
        return path if os.access(path, os.X_OK) else None
    beside = Path(sys.executable).with_name("infinity_emb")
    found = shutil.which("infinity_emb") or (str(beside) if beside.exists() else None)
    return None if found is None else Path(found).absolute()


def _bodies(model: str, modality: str, inputs: list[str], size: int) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "modality": modality,
            "encoding_format": "base64",
            "input": inputs[start : start + size],
        }
        for start in range(0, len(inputs), size)
    ]


def _ask_versions(executable: Path) -> dict[str, str]:
    """Ask the environment that it lives in what decides its speed."""
    code = (
        "from importlib.metadata import version\n"
        "for name in 'infinity-emb', 'torch', 'transformers': print(name, version(name))"
    )
    lines = subprocess.run(
        [executable.with_name("python"), "-c", code],
        capture_output=True,
        text=True,
        timeout=60.0,
        check=False,
    ).stdout.splitlines()
    return dict(line.split(maxsplit=1) for line in lines if " " in line)


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make(kit: Kit, *, executable: Path | None = None) -> Infinity:
    """Start it.

    Raises:
        UnfitError: it is not installed.
    """
    found = find_executable(executable)
    if found is None:
        raise UnfitError("infinity is not installed; see benchmarks/contenders/infinity.py.")
    return Infinity(kit, found)
