"""What goes into a call, written to a file for the process of a contender, and read back there.

Pixels are one .npy; the others a folder with the encoded files and a JSON of the strings. Nothing
of it is unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.findings import CallKind

STRINGS = "strings.json"


def save_items(path: Path, call: CallKind, items: Any) -> Path:
    """Write the items of a call, as `suites.cases.Case.items` has them.

    Args:
        path: To write to; a file or folder of this name must not be there yet.
        call: Which kind.
        items: Of that kind.

    Returns:
        What `read_items` reads.
    """
    if call == "pixels":
        path = path.with_name(f"{path.name}.npy")
        with path.open("xb") as file:
            np.save(file, np.asarray(items), allow_pickle=False)
        return path
    files, strings = {"jpegs": (items, []), "zero_shot": items}.get(call, ([], items))
    path.mkdir(parents=True)
    for index, encoded in enumerate(files):
        (path / f"{index:06}.image").write_bytes(encoded)
    (path / STRINGS).write_text(json.dumps(list(strings)), "utf-8")
    return path


def read_items(path: Path, call: CallKind) -> Any:
    """Read what `save_items` wrote; lists come back as lists."""
    if call == "pixels":
        return np.load(path, allow_pickle=False)
    files = [file.read_bytes() for file in sorted(path.glob("*.image"))]
    strings: list[str] = json.loads((path / STRINGS).read_text("utf-8"))
    return {"jpegs": files, "zero_shot": (files, strings)}.get(call, strings)


def count_items(call: CallKind, items: Any) -> int:
    """Return how many images, texts or classes there are."""
    return len(items[0]) if call == "zero_shot" else len(items)


def split_items(call: CallKind, items: Any, size: int) -> list[Any]:
    """Return the items in parts of `size`, without the rest that would be smaller.

    Raises:
        ValueError: there are fewer items than that.
    """
    num_parts = count_items(call, items) // size
    if num_parts < 1:
        raise ValueError(f"{count_items(call, items)} items are not enough for calls of {size}.")
    bounds = [slice(n * size, (n + 1) * size) for n in range(num_parts)]
    if call == "zero_shot":
        return [(items[0][bound], items[1]) for bound in bounds]
    return [items[bound] for bound in bounds]
