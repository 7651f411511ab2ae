"""What a bulk job embeds, in order: found once, kept in a file, read again from any row on.

The listing makes a job independent of what happens to its inputs later: files that come or go, and
names on stdin, which can be read once.
"""

from __future__ import annotations

import glob
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clip_rt.bulk.sources import (
    STDIN,
    ImageFile,
    check_name,
    find_named,
    read_listed,
    sort_names,
)
from clip_rt.bulk.tables import is_table, read_columns
from clip_rt.errors import InputError
from clip_rt.inputs.fetching import is_url

ROW_GROUP = 16_384
"""Items that are read and written at a time."""


@dataclass(frozen=True)
class Item:
    """An image or a text that is to be embedded."""

    index: int
    """Its position among all inputs, those of other shards included."""
    path: str = ""
    """Of the file, or of the shard that holds it, or the URL; empty for a text."""
    member: str = ""
    offset_bytes: int = 0
    size_bytes: int = -1
    modified_ns: int = 0
    """See `ImageFile`."""
    text: str | None = None
    """The text itself, or the caption of an image."""
    problem: str = ""
    """Why it cannot be embedded, where that was seen when it was found."""

    @property
    def name(self) -> str:
        """What it is called in results: a path, `shard.tar/member`, a URL, or the text itself."""
        if not self.path:
            return self.text or ""
        return f"{self.path}/{self.member}" if self.member else self.path

    @property
    def file(self) -> ImageFile:
        """Where an image lies that is no URL."""
        return ImageFile(
            Path(self.path),
            self.member,
            self.offset_bytes,
            self.size_bytes,
            self.modified_ns,
            problem=self.problem,
        )


_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        # Names are bytes to the system, and need not be UTF-8.
        ("path", pa.binary()),
        ("member", pa.binary()),
        ("offset_bytes", pa.int64()),
        ("size_bytes", pa.int64()),
        ("modified_ns", pa.int64()),
        ("text", pa.binary()),
        ("problem", pa.binary()),
    ]
)
assert _SCHEMA.names == [each.name for each in fields(Item)]
_values_of = attrgetter(*_SCHEMA.names)


def find_image_items(
    inputs: Iterable[str], *, image_column: str, caption_column: str
) -> Iterator[Item]:
    """Yield the images that inputs mean, in order, in memory that does not grow.

    Args:
        inputs: As `find_images` takes them; also URLs, and tables, whose relative paths begin at
            the table's folder.
        image_column: Of paths or URLs in tables.
        caption_column: Of captions, which a table may lack.

    Raises:
        InputError: an input means nothing that is there, or a table cannot be read.
    """
    index = 0
    for name in _expand(inputs):
        if is_url(name):
            items: Iterable[Item] = [Item(index, name)]
        elif is_table(name):
            items = _find_in_table(Path(name), index, image_column, caption_column)
        else:
            items = (
                Item(
                    number,
                    str(each.path),
                    each.member,
                    each.offset_bytes,
                    each.size_bytes,
                    each.modified_ns,
                    each.caption,
                    each.problem,
                )
                for number, each in enumerate(find_named(name), index)
            )
        for item in items:
            yield item
            index += 1


def find_text_items(inputs: Iterable[str], *, text_column: str) -> Iterator[Item]:
    """Yield the texts of files, one a line, or a row of a table; empty lines are left out.

    Args:
        inputs: Text files in UTF-8, tables, patterns of tables, and "-" for lines on stdin.
        text_column: Of tables.

    Raises:
        InputError: a file cannot be read, or lacks the column.
    """
    index = 0
    for name in inputs:
        for each in [name] if name == STDIN else _expand([name]):
            for text in _read_texts(each, text_column):
                yield Item(index, text=text)
                index += 1


def in_shard(items: Iterable[Item], shard: tuple[int, int]) -> Iterator[Item]:
    """Yield the items that one of `shard[1]` shards has, wherever they stand in the order."""
    number, of = shard
    for item in items:
        digest = hashlib.blake2b(_encode(item.name), digest_size=8).digest()
        if int.from_bytes(digest, "big") % of == number:
            yield item


