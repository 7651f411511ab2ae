"""A CSV or JSONL file of image paths, captions and labels in, (image, caption) pairs out."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from clip_rt.errors import InputError
from clip_rt.inputs.prompts import fill, find_templates
from training.data.pairs import (
    MAX_JSON_BYTES,
    BadSampleError,
    Pair,
    Skips,
    Strings,
    check_caption,
    check_captions,
    parse_object,
)

DELIMITER_BY_SUFFIX = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (*DELIMITER_BY_SUFFIX, ".jsonl", ".ndjson")
Row = Mapping[str, object]
"""A row's cells by column: text in a CSV, any JSON in JSONL."""


class Table:
    """Pairs listed in a table; images are read when they are asked for.

    Captions and paths are kept in memory, in one block that worker processes share.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        templates: str | Iterable[str] | None = None,
        image_column: str = "image",
        caption_column: str = "caption",
        label_column: str = "label",
        allow_outside: bool = False,
    ) -> None:
        """Read a table.

        Args:
            path: .csv or .tsv with a line of column names, or .jsonl with an object a line. UTF-8.
            templates: Captions of rows that have a label only; as in `clip_rt.inputs.prompts`.
            image_column: Where the image's path is, relative to the folder of the table.
            caption_column: Where the caption is; in JSONL, perhaps a list of several.
            label_column: Where the class of the image is, which may be missing.
            allow_outside: Whether paths may lead out of that folder, links included.

        Raises:
            InputError: the table cannot be read, lacks a column, or holds no usable row.
            TemplateError: the templates are none.
        """
        self.path = Path(path)
        self.folder = self.path.parent
        self.skips = Skips()
        self._allow_outside = allow_outside
        self._templates = find_templates(templates)
        images, captions, numbers = [], [], []
        number_by_label: dict[str, int] = {}
        columns: list[str] = []
        for place, row in read_rows(self.path, self.skips):
            columns = columns or list(row)
            caption = row.get(caption_column)
            try:
                image = check_path(row.get(image_column), place)
                label = read_label(row.get(label_column), place)
                texts = () if label and caption in (None, "") else check_captions(caption, place)
            except BadSampleError as error:
                self.skips.add(error.reason, error.example)
                continue
            images.append(image)
            captions.append(_BETWEEN.join(texts))
            numbers.append(number_by_label.setdefault(label or "", len(number_by_label)))
        if not images:
            raise InputError(
                f"{self.path} holds no row with {image_column!r} and {caption_column!r} or "
                f"{label_column!r}; its columns are {', '.join(map(repr, columns))[:200]}. Left "
                f"out: {self.skips}."
            )
        self._images = Strings(images)
        self._captions = Strings(captions)
        self._labels = list(number_by_label)
        self._label = np.array(numbers, np.int32)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Pair:
        name = self._images[index]
        image = resolve(self.folder, name, allow_outside=self._allow_outside)
        label = self._labels[self._label[index]]
        texts = self._captions[index]
        captions = tuple(texts.split(_BETWEEN)) if texts else ()
        captions = captions or tuple(fill(template, label) for template in self._templates)
        return Pair(image, captions, f"{self.path}, {name!r}", label or None)


_BETWEEN = "\0"
"""Between the captions of one row; none holds it."""


def is_table(path: Path) -> bool:
    """Say whether a file is named as a table, in letters of any case."""
    return path.suffix.lower() in TABLE_SUFFIXES


def read_rows(path: Path, skips: Skips) -> Iterator[tuple[str, Row]]:
    """Yield place and cells of each row of a table; what is damaged is counted in `skips`.

    Raises:
        InputError: its name has none of `TABLE_SUFFIXES`, or it cannot be read.
    """
    if not is_table(path):
        raise InputError(f"{path} is no .csv, .tsv or .jsonl. Name it for what it is.")
    read = _read_csv if path.suffix.lower() in DELIMITER_BY_SUFFIX else _read_jsonl
    try:
        with path.open("rb") as file:
            yield from read(file, path, skips)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _read_jsonl(file: IO[bytes], path: Path, skips: Skips) -> Iterator[tuple[str, Row]]:
    for place, line in _lines(file, path, skips):
        try:
            if line.strip():
                yield place, parse_object(line, place)
        except BadSampleError as error:
            skips.add(error.reason, error.example)


def _read_csv(file: IO[bytes], path: Path, skips: Skips) -> Iterator[tuple[str, Row]]:
    text = (line.decode("utf-8", "surrogateescape") for _, line in _lines(file, path, skips))
    rows = csv.DictReader(text, delimiter=DELIMITER_BY_SUFFIX[path.suffix.lower()])
    while True:
        try:
            row = next(rows, None)
        # A field over csv's limit, mostly a quote that never ends.
        except csv.Error as error:
            skips.add(f"damaged row: {error}", f"{path}, line {rows.line_num}")
            continue
        if row is None:
            return
        row.pop(None, None)  # Cells beyond the last column
        yield f"{path}, line {rows.line_num}", row


def _lines(file: IO[bytes], path: Path, skips: Skips) -> Iterator[tuple[str, bytes]]:
    """Yield lines of bounded length with their places; skip the others."""
    number = 0
    while line := file.readline(MAX_JSON_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        place = f"{path}, line {number}"
        if len(line) <= MAX_JSON_BYTES:
            yield place, line
            continue
        skips.add("line too long", place)
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_JSON_BYTES)


def resolve(folder: Path, name: str, *, allow_outside: bool) -> Path:
    """Find a file by a name that someone else wrote.

    Raises:
        BadSampleError: it leads out of the folder and that is not allowed.
    """
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))
    if not (allow_outside or _is_within(path, root) or _is_blob_of(path, root, name)):
        raise BadSampleError("path leaves its folder (--allow-outside permits it)", repr(name))
    return Path(path)


def _is_within(path: str, root: str) -> bool:
    return os.path.commonpath((root, path)) == root


def _is_blob_of(path: str, root: str, name: str) -> bool:
    """Say whether a file of a snapshot in the hub's cache is a link to a blob of its repository.

    `snapshot_download` keeps contents in `blobs` and links to them from `snapshots/<commit>`. Only
    a name within the folder may lead there, and only by its own link.
    """
    link = os.path.normpath(os.path.join(root, name))
    if not _is_within(link, root) or not os.path.islink(link):
        return False
    for place in (root, *map(str, Path(root).parents)):
        parent, snapshots = os.path.split(os.path.dirname(place))
        if snapshots == "snapshots":
            return os.path.dirname(path) == os.path.join(parent, "blobs")
    return False


def read_label(label: object, place: str) -> str | None:
    """Return the class that a cell names, by text or number; None if it is empty.

    Raises:
        BadSampleError: it holds something else.
    """
    if isinstance(label, int) and not isinstance(label, bool):
        return str(label)
    return None if label in (None, "") else check_caption(label, place)


def check_path(name: object, place: str) -> str:
    """Return `name` if it can be a path.

    Raises:
        BadSampleError: it is missing, holds a NUL, or is too long.
    """
    if not isinstance(name, str) or not name.strip():
        raise BadSampleError("no image", place)
    if "\0" in name or len(name) > 4096:
        raise BadSampleError("no usable path", place)
    return name
