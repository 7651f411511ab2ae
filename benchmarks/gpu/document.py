"""The JSON of a run on a GPU, written whole whenever something ends, so that a cut keeps the rest.

    {"version": 1, "is_rehearsal": false, "date": ..., "minutes": 6.0,
     "stages": {"device": {"status": "finished", "seconds": 12.1, "result": {...}}, ...}}

A stage is "running" until it ends; in the file of a run that was killed it stays so.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_rt.errors import InputError

VERSION = 1
PACKAGES = (
    "numpy nvidia-modelopt onnx onnxruntime onnxruntime-gpu open_clip_torch tensorrt torch "
    "torchvision transformers triton"
).split()
"""Whose versions matter."""
SUFFIX, REHEARSAL_SUFFIX = "_gpu.json", "_gpu_rehearsal.json"
"""What follows the date in the name of a file."""


def begin(*, minutes: float, is_rehearsal: bool, stages: Sequence[str]) -> dict[str, Any]:
    """Return the document of a run of which nothing has begun."""
    command = ["python", "-m", "benchmarks.gpu"]
    try:
        from benchmarks.record import describe_result

        facts = describe_result(command, PACKAGES)
    except ModuleNotFoundError as error:  # What describes the machine is not installed.
        facts = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "command": shlex.join([*command, *sys.argv[1:]]),
            "machine": {"python": sys.version.split()[0], "cores": os.cpu_count()},
            "not_described": f"{error.name} is not installed",
        }
    run = {"version": VERSION, "is_rehearsal": is_rehearsal, "minutes": minutes}
    return {**run, **facts, "planned": list(stages), "stages": {}}


def path_of(document: Mapping[str, Any], folder: Path) -> Path:
    """Return where a document belongs."""
    suffix = REHEARSAL_SUFFIX if document["is_rehearsal"] else SUFFIX
    return folder / f"{document['date']}{suffix}"


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Replace the file in one step: whoever reads it sees the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}-", delete=False, encoding="utf-8"
    ) as staged:
        staged.write(json.dumps(document, indent=1) + "\n")
        staged.flush()
        os.fsync(staged.fileno())
    os.chmod(staged.name, 0o644)
    os.replace(staged.name, path)


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote.

    Raises:
        InputError: no such file, no JSON, or not of a run of this version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as the JSON of a run: {error}.") from error
    found = document.get("version") if isinstance(document, dict) else None
    if found != VERSION or not isinstance(document.get("stages"), dict):
        raise InputError(
            f"{path} is no run of python -m benchmarks.gpu, or not of version {VERSION}."
        )
    return document


def newest(folder: Path) -> Path | None:
    """Return the latest run on a GPU in a folder; rehearsals are none."""
    return max(folder.glob(f"????-??-??{SUFFIX}"), default=None)


def result_of(document: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Return what a stage found, as far as it came; empty where it never began."""
    return document["stages"].get(stage, {}).get("result", {})
