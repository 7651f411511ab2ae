"""Answers as a table for people, or as JSON lines, CSV or Parquet for programs."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tyro.conf import FlagCreatePairsOff

from clip_rt.errors import InputError

if TYPE_CHECKING:
    import pyarrow

Row: TypeAlias = Mapping[str, Any]
"""Values by column: strings, numbers, None, and lists of them."""

ROWS_AT_ONCE = 10_000
"""Of a Parquet file, that are in memory together."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How answers are written. Without an option: a table on a terminal, else JSON lines.

    Raises:
        InputError: two options exclude each other.
    """

    json: FlagCreatePairsOff[bool] = False
    """One JSON object a line."""
    csv: FlagCreatePairsOff[bool] = False
    """Comma-separated values."""
    parquet: Path | None = None
    """A Parquet file to write."""

    def __post_init__(self) -> None:
        if self.json + self.csv + (self.parquet is not None) > 1:
            raise InputError("--json, --csv and --parquet exclude each other; name one.")

    @property
    def is_table(self) -> bool:
        """Whether people read it."""
        is_named = self.json or self.csv or self.parquet is not None
        return not is_named and sys.stdout.isatty()

    def write(
        self, rows: Iterable[Row], columns: Sequence[str], *, numbers: Collection[str] = ()
    ) -> None:
        """Write rows as they come; a table when all are there, Parquet some thousands at a time.

        A Parquet file is there when it is whole, and not before.

        Args:
            rows: With all of the columns.
            columns: In order.
            numbers: Columns of numbers that may be None in many rows: Parquet has types.

        Raises:
            InputError: what writes a table or Parquet is not installed; no row was asked for.
            OSError: nothing can be written.
        """
        if self.is_table:
            _write_table(rows, columns)
        elif self.csv:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            source = iter(rows)
            # After the first row is there: an error before it leaves no header behind.
            first = list(islice(source, 1))
            writer.writerow(columns)
            for row in chain(first, source):
                writer.writerow([row[column] for column in columns])
                sys.stdout.flush()
        elif self.parquet is not None:
            _write_parquet(iter(rows), columns, numbers, self.parquet)
        else:
            for row in rows:
                sys.stdout.write(json.dumps({key: row[key] for key in columns}) + "\n")
                # Whoever reads the pipe waits for it.
                sys.stdout.flush()


def _write_table(rows: Iterable[Row], columns: Sequence[str]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise InputError(
            f"a table needs {error.name}: pip install 'clip-rt[commands]', or take --json or --csv."
        ) from error
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(show(row[column]) for column in columns))
    Console(highlight=False, markup=False, emoji=False).print(table)


def show(value: object) -> str:
    """Return a value as people read it, without what would command a terminal."""
    if value is None:
        return ""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def _write_parquet(
    rows: Iterator[Row], columns: Sequence[str], numbers: Collection[str], path: Path
) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError(
            f"Parquet needs {error.name}: pip install 'clip-rt[commands]', or take --json or --csv."
        ) from error
    unfinished = path.with_name(path.name + ".unfinished")
    chunk = _take(rows, columns)
    schema = _find_schema(pyarrow.Table.from_pylist(chunk), columns, numbers)
    try:
        with pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
            while chunk:
                writer.write_table(pyarrow.Table.from_pylist(chunk, schema))
                chunk = _take(rows, columns)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _take(rows: Iterator[Row], columns: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {column: _make_text(row[column]) for column in columns}
        for row in islice(rows, ROWS_AT_ONCE)
    ]


def _make_text(value: object) -> object:
    """Return a name of a file that is no text as text; Parquet's strings are UTF-8."""
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _find_schema(
    table: pyarrow.Table, columns: Sequence[str], numbers: Collection[str]
) -> pyarrow.Schema:
    """Return the types of the columns; one without a value so far is of strings, as errors are."""
    import pyarrow

    found = {field.name: field.type for field in table.schema if field.type != pyarrow.null()}
    found |= dict.fromkeys(numbers, pyarrow.float64())
    return pyarrow.schema([(each, found.get(each, pyarrow.string())) for each in columns])
