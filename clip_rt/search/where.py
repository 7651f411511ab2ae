"""Which files a search is among, as people say it; a condition of SQL out."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

from clip_rt.errors import InputError

# Paths are bytes on disk and need not be UTF-8: SQLite is given the bytes, and told they are text.
PATH = "CAST(? AS TEXT)"
"""Stands for a path in SQL, given as bytes."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which files a search is among; all of what is given must hold.

    Raises:
        InputError: a bound is no bound.
    """

    paths: tuple[str, ...] = ()
    """Patterns, one of which must fit, with `*`, `?` and `[...]` as in a shell, where `*` goes over
    slashes too; one that does not begin with a slash may begin at any folder. A name without these
    is a file, or a folder with all below it."""
    after: datetime.datetime | None = None
    """Changed at that time or later; in local time where it has no zone."""
    before: datetime.datetime | None = None
    """Changed earlier than that."""
    min_bytes: int | None = None
    max_bytes: int | None = None
    """Bounds of the file's size, both allowed themselves."""
    min_side_px: int | None = None
    """Shortest side of the image."""

    def __post_init__(self) -> None:
        for name in ("min_bytes", "max_bytes", "min_side_px"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 0):
                raise InputError(f"{name} is {value!r:.40}; it must be a whole number from 0.")
        if any(not each for each in self.paths):
            raise InputError("a pattern of paths is empty; leave it out.")

    def to_sql(self) -> tuple[str, list[object]]:
        """Return a condition on `files` and `contents`, and its parameters."""
        conditions, values = ["1"], list[object]()

        def add(condition: str, *parameters: object) -> None:
            conditions.append(condition)
            values.extend(parameters)

        if self.paths:
            patterns = [pattern for path in self.paths for pattern in _to_globs(path)]
            fits = " OR ".join([f"files.path GLOB {PATH}"] * len(patterns))
            add(f"({fits})", *map(os.fsencode, patterns))
        if self.after is not None:
            add("files.mtime_ns >= ?", _to_ns(self.after))
        if self.before is not None:
            add("files.mtime_ns < ?", _to_ns(self.before))
        if self.min_bytes is not None:
            add("files.size_bytes >= ?", self.min_bytes)
        if self.max_bytes is not None:
            add("files.size_bytes <= ?", self.max_bytes)
        if self.min_side_px is not None:
            add("min(contents.width_px, contents.height_px) >= ?", self.min_side_px)
        return " AND ".join(conditions), values


EVERYWHERE = Where()


def _to_globs(path: str) -> Iterator[str]:
    """Yield GLOBs of absolute paths for a pattern."""
    has_magic = any(each in path for each in "*?[")
    if not has_magic and (path in (".", "..") or path.startswith(("./", "../"))):
        path = os.path.abspath(path)
    path = path.rstrip("/") or "/"
    pattern = path if os.path.isabs(path) else f"*/{path}"
    yield pattern
    if not has_magic:
        yield pattern.rstrip("/") + "/*"


def _to_ns(moment: datetime.datetime) -> int:
    # Without a zone it is local time, as in a file manager.
    return int(moment.timestamp()) * 10**9 + moment.microsecond * 1000
