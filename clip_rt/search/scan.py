"""What a scan of folders finds, in a table that only this connection sees."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from clip_rt.search.where import PATH

_TO_READ = (
    "temp.found LEFT JOIN files ON files.path = found.path WHERE (files.id IS NULL "
    "OR files.size_bytes != found.size_bytes OR files.mtime_ns != found.mtime_ns "
    "OR files.content IS NULL)"
)


@dataclass(frozen=True)
class Found:
    """A file, or a member of a shard, as a scan found it."""

    path: str
    """What it is called in the index."""
    size_bytes: int
    mtime_ns: int
    file: str
    """That holds it."""
    member: str = ""
    offset_bytes: int = 0
    problem: str = ""
    """Why it cannot be read: of a shard or folder, in place of what it holds."""


class Scan:
    """The files that are there now, beside those that the catalogue knows.

    Args:
        db: Of the catalogue.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def begin(self) -> None:
        """Forget what the last one found."""
        self._db.execute("DROP TABLE IF EXISTS temp.found")
        self._db.execute(
            "CREATE TEMP TABLE found (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, "
            "size_bytes INTEGER, mtime_ns INTEGER, file TEXT, member TEXT, offset_bytes INTEGER, "
            "problem TEXT)"
        )

    def add(self, files: Sequence[Found]) -> None:
        """Note files that are there now."""
        self._db.execute("BEGIN")
        self._db.executemany(
            "INSERT OR IGNORE INTO temp.found "
            "(path, size_bytes, mtime_ns, file, member, offset_bytes, problem) "
            f"VALUES ({PATH}, ?, ?, {PATH}, {PATH}, ?, {PATH})",
            [
                (
                    os.fsencode(each.path),
                    each.size_bytes,
                    each.mtime_ns,
                    os.fsencode(each.file),
                    os.fsencode(each.member),
                    each.offset_bytes,
                    os.fsencode(each.problem),
                )
                for each in files
            ],
        )
        for each in files:
            if each.problem:
                # What cannot be looked into may hold all that it held.
                low, high = bounds_below(each.path)
                self._db.execute(
                    "INSERT OR IGNORE INTO temp.found (path, size_bytes, mtime_ns) "
                    "SELECT path, size_bytes, mtime_ns FROM files "
                    f"WHERE content IS NOT NULL AND path >= {PATH} AND path < {PATH}",
                    (low, high),
                )
        self._db.execute("COMMIT")

    def count(self) -> tuple[int, int]:
        """Return how many files the scan found, and how many of them are to be read."""
        num_found, num_to_read = (
            int(self._db.execute(f"SELECT count(*) FROM {each}").fetchone()[0])
            for each in ("temp.found", _TO_READ)
        )
        return num_found, num_to_read

    def to_read(self, after: int, limit: int) -> list[tuple[int, Found]]:
        """Return files that are new or changed, or could not be read, by their number.

        Args:
            after: Number of the last one that was seen.
            limit: How many at most.
        """
        found = self._db.execute(
            "SELECT found.id, found.path, found.size_bytes, found.mtime_ns, file, member, "
            f"offset_bytes, problem FROM {_TO_READ} AND found.id > ? ORDER BY found.id LIMIT ?",
            (after, limit),
        )
        return [(number, Found(*values)) for number, *values in found]


def bounds_below(folder: str) -> tuple[bytes, bytes]:
    """Return bounds of the paths below a folder: the first of them and the first that is not."""
    begin = folder if folder.endswith(os.sep) else folder + os.sep
    return os.fsencode(begin), os.fsencode(begin[:-1] + chr(ord(begin[-1]) + 1))
