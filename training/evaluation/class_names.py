"""Class ids of a data set in, the words to ask for out: names, templates, ImageNet's layouts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_rt.errors import InputError
from clip_rt.inputs.prompts import find_templates, template_names

IMAGENET_CLASSES = 1000
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class NameTable:
    """What classes are called: by id, or in the order of their ids."""

    by_id: dict[str, str]
    """Empty where the file has names only."""
    in_order: tuple[str, ...]
    """Where the file has ids, in the order of the ids: number i of ImageNet is the i-th wnid."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Every class the table knows."""
        return tuple(self.by_id) or tuple(map(str, range(len(self.in_order))))


def read_name_table(path: Path) -> NameTable:
    """Read class names from a file.

    Args:
        path: `.json`: an object {id: name}, or a list of names in the order of the class numbers.
            Any other: text, one name a line in that order, or an id, a tab and a name a line.

    Raises:
        InputError: unreadable, empty, an id twice, or lines of both kinds.
    """
    rows: list[tuple[Any, ...]]
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(text)
            if not isinstance(content, (dict, list)):
                raise ValueError("it is neither an object nor a list")
            rows = list(content.items()) if isinstance(content, dict) else [(n,) for n in content]
        else:
            rows = [tuple(line.split("\t", 1)) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"the class names {str(path)!r} cannot be read: {error}.") from error
    if not rows or len({len(row) for row in rows}) != 1:
        raise InputError(
            f"the class names {str(path)!r} need one form for every line: a name, or an id, a tab "
            "and a name."
        )
    for number, row in enumerate(rows, start=1):
        if not all(isinstance(cell, str) and cell.strip() for cell in row):
            raise InputError(f"class {number} of {str(path)!r} has no name.")
    if len(rows[0]) == 1:
        return NameTable({}, tuple(row[0].strip() for row in rows))
    by_id = {row[0].strip(): row[1].strip() for row in rows}
    if len(by_id) != len(rows):
        raise InputError(f"the class names {str(path)!r} have an id twice.")
    ids = sort_ids(list(by_id))
    return NameTable({key: by_id[key] for key in ids}, tuple(by_id[key] for key in ids))


def sort_ids(ids: Sequence[str]) -> list[str]:
    """Sort class ids, numbers by value."""
    if all(each.isdecimal() for each in ids):
        return sorted(ids, key=int)
    return sorted(ids)


def describe_layout(ids: Sequence[str]) -> str:
    """Say which known layout the ids of the classes have."""
    if all(_WNID.fullmatch(each) for each in ids):
        if len(ids) == IMAGENET_CLASSES:
            return "ImageNet (1000 wnids, as its validation set and Sketch)"
        return f"{len(ids)} wnids of ImageNet (as R, with 200)"
    if all(each.isdecimal() for each in ids):
        if len(ids) == IMAGENET_CLASSES:
            return "numbers 0 to 999 (as ImageNet-V2)"
        return f"{len(ids)} class numbers"
    return f"{len(ids)} named classes"


def name_classes(ids: Sequence[str], table: NameTable | None) -> list[str]:
    """Find the name of each class.

    Args:
        ids: Folder names, wnids or numbers.
        table: Without one, a folder's name is its class's, underscores read as spaces.

    Raises:
        InputError: wnids or numbers without a table, or an id the table lacks.
    """
    is_number = all(each.isdecimal() for each in ids)
    if table is None:
        if is_number or any(_WNID.fullmatch(each) for each in ids):
            raise InputError(
                f"the classes are {ids[0]}, {ids[-1]} and the like, which say nothing. Pass "
                "--class-names FILE: a wnid, a tab and a name a line, or the names in the order "
                "of their numbers."
            )
        return [each.replace("_", " ") for each in ids]
    if all(each in table.by_id for each in ids):
        return [table.by_id[each] for each in ids]
    # Names alone are in the order of the numbers, and so are ImageNet's wnids with their names.
    if is_number and all(_WNID.fullmatch(each) for each in table.by_id):
        found = dict(zip(map(str, range(len(table.in_order))), table.in_order, strict=True))
    elif not table.by_id and len(table.in_order) == len(ids) and not is_number:
        found = dict(zip(ids, table.in_order, strict=True))
    else:
        found = table.by_id
    missing = [each for each in ids if each not in found]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(ids)} classes have no name among the {len(table.in_order)} of "
            f"--class-names, the first is {missing[0]!r}."
        )
    return [found[each] for each in ids]


def read_templates(name_or_path: str) -> tuple[str, ...]:
    """Find a named template set, or read templates from a file with one a line.

    Raises:
        TemplateError: no set and no file has that name, or a template cannot be used.
    """
    path = Path(name_or_path)
    if name_or_path not in template_names() and path.is_file():
        return find_templates(path.read_text(encoding="utf-8").splitlines())
    return find_templates(name_or_path)
