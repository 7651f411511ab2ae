"""Drawings of a style that the bundled model never saw, as people label images: tables, folders."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from PIL import Image
from search_pictures import SHARD

KINDS = {"clock": ("o’clock", "-thirty"), "flag": ("flag: ",), "face": (" face",)}
"""Parts of names, one of which every emoji of a kind has."""


@cache
def read_all() -> tuple[tuple[str, bytes], ...]:
    """Names and WebP files of all drawings, in Unicode's order."""
    with tarfile.open(SHARD) as shard:
        files = {each.name: shard.extractfile(each).read() for each in shard}
    keys = sorted(name.removesuffix(".json") for name in files if name.endswith(".json"))
    return tuple((json.loads(files[f"{key}.json"])["name"], files[f"{key}.webp"]) for key in keys)


def kind_of(name: str) -> str | None:
    return next(
        (kind for kind, parts in KINDS.items() if any(part in name for part in parts)), None
    )


def choose(num_each: int, num_others: int) -> list[tuple[str | None, bytes]]:
    """Some drawings of each kind, and some of none."""
    wanted = dict.fromkeys(KINDS, num_each) | {None: num_others}
    found = []
    # Spread over all that there are.
    for name, data in sorted(read_all(), key=lambda row: hash_of(row[0])):
        kind = kind_of(name)
        if wanted[kind] > 0:
            wanted[kind] -= 1
            found.append((kind, data))
    return found


def hash_of(name: str) -> int:
    return sum((index + 1) * ord(each) * 2654435761 for index, each in enumerate(name)) % 2**32


def write_folder(
    folder: Path, drawings: Iterable[tuple[str | None, bytes]]
) -> list[tuple[str, str]]:
    """Write a folder of each kind; return path below it and kind ("" for none)."""
    rows = []
    for number, (kind, data) in enumerate(drawings):
        path = folder / (kind or "none") / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(data)).convert("RGB").save(path)
        rows.append((str(path.relative_to(folder)), kind or ""))
    return rows


def write_table(path: Path, rows: Iterable[Iterable[object]], header: Iterable[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path
