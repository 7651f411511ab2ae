"""Labelled images as people have them: a table with a column of labels, or a folder of each label.

Images are named only; nothing of them is read here but for `describe_data`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_rt.bulk.sources import ImageFile, find_named
from clip_rt.bulk.tables import TABLE_SUFFIXES, is_table, read_columns
from clip_rt.classification.open_set import NONE_OF_THESE
from clip_rt.errors import InputError
from clip_rt.moderation.policy import Data

NONE_NAMES = ("none", NONE_OF_THESE)
"""Folders, and cells of tables, that say that no label fits."""


@dataclass(frozen=True)
class Example:
    """An image, and what it shows."""

    image: ImageFile
    labels: frozenset[str] = frozenset()
    """Names of labels; none where none fits."""
    group: str | None = None
    """What it is compared by."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What a table calls its columns."""

    image: str = "image"
    label: str | None = "label"
    """None reads no labels."""
    group: str | None = None
    """None reads no groups."""


def read_examples(
    source: Path, labels: Sequence[str], columns: Columns, *, others_are_none: bool = False
) -> list[Example]:
    """Read what images show.

    Args:
        source: A table (.csv, .tsv, .parquet) with an image and a label in each row; an image that
            several labels fit is in several rows, or has a list of them, in JSON or Parquet's. Or a
            folder with a folder of images for each label. An empty cell, and a folder "none", are
            of images that no label fits.
        labels: Names that may occur.
        columns: Of the table.
        others_are_none: Whether an image with another label shows none of these; refused otherwise.

    Returns:
        Each image once, in order.

    Raises:
        InputError: it cannot be read, holds no image, or a label that is not among `labels`.
    """
    if source.is_dir():
        if columns.group is not None:
            raise InputError(f"{source} is a folder; groups need a table, with a column of them.")
        rows = _read_folder(source)
    elif is_table(source.name):
        rows = _read_table(source, columns)
    else:
        raise InputError(
            f"{str(source)!r:.200} is neither a folder nor a table ({', '.join(TABLE_SUFFIXES)})."
        )
    known = set(labels)
    found: dict[str, Example] = {}
    for place, image, names, group in rows:
        unknown = [name for name in names if name not in known and name not in NONE_NAMES]
        if unknown and not others_are_none:
            raise InputError(
                f"{place} has the label {unknown[0]!r:.80}, which is none of "
                f"{', '.join(map(repr, labels))[:200]}. Correct it, or pass --others-are-none "
                "where images with other labels show none of these."
            )
        before = found.get(image.name, Example(image, group=group))
        if before.group != group:
            raise InputError(f"{place} has the group {group!r:.80}, and before {before.group!r}.")
        found[image.name] = Example(image, before.labels | (known & set(names)), group)
    if not found:
        raise InputError(f"{source} names no image.")
    return list(found.values())


Row = tuple[str, ImageFile, Sequence[str], str | None]
"""Place for errors, image, labels, group."""


def _read_folder(folder: Path) -> Iterator[Row]:
    for inner in sorted(each for each in folder.iterdir() if each.is_dir()):
        if inner.name.startswith("."):
            continue
        # Folders often have underscores for spaces.
        name = inner.name.replace("_", " ")
        for image in find_named(str(inner)):
            yield f"the folder {inner}", image, [name], None


def _read_table(path: Path, columns: Columns) -> Iterator[Row]:
    wanted = [columns.image, *filter(None, (columns.label, columns.group))]
    for number, cells in enumerate(read_columns(path, wanted), start=1):
        place = f"row {number} of {path}"
        name, *rest = cells
        if name is None:
            raise InputError(f"{place} names no image in the column {columns.image!r}.")
        names = _split(rest.pop(0), place) if columns.label is not None else []
        group = rest.pop(0) if columns.group is not None else None
        yield place, ImageFile(path.parent / name), names, group


def _split(cell: str | None, place: str) -> list[str]:
    """Return the labels of a cell: one, none, or a list in JSON."""
    if cell is None or not cell.strip():
        return []
    if not cell.lstrip().startswith("["):
        return [cell.strip()]
    try:
        names = json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: its labels are no JSON list: {error}.") from error
    if not all(isinstance(each, str) for each in names):
        raise InputError(f"{place}: its labels are {cell!r:.80}; they must be a list of texts.")
    return [each.strip() for each in names]


def describe_data(examples: Iterable[Example]) -> Data:
    """Return what a policy remembers of the images it was fitted on.

    Args:
        examples: Whose files can be read.

    Raises:
        OSError: one cannot.
    """
    digest = hashlib.sha256()
    num_images = size_bytes = 0
    for example in examples:
        content = example.image.read()
        size_bytes += len(content)
        num_images += 1
        digest.update(hashlib.sha256(content).digest())
        digest.update(json.dumps(sorted(example.labels)).encode())
    return Data(sha256=digest.hexdigest(), size_bytes=size_bytes, num_images=num_images)