def write(path: Path, items: Iterable[Item], on_group: Callable[[int], None]) -> None:
    """Write a listing, a row group at a time.

    Args:
        path: Of a file to write.
        items: All of them.
        on_group: Called with the number of items so far; what it raises ends the listing.
    """
    columns: list[list[object]] = [[] for _ in _SCHEMA]
    num_items = 0

    def flush() -> None:
        arrays = [
            pa.array(column, each.type) for column, each in zip(columns, _SCHEMA, strict=True)
        ]
        writer.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA), row_group_size=ROW_GROUP)
        for column in columns:
            column.clear()
        on_group(num_items)

    with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        for item in items:
            for column, value in zip(columns, _values_of(item), strict=True):
                column.append(_encode(value) if isinstance(value, str) else value)
            num_items += 1
            if num_items % ROW_GROUP == 0:
                flush()
        flush()


class Listing:
    """The items of a job, read from its file.

    Args:
        path: What `write` wrote.

    Raises:
        InputError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"{path} cannot be read: {error}. Remove the folder and begin anew."
            ) from error

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def items(self, start: int, end: int) -> Iterator[Item]:
        """Yield the items at positions `start` to `end`, without `end`."""
        first = 0
        for group in range(self._file.num_row_groups):
            num_rows = self._file.metadata.row_group(group).num_rows
            if first + num_rows > start and first < end:
                table = self._file.read_row_group(group)
                some = table.slice(
                    max(0, start - first), min(end, first + num_rows) - max(start, first)
                )
                columns = [column.to_pylist() for column in some.columns]
                for values in zip(*columns, strict=True):
                    yield Item(*map(_decode, values))
            first += num_rows


def _expand(inputs: Iterable[str], *, is_listed: bool = False) -> Iterator[str]:
    """Yield the names that are on stdin for "-", and those of tables for a pattern of tables.

    Raises:
        InputError: a name means nothing that is there, unless it is of a list: then it is an item
            that cannot be read.
    """
    for name in inputs:
        if name == STDIN and not is_listed:
            yield from _expand(read_listed(), is_listed=True)
        elif is_table(name) and not Path(name).is_file():
            is_any = False
            for each in sort_names(glob.iglob(name, recursive=True)):
                is_any = True
                yield each
            if not is_any:
                raise InputError(f"there is no table {name[:200]!r}.")
        else:
            if not (is_listed or is_url(name)):
                check_name(name)
            yield name


def _find_in_table(
    path: Path, index: int, image_column: str, caption_column: str
) -> Iterator[Item]:
    rows = read_columns(path, (image_column,), optional=(caption_column,))
    for number, (value, caption) in enumerate(rows):
        if value is None:
            problem = f"row {number} has no {image_column!r}"
            yield Item(index + number, str(path), problem=problem)
        elif is_url(value):
            yield Item(index + number, value, text=caption)
        else:
            yield Item(index + number, str(path.parent / value), text=caption)


def _read_texts(name: str, text_column: str) -> Iterator[str]:
    if is_table(name):
        texts = (text for (text,) in read_columns(Path(name), (text_column,)))
        yield from filter(None, texts)
    elif name == STDIN:
        yield from _lines(line.decode("utf-8", "replace") for line in sys.stdin.buffer)
    else:
        try:
            with open(name, encoding="utf-8-sig", errors="replace") as file:
                yield from _lines(file)
        except OSError as error:
            raise InputError(f"{name} cannot be read: {error.strerror}.") from error


def _lines(file: Iterable[str]) -> Iterator[str]:
    return filter(str.strip, (line.rstrip("\r\n") for line in file))


def _encode(text: str) -> bytes:
    """Return a name as bytes; undecodable ones of the system's are half characters in Python."""
    return text.encode("utf-8", "surrogatepass")


def _decode(value: Any) -> Any:
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value
