"""What bringing an index up to date costs, and that it reads what changed and nothing else.

    python -m benchmarks.studies.index_update

100,000 small pictures are indexed; then 10,000 of them are changed, 10,000 moved and 10,000
removed. The model is the stand-in of `clip_rt.testing`, so that the time is that of everything but
a model: finding, reading, hashing, decoding, requests over gRPC, the index.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

import clip_rt
from benchmarks.record import save
from clip_rt.search import Index, Report
from clip_rt.testing import FakeServer
from clip_rt_commands import program
from clip_rt_commands.errors import command

FILES_IN_A_FOLDER = 1000
SIDE_PX = 24


@dataclass(frozen=True, kw_only=True)
class IndexUpdateConfig:
    """How many pictures, and where."""

    num_files: int = 100_000
    """Pictures in all."""
    num_changed: int = 10_000
    """Of which so many are changed, so many moved, and so many removed."""
    folder: Path | None = None
    """Where a folder for them is made, and removed at the end."""


def write_picture(path: Path, number: int) -> None:
    """Write a picture of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE_PX, SIDE_PX, 3), np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)


def place(folder: Path, number: int) -> Path:
    """Return where a picture is."""
    return folder / f"{number // FILES_IN_A_FOLDER:04d}" / f"{number:07d}.png"


def run(config: IndexUpdateConfig, folder: Path) -> dict[str, Any]:
    """Do one kind of change after the other, each with an update."""
    photos, num, changed = folder / "photos", config.num_files, config.num_changed
    for number in range(num):
        path = place(photos, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_picture(path, number)
    results: dict[str, Any] = {}
    with (
        FakeServer(model="m") as server,
        clip_rt.Client(server.url) as client,
        Index.open(folder / "index", create=True) as index,
    ):

        def update(what: str, change: Callable[[], object]) -> None:
            change()
            start_s = time.perf_counter()
            report: Report = index.update(client, [photos])
            took_s = time.perf_counter() - start_s
            results[what] = {"seconds": round(took_s, 3)} | asdict(report) | index.count()
            print(what, results[what], flush=True)  # noqa: T201

        def change() -> None:
            for number in range(changed):
                write_picture(place(photos, number), num + number)

        def move() -> None:
            (photos / "moved").mkdir()
            for number in range(changed, 2 * changed):
                os.rename(place(photos, number), photos / "moved" / f"{number}.png")

        def remove() -> None:
            for number in range(2 * changed, 3 * changed):
                place(photos, number).unlink()

        update("all are new", lambda: None)
        update("nothing changed", lambda: None)
        update(f"{changed} changed", change)
        update(f"{changed} moved", move)
        update(f"{changed} removed", remove)
    size_bytes = sum(each.stat().st_size for each in (folder / "index").iterdir())
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"updates": results, "index_bytes": size_bytes, "peak_rss_bytes": peak_bytes}


def main(config: IndexUpdateConfig) -> None:
    """Run it in a folder of its own, and write a dated JSON."""
    with tempfile.TemporaryDirectory(prefix="clip_rt-index-", dir=config.folder) as folder:
        found = run(config, Path(folder))
    save("studies.index_update", found, packages=("numpy", "pillow", "tritonclient"))


if __name__ == "__main__":
    with command():
        main(tyro.cli(IndexUpdateConfig, prog=program(__spec__.name), description=__doc__))
