"""A CSV or JSONL file of image paths and captions in, (image, caption) pairs out."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from clip_rt.errors import InputError
from training.data.pairs import (
    MAX_JSON_BYTES,
    BadSampleError,
    Pair,
    Skips,
    Strings,
    check_caption,
    parse_object,
)

DELIMITER_BY_SUFFIX = {".csv": ",", ".tsv": "\t"}


class Table:
    """Pairs listed in a table; images are read when they are asked for.

    Captions and paths are kept in memory, in one block that worker processes share.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        allow_outside: bool = False,
    ) -> None:
        """Read a table.

        Args:
            path: .csv or .tsv with a line of column names, or .jsonl with an object a line. UTF-8.
            image_column: Where the image's path is, relative to the folder of the table.
            caption_column: Where the caption is.
            allow_outside: Whether paths may lead out of that folder, links included.

        Raises:
            InputError: the table cannot be read, lacks a column, or holds no usable row.
        """
        self.path = Path(path)
        self.folder = self.path.parent
        self.skips = Skips()
        self._allow_outside = allow_outside
        columns = image_column, caption_column
        is_jsonl = self.path.suffix in (".jsonl", ".ndjson")
        if not is_jsonl and self.path.suffix not in DELIMITER_BY_SUFFIX:
            raise InputError(f"{self.path} is no .csv, .tsv or .jsonl. Name it for what it is.")
        images, captions = [], []
        try:
            with self.path.open("rb") as file:
                rows = self._read_jsonl if is_jsonl else self._read_csv
                for place, image, caption in rows(file, *columns):
                    try:
                        captions.append(check_caption(caption, place))
                        images.append(_check_path(image, place))
                    except BadSampleError as error:
                        del captions[len(images) :]
                        self.skips.add(error.reason, error.example)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}.") from error
        if not images:
            raise InputError(
                f"{self.path} holds no row with {image_column!r} and {caption_column!r}. "
                f"Left out: {self.skips}."
            )
        self._images = Strings(images)
        self._captions = Strings(captions)

    def _read_jsonl(
        self, file: IO[bytes], image_column: str, caption_column: str
    ) -> Iterator[tuple[str, object, object]]:
        for place, line in self._lines(file):
            try:
                if line.strip():
                    row = parse_object(line, place)
                    yield place, row.get(image_column), row.get(caption_column)
            except BadSampleError as error:
                self.skips.add(error.reason, error.example)

    def _read_csv(
        self, file: IO[bytes], image_column: str, caption_column: str
    ) -> Iterator[tuple[str, object, object]]:
        text = (line.decode("utf-8", "replace") for _, line in self._lines(file))
        rows = csv.DictReader(text, delimiter=DELIMITER_BY_SUFFIX[self.path.suffix])
        missing = {image_column, caption_column} - set(rows.fieldnames or ())
        if missing:
            raise InputError(
                f"{self.path} has no column {', '.join(map(repr, sorted(missing)))} but "
                f"{', '.join(map(repr, rows.fieldnames or ()))[:200]}. Name the columns."
            )
        while True:
            try:
                row = next(rows, None)
            # A field over csv's limit, mostly a quote that never ends.
            except csv.Error as error:
                self.skips.add(f"damaged row: {error}", f"{self.path}, line {rows.line_num}")
                continue
            if row is None:
                return
            place = f"{self.path}, line {rows.line_num}"
            yield place, row[image_column], row[caption_column]

    def _lines(self, file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
        """Yield lines of bounded length with their places; skip the others."""
        number = 0
        while line := file.readline(MAX_JSON_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            place = f"{self.path}, line {number}"
            if len(line) <= MAX_JSON_BYTES:
                yield place, line
                continue
            self.skips.add("line too long", place)
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_JSON_BYTES)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Pair:
        name = self._images[index]
        image = resolve(self.folder, name, allow_outside=self._allow_outside)
        return Pair(image, (self._captions[index],), f"{self.path}, {name!r}")


def resolve(folder: Path, name: str, *, allow_outside: bool) -> Path:
    """Find a file by a name that someone else wrote.

    Raises:
        BadSampleError: it leads out of the folder and that is not allowed.
    """
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))
    if not allow_outside and os.path.commonpath((root, path)) != root:
        raise BadSampleError("path leaves its folder (allow_outside permits it)", repr(name))
    return Path(path)


def _check_path(name: object, place: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise BadSampleError("no image", place)
    if "\0" in name or len(name) > 4096:
        raise BadSampleError("no usable path", place)
    return name
