"""Answers as a table for people, or as JSON lines, CSV or Parquet for programs."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tyro.conf import FlagCreatePairsOff

from clip_rt.errors import InputError

Row: TypeAlias = Mapping[str, Any]
"""Values by column: strings, numbers, and lists of them."""


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

    def write(self, rows: Iterable[Row], columns: Sequence[str]) -> None:
        """Write rows as they come; a table and a Parquet file when all are there.

        Args:
            rows: With all of the columns.
            columns: In order.

        Raises:
            InputError: what writes Parquet is not installed.
            OSError: nothing can be written.
        """
        if self.is_table:
            _write_table(rows, columns)
        elif self.csv:
            writer = csv.writer(sys.stdout)
            writer.writerow(columns)
            writer.writerows([row[column] for column in columns] for row in rows)
        elif self.parquet is not None:
            _write_parquet(rows, self.parquet)
        else:
            for row in rows:
                sys.stdout.write(json.dumps({key: row[key] for key in columns}) + "\n")


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
        table.add_row(*(_show(row[column]) for column in columns))
    Console(highlight=False, markup=False, emoji=False).print(table)


def _show(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _write_parquet(rows: Iterable[Row], path: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError(
            f"Parquet needs {error.name}: pip install 'clip-rt[commands]', or take --json or --csv."
        ) from error
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
