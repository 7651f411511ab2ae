"""Partitions: embeddings of neighbouring items with what is known of them, as Parquet or NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clip_rt.bulk.listing import Item

Format: TypeAlias = Literal["parquet", "npy"]
Dtype: TypeAlias = Literal["float32", "float16"]
Kind: TypeAlias = Literal["image", "text"]
"""What a job embeds."""

EMBEDDINGS, ITEMS, ERRORS = "embeddings", "items", "errors"
"""Folders of partitions: the embeddings, what belongs to each row of an .npy, what went wrong."""
SUFFIX_BY_FORMAT: Mapping[Format, str] = {"parquet": ".parquet", "npy": ".npy"}
ARROW_BY_DTYPE = {"float32": pa.float32(), "float16": pa.float16()}

_IMAGE_FIELDS = [
    ("index", pa.int64()),
    ("path", pa.string()),
    ("sha256", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("caption", pa.string()),
]
_TEXT_FIELDS = [("index", pa.int64()), ("text", pa.string())]
FIELDS_BY_KIND: Mapping[Kind, Sequence[tuple[str, pa.DataType]]] = {
    "image": _IMAGE_FIELDS,
    "text": _TEXT_FIELDS,
}
"""Columns of an embedding's row, but for the embedding."""
_ERROR_FIELDS = [("error", pa.string()), ("message", pa.string())]


@dataclass(frozen=True)
class Row:
    """What came of an item."""

    item: Item
    embedding: NDArray[np.float32] | None = None
    """float32 (D,); None for an item that could not be embedded."""
    sha256: str | None = None
    """Of the encoded image, hexadecimal."""
    width: int | None = None
    height: int | None = None
    """As the image is stored, before its EXIF orientation turns it."""
    error: str = ""
    """Name of the error's type."""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How partitions of a job are written."""

    kind: Kind
    format: Format
    dtype: Dtype
    embedding_dim: int
    facts: Mapping[str, str]
    """Of the model: metadata of each Parquet file."""

    @property
    def suffix(self) -> str:
        """Of the files of embeddings."""
        return SUFFIX_BY_FORMAT[self.format]

    def write_embeddings(self, rows: Sequence[Row], path: Path) -> None:
        """Write the embeddings; Parquet has all of the items' columns too."""
        matrix = np.empty((len(rows), self.embedding_dim), np.dtype(self.dtype))
        for number, row in enumerate(rows):
            matrix[number] = row.embedding
        if self.format == "npy":
            np.save(path, matrix, allow_pickle=False)
            return
        values = pa.array(matrix.ravel(), ARROW_BY_DTYPE[self.dtype])
        column = pa.FixedSizeListArray.from_arrays(values, self.embedding_dim)
        table = self._describe(rows).append_column("embedding", column)
        self._write(table, path)

    def write_items(self, rows: Sequence[Row], path: Path) -> None:
        """Write what belongs to the rows of an .npy, in the same order."""
        self._write(self._describe(rows), path)

    def write_errors(self, rows: Sequence[Row], path: Path) -> None:
        """Write the items that could not be embedded, with the reason."""
        table = self._describe(rows)
        for name, kind in _ERROR_FIELDS:
            column = pa.array([_printable(getattr(row, name)) for row in rows], kind)
            table = table.append_column(name, column)
        self._write(table, path)

    def _describe(self, rows: Sequence[Row]) -> pa.Table:
        if self.kind == "text":
            columns: list[list[object]] = [
                [row.item.index for row in rows],
                [_printable(row.item.text) for row in rows],
            ]
        else:
            columns = [
                [row.item.index for row in rows],
                [_printable(row.item.name) for row in rows],
                [row.sha256 for row in rows],
                [row.width for row in rows],
                [row.height for row in rows],
                [_printable(row.item.text) for row in rows],
            ]
        schema = pa.schema(FIELDS_BY_KIND[self.kind])
        arrays = [pa.array(column, each.type) for column, each in zip(columns, schema, strict=True)]
        return pa.Table.from_arrays(arrays, schema=schema)

    def _write(self, table: pa.Table, path: Path) -> None:
        metadata = {f"clip_rt.{key}": value for key, value in self.facts.items()}
        # Embeddings are as good as random: neither codec nor dictionary finds anything in them.
        others = [name for name in table.column_names if name != "embedding"]
        pq.write_table(
            table.replace_schema_metadata(metadata),
            path,
            compression={
                name: "zstd" if name in others else "none" for name in _leaves(table.schema)
            },
            use_dictionary=False,
            write_statistics=others,
        )


def _leaves(schema: pa.Schema) -> list[str]:
    """Return the columns as Parquet calls them."""
    return [
        f"{each.name}.list.element" if pa.types.is_fixed_size_list(each.type) else each.name
        for each in schema
    ]


def _printable(text: str | None) -> str | None:
    r"""Return text that can be stored as UTF-8: what a name has of other bytes becomes `\udcff`."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")
