"""Tables of images and captions, CSV or Parquet, a row at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clip_rt.errors import InputError

DELIMITER_BY_SUFFIX = {".csv": ",", ".tsv": "\t"}
PARQUET_SUFFIX = ".parquet"
TABLE_SUFFIXES = (*DELIMITER_BY_SUFFIX, PARQUET_SUFFIX)
ROWS = 4096
"""Read of a Parquet file at a time."""


def is_table(name: str) -> bool:
    """Say whether a file is named as a table, in letters of any case."""
    return name.lower().endswith(TABLE_SUFFIXES)


def read_columns(
    path: Path, columns: Sequence[str], *, optional: Sequence[str] = ()
) -> Iterator[tuple[str | None, ...]]:
    """Yield the cells of some columns, row by row; None where there is nothing, lists as JSON.

    Args:
        path: .csv or .tsv in UTF-8 with a line of column names, or .parquet.
        columns: That the table must have.
        optional: That it may have.

    Raises:
        InputError: it cannot be read, or lacks a column.
    """
    read = _read_parquet if path.suffix.lower() == PARQUET_SUFFIX else _read_csv
    try:
        yield from read(path, columns, optional)
    except (OSError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as a table: {error}.") from error


def _read_csv(
    path: Path, columns: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[str | None, ...]]:
    delimiter = DELIMITER_BY_SUFFIX[path.suffix.lower()]
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        _check_columns(path, rows.fieldnames or (), columns)
        for row in rows:
            yield tuple(row.get(each) or None for each in (*columns, *optional))


def _read_parquet(
    path: Path, columns: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[str | None, ...]]:
    with pq.ParquetFile(path) as file:
        there = file.schema_arrow.names
        _check_columns(path, there, columns)
        wanted = [each for each in (*columns, *optional) if each in there]
        for batch in file.iter_batches(ROWS, columns=wanted):
            cells = [
                batch.column(each).to_pylist() if each in there else [None] * batch.num_rows
                for each in (*columns, *optional)
            ]
            for row in zip(*cells, strict=True):
                yield tuple(map(_make_text, row))


def _make_text(cell: object) -> str | None:
    if isinstance(cell, list):
        return json.dumps(cell)
    return None if cell is None or cell == "" else str(cell)


def _check_columns(path: Path, there: Sequence[str], wanted: Sequence[str]) -> None:
    for each in wanted:
        if each not in there:
            raise InputError(
                f"{path} has no column {each!r}; it has {', '.join(map(repr, there))[:200]}. "
                "Name the one that is meant with --image-column, --label-column, --group or "
                "--text-column."
            )
