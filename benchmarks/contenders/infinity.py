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

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.contenders.implementation import UnfitError, count_cores
from benchmarks.contenders.kit import Kit
from benchmarks.contenders.openai_server import Modality, OpenAIServer

VARIABLE = "CLIP_RT_INFINITY"
START_LIMIT_S = 180.0
LIMITS: Mapping[Modality, int] = {"image": 32, "text": 2048}
"""The most that it takes in one request."""


class Infinity(OpenAIServer):
    """A server process of infinity."""

    def __init__(self, kit: Kit, executable: Path) -> None:
        port = _find_free_port()
        model, threads = str(kit.hub), str(count_cores())
        # In our group, so that it ends with us in any case; its log becomes ours.
        server = subprocess.Popen(
            [
                *(str(executable), "v2", "--model-id", model, "--engine", "torch"),
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
        url = f"http://127.0.0.1:{port}"
        super().__init__(server, f"{url}/embeddings", model, LIMITS)
        try:
            self.wait_until_healthy(f"{url}/health", START_LIMIT_S)
            self.versions = _ask_versions(executable)
        except BaseException:
            self.close()
            raise


def find_executable(option: Path | None = None) -> Path | None:
    """Return where infinity is, or None."""
    if given := option or os.environ.get(VARIABLE):
        path = Path(given).expanduser().absolute()
        path = path / "bin" / "infinity_emb" if path.is_dir() else path
        return path if os.access(path, os.X_OK) else None
    beside = Path(sys.executable).with_name("infinity_emb")
    found = shutil.which("infinity_emb") or (str(beside) if beside.exists() else None)
    return None if found is None else Path(found).absolute()


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
