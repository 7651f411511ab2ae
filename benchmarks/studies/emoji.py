"""Emoji drawings in, the kind of thing each shows out: animals, tools, arrows and so on.

The kinds are Unicode's subgroups of emoji; `emoji_subgroups.json` has them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data.drawing_batches import Drawings, load_drawings

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT_DIR = ROOT / "training/sample"
STYLES_DIR = HELD_OUT_DIR / "styles"
_TABLE = Path(__file__).with_name("emoji_subgroups.json")


def load(path: Path) -> Drawings:
    """Read one shard."""
    return load_drawings([path], progress=False)


def load_style(name: str) -> Drawings:
    """Read a drawing style that is held out of training; it comes with the code."""
    return load(STYLES_DIR / f"{name}.tar")


def names(drawings: Drawings) -> list[str]:
    """Return what each drawing is called."""
    return [record["name"] for record in drawings.records]


def kind_by_hexcode() -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the names of the kinds, and the index of the kind of each emoji that has one."""
    order = [record["emoji"] for record in load_style("openmoji").records]
    rows = json.loads(_TABLE.read_text(encoding="utf-8"))["subgroups"]
    kinds: dict[str, int] = {}
    for index, row in enumerate(rows):
        members = order[order.index(row["first"]) : order.index(row["last"]) + 1]
        kinds |= dict.fromkeys(members, index)
    return tuple(row["name"] for row in rows), kinds


def with_kinds(drawings: Drawings) -> tuple[Drawings, NDArray[np.int64]]:
    """Keep the drawings whose emoji has a kind; return them and the index of each one's kind."""
    _, kinds = kind_by_hexcode()
    rows = [i for i, record in enumerate(drawings.records) if record["emoji"] in kinds]
    records = [drawings.records[row] for row in rows]
    right_N = np.array([kinds[record["emoji"]] for record in records], np.int64)
    return Drawings(drawings.pixels[rows], records), right_N
