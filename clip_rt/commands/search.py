"""`clip-rt search`: images of an index by words, by image, or both; and near-duplicates."""

from __future__ import annotations

import datetime
import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from clip_rt.commands.connect import ModelOptions
from clip_rt.commands.output import OutputOptions
from clip_rt.commands.pictures import PictureOptions
from clip_rt.commands.sheet import Caption
from clip_rt.errors import InputError

if TYPE_CHECKING:
    from clip_rt.search.query import Query
    from clip_rt.search.results import Hit
    from clip_rt.search.where import Where

NUM_DIGITS = 6
COLUMNS = (
    "path",
    "score",
    "modified",
    "size_bytes",
    "width_px",
    "height_px",
    "sha256",
    "copies",
)
TABLE_COLUMNS = ("score", "path")
GROUP_COLUMNS = ("group", "path", "score", "size_bytes", "width_px", "height_px", "sha256")
GROUP_TABLE_COLUMNS = ("group", "score", "path")
_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is wanted, and among which files.

    Raises:
        InputError: an option cannot be used.
    """

    query: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="WORD")] = ()
    """Words, all together one text; of a file of an image, the image. A word that begins with a
    minus, or a "quoted text" after one, is not wanted: "beach -people"; \\- is a minus as such."""
    text: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Another text that is wanted, as it is."""
    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """An image that is wanted, whatever its name."""
    minus: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A text, as it is, or a file of an image that is not wanted."""
    duplicates: tyro.conf.FlagCreatePairsOff[bool] = False
    """List images that are nearly the same, in place of a search."""
    threshold: float | None = None
    """Smallest cosine of near-duplicates; 0.95 without it."""
    path: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only files of this pattern or below this folder."""
    after: str | None = None
    """Only files changed at this date or later: 2026-01-31, 2026-01-31T12:00."""
    before: str | None = None
    """Only files changed before this date."""
    min_size: str | None = None
    """Only files of so many bytes or more: 500000, 100K, 2M."""
    max_size: str | None = None
    """Only files of so many bytes or fewer."""
    min_side_px: int | None = None
    """Only images whose shortest side has so many pixels or more."""
    top: int = 10
    """How many images, or groups of duplicates, to show."""
    index: Path | None = None
    """Folder of the index. Without it: $CLIP_RT_INDEX, else ~/.local/share/clip_rt/index."""
    pictures: Annotated[PictureOptions, tyro.conf.arg(name="")]
    output: Annotated[OutputOptions, tyro.conf.arg(name="")]
    model: Annotated[ModelOptions, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        asked = self.query or self.text or self.image or self.minus
        if self.duplicates and asked:
            raise InputError("--duplicates searches for nothing; leave the words out.")
        if not self.duplicates and not asked:
            raise InputError('name what is wanted, such as "red car", or a file of an image.')
        if self.threshold is not None and not self.duplicates:
            raise InputError("--threshold is for --duplicates; name both.")
        if self.top < 1:
            raise InputError(f"--top is {self.top}; it must be 1 or more.")

    def read_query(self) -> Query:
        """Return what is asked for.

        Raises:
            InputError: nothing is wanted, or a file is not there.
        """
        from clip_rt.search.query import Query, split_words

        images = [each for each in self.query if _is_image(each)]
        words = " ".join(each for each in self.query if each not in images)
        wanted, unwanted = split_words(words)
        return Query(
            texts=(*filter(None, [wanted]), *self.text),
            images=(*images, *self.image),
            minus_texts=(*unwanted, *(each for each in self.minus if not _is_image(each))),
            minus_images=tuple(each for each in self.minus if _is_image(each)),
        )

    def where(self) -> Where:
        """Return which files are searched.

        Raises:
            InputError: a date or a size is none.
        """
        from clip_rt.search.where import Where

        return Where(
            paths=self.path,
            after=_read_date("--after", self.after),
            before=_read_date("--before", self.before),
            min_bytes=_read_size("--min-size", self.min_size),
            max_bytes=_read_size("--max-size", self.max_size),
            min_side_px=self.min_side_px,
        )


def search(config: Annotated[SearchConfig, tyro.conf.arg(name="")]) -> int:
    """Find images of an index by words, by an image, or both; or near-duplicates.

    Returns:
        The exit code.

    Raises:
        ClipRTError: see `Index.query` and `Index.duplicates`.
        OSError: the answers cannot be written.
    """
    # Only here: help needs none of it.
    from clip_rt.search.files import read_file
    from clip_rt.search.index import DUPLICATE_COSINE, Index

    where = config.where()
    query = None if config.duplicates else config.read_query()
    is_table = config.output.is_table
    title = "near-duplicates" if query is None else _title(config)
    with Index.open(config.index) as index, config.pictures.begin(title) as gallery:
        if query is None:
            threshold = DUPLICATE_COSINE if config.threshold is None else config.threshold
            groups = index.duplicates(threshold=threshold, where=where)[: config.top]
            rows = list(_group_rows(groups))
            columns: Sequence[str] = GROUP_TABLE_COLUMNS if is_table else GROUP_COLUMNS
            captions = [[f"group {row['group']}", f"{row['score']:.3f}"] for row in rows]
        else:
            with config.model.connect() as client:
                hits = index.query(client, query, top=config.top, where=where)
            rows = list(map(_row, hits))
            columns = TABLE_COLUMNS if is_table else COLUMNS
            captions = [[f"{row['score']:.3f}"] for row in rows]
        for row, lines in zip(rows, captions, strict=True):
            read = functools.partial(read_file, row["path"])
            gallery.add(row["path"], read, list(map(Caption, lines)))
        config.output.write(rows, columns)
    return 0


def _is_image(word: str) -> bool:
    """Whether a word is the file of an image.

    Raises:
        InputError: it is named as one, and there is none.
    """
    from clip_rt.bulk.sources import SUFFIXES

    if os.path.splitext(word)[1].lower() not in SUFFIXES:
        return False
    if os.path.isfile(word):
        return True
    if " " in word:
        return False
    raise InputError(f"there is no file {word[:200]!r}. To search for the word: --text {word[:80]}")


def _title(config: SearchConfig) -> str:
    wanted = [*config.query, *config.text, *map(str, config.image)]
    return " ".join([*wanted, *(f"-{each}" for each in config.minus)])


def _row(hit: Hit) -> dict[str, Any]:
    values = {name: getattr(hit, name) for name in COLUMNS}
    return values | {"score": round(hit.score, NUM_DIGITS), "copies": list(hit.copies)}


def _group_rows(groups: Sequence[Sequence[Hit]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each file, copies as well."""
    for number, group in enumerate(groups, 1):
        for hit in group:
            for path in (hit.path, *hit.copies):
                yield {**_row(hit), "group": number, "path": path}


def _read_date(option: str, text: str | None) -> datetime.datetime | None:
    if text is None:
        return None
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(
            f"{option} is {text[:40]!r}; a date is written as 2026-01-31 or 2026-01-31T12:00."
        ) from error


def _read_size(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15})([KMG]?)B?", text.strip().upper())
    if match is None:
        raise InputError(f"{option} is {text[:40]!r}; a size is written as 500000, 100K or 2M.")
    return int(match[1]) * _UNITS[match[2]]
