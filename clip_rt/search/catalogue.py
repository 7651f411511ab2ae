"""What an index knows of its images, in SQLite: files, contents, and which row a vector is in.

A file has a content, by its SHA-256; a content has a row of the vector file in each generation. A
generation is one vector file: `migrate` and the removal of unused rows write the next beside the
current one, and a single transaction makes it the current. So whoever reads sees one or the other.
A content stays when its last file goes, until unused rows are removed: a file that comes back under
another name is not embedded again.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clip_rt.errors import SearchIndexError
from clip_rt.search.identity import Identity, Verdict
from clip_rt.search.results import Hit
from clip_rt.search.scan import bounds_below
from clip_rt.search.where import PATH, Where

FORMAT = 1
"""`user_version` of the database."""
APPLICATION_ID = 0x434C5054
"""Says in the file's header that it is ours: CLPT."""
BUSY_TIMEOUT_S = 30.0

_SCHEMA = """
CREATE TABLE models (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    identity TEXT NOT NULL UNIQUE
);
CREATE TABLE verdicts (
    indexed INTEGER NOT NULL REFERENCES models,
    asking INTEGER NOT NULL REFERENCES models,
    sentence TEXT NOT NULL,
    PRIMARY KEY (indexed, asking)
) WITHOUT ROWID;
CREATE TABLE generations (
    id INTEGER PRIMARY KEY,
    model INTEGER NOT NULL REFERENCES models,
    is_current INTEGER NOT NULL,
    num_rows INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE models_in_use (
    generation INTEGER NOT NULL,
    model INTEGER NOT NULL,
    PRIMARY KEY (generation, model)
) WITHOUT ROWID;
CREATE TABLE folders (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE contents (
    id INTEGER PRIMARY KEY,
    sha256 BLOB NOT NULL UNIQUE,
    width_px INTEGER NOT NULL,
    height_px INTEGER NOT NULL,
    error TEXT
);
CREATE TABLE files (
    id INTEGER PRIMARY KEY,
    path TEXT NOT NULL UNIQUE,
    size_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    content INTEGER REFERENCES contents,
    error TEXT
);
CREATE INDEX files_by_content ON files (content);
CREATE TABLE embeddings (
    generation INTEGER NOT NULL,
    content INTEGER NOT NULL,
    row INTEGER NOT NULL,
    PRIMARY KEY (generation, content)
) WITHOUT ROWID;
CREATE UNIQUE INDEX embeddings_by_row ON embeddings (generation, row, content);
"""


@dataclass(frozen=True)
class Generation:
    """One vector file."""

    id: int
    model: int
    identity: Identity
    num_rows: int


class Catalogue:
    """A connection to the database of an index; of one thread at a time.

    Args:
        path: Of the database.
        create: Make it where it is missing; and write to it.

    Raises:
        SearchIndexError: it is not there, is no index, or one of a later version.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        if not create and not path.is_file():
            raise SearchIndexError(
                f"there is no index in {path.parent}. Make it with clip-rt index FOLDER, or name "
                "another with --index."
            )
        try:
            self.db = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self.db.text_factory = os.fsdecode
            self._check(create)
        except sqlite3.DatabaseError as error:
            raise SearchIndexError(
                f"{path} cannot be read as an index: {error}. Restore it from a backup, or remove "
                "its folder and make the index anew with clip-rt index."
            ) from error

    def _check(self, create: bool) -> None:
        found = self._one("PRAGMA user_version")
        if found > FORMAT:
            raise SearchIndexError(
                f"{self.path} is an index of version {found}; this clip_rt reads version {FORMAT}. "
                "Use the clip_rt that made it, or make another index."
            )
        if found == 0:
            if not create or self._one("SELECT count(*) FROM sqlite_master"):
                raise SearchIndexError(
                    f"{self.path} is no index of images. Name another folder with --index."
                )
            # Readers go on while another process writes.
            self.db.execute("PRAGMA journal_mode = WAL")
            with self.transaction():
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self.db.execute(statement)
                self.db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self.db.execute(f"PRAGMA user_version = {FORMAT}")

    def close(self) -> None:
        """Close the connection."""
        self.db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Write all of what is done meanwhile, or nothing of it."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read as it is now, whatever another process writes meanwhile."""
        self.db.execute("BEGIN")
        try:
            yield
        finally:
            self.db.execute("ROLLBACK")

    def _one(self, sql: str, *parameters: object) -> int:
        found = self.db.execute(sql, parameters).fetchone()
        return int(found[0] or 0) if found else 0

    # Models and generations

    def find_model(self, identity: Identity) -> int | None:
        """Return the number of a model that the index has heard of."""
        return self._one("SELECT id FROM models WHERE identity = ?", identity.json) or None

    def add_model(self, name: str, identity: Identity) -> int:
        """Return the number of a model, a new one where it is new."""
        self.db.execute(
            "INSERT OR IGNORE INTO models (name, identity) VALUES (?, ?)", (name, identity.json)
        )
        return self._one("SELECT id FROM models WHERE identity = ?", identity.json)

    def describe_model(self, model: int) -> tuple[str, Identity]:
        """Return a model's name and what its vectors depend on."""
        name, identity = self.db.execute(
            "SELECT name, identity FROM models WHERE id = ?", (model,)
        ).fetchone()
        return name, Identity(identity)

    def models_in_use(self, generation: int) -> list[int]:
        """Return the models whose vectors a generation has or is to have."""
        sql = "SELECT model FROM models_in_use WHERE generation = ? ORDER BY model"
        return [row[0] for row in self.db.execute(sql, (generation,))]

    def use_model(self, generation: int, model: int) -> None:
        """Note that vectors of a model come into a generation."""
        self.db.execute("INSERT OR IGNORE INTO models_in_use VALUES (?, ?)", (generation, model))

    def add_verdict(self, indexed: int, asking: int, verdict: Verdict) -> None:
        """Let vectors of one model be asked by another."""
        self.db.execute(
            "INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", (indexed, asking, verdict.sentence)
        )

    def has_verdict(self, indexed: int, asking: int) -> bool:
        """Whether vectors of one model may be asked by another."""
        sql = "SELECT count(*) FROM verdicts WHERE indexed = ? AND asking = ?"
        return indexed == asking or bool(self._one(sql, indexed, asking))

    def generation(self, *, is_current: bool) -> Generation | None:
        """Return the current generation, or the one that is being written beside it."""
        found = self.db.execute(
            "SELECT g.id, g.model, m.identity, g.num_rows FROM generations AS g "
            "JOIN models AS m ON m.id = g.model WHERE g.is_current = ?",
            (int(is_current),),
        ).fetchone()
        return found and Generation(found[0], found[1], Identity(found[2]), found[3])

    def next_generation(self) -> int:
        """Return the number of the next generation; the current one has a lower number."""
        return 1 + self._one("SELECT max(id) FROM generations")

    def add_generation(self, generation: int, model: int, *, is_current: bool) -> None:
        """Begin one with vectors of a model."""
        self.db.execute(
            "INSERT INTO generations (id, model, is_current) VALUES (?, ?, ?)",
            (generation, model, int(is_current)),
        )
        self.use_model(generation, model)

    def generations(self) -> list[int]:
        """Return the numbers of all."""
        return [row[0] for row in self.db.execute("SELECT id FROM generations")]

    def drop_generation(self, generation: int) -> None:
        """Forget one."""
        self.db.execute("DELETE FROM embeddings WHERE generation = ?", (generation,))
        self.db.execute("DELETE FROM models_in_use WHERE generation = ?", (generation,))
        self.db.execute("DELETE FROM generations WHERE id = ?", (generation,))

    def make_current(self, generation: int) -> None:
        """Have searches use a generation, and forget the one they used.

        Files whose content it does not have are forgotten too: the next update finds them.
        """
        for (other,) in self.db.execute(
            "SELECT id FROM generations WHERE id != ?", (generation,)
        ).fetchall():
            self.drop_generation(other)
        self.db.execute("UPDATE generations SET (is_current) = (1) WHERE id = ?", (generation,))
        without_vector = (
            "error IS NULL AND id NOT IN (SELECT content FROM embeddings WHERE generation = ?)"
        )
        self.db.execute(
            f"DELETE FROM files WHERE content IN (SELECT id FROM contents WHERE {without_vector})",
            (generation,),
        )
        self.db.execute(f"DELETE FROM contents WHERE {without_vector}", (generation,))

    # Folders and files

    def folders(self) -> list[str]:
        """Return the folders that the index is of, in order."""
        return [row[0] for row in self.db.execute("SELECT path FROM folders ORDER BY path")]

    def add_folder(self, path: str) -> None:
        """Note a folder; those within it need no place of their own."""
        low, high = bounds_below(path)
        self.db.execute(f"DELETE FROM folders WHERE path >= {PATH} AND path < {PATH}", (low, high))
        if not any(each == path or is_below(path, each) for each in self.folders()):
            self.db.execute(f"INSERT INTO folders VALUES ({PATH})", (os.fsencode(path),))

    def remove_folder(self, path: str) -> bool:
        """Forget a folder; return whether it was known."""
        sql = f"DELETE FROM folders WHERE path = {PATH}"
        return self.db.execute(sql, (os.fsencode(path),)).rowcount > 0

    def remove_files(self, path: str, *, but_found: bool = False) -> int:
        """Forget a file, or all below a folder; return how many.

        Args:
            path: Absolute.
            but_found: Keep those in `temp.found`.
        """
        kept = (
            "AND NOT EXISTS (SELECT 1 FROM temp.found WHERE found.path = files.path)"
            if but_found
            else ""
        )
        low, high = bounds_below(path)
        return self.db.execute(
            f"DELETE FROM files WHERE (path = {PATH} OR (path >= {PATH} AND path < {PATH})) {kept}",
            (os.fsencode(path), low, high),
        ).rowcount

    def put_file(
        self, path: str, size_bytes: int, mtime_ns: int, content: int | None, error: str | None
    ) -> None:
        """Note what a file holds now."""
        self.db.execute(
            "INSERT OR REPLACE INTO files (path, size_bytes, mtime_ns, content, error) "
            f"VALUES ({PATH}, ?, ?, ?, ?)",
            (os.fsencode(path), size_bytes, mtime_ns, content, error),
        )

    # Contents and vectors

    def find_content(self, sha256: bytes, generation: int) -> tuple[int, str | None] | None:
        """Return a content's number and error if it has a vector in a generation, or an error."""
        found: tuple[int, str | None] | None = self.db.execute(
            "SELECT id, error FROM contents WHERE sha256 = ? AND (error IS NOT NULL OR EXISTS "
            "(SELECT 1 FROM embeddings WHERE generation = ? AND content = contents.id))",
            (sha256, generation),
        ).fetchone()
        return found

    def put_content(
        self, sha256: bytes, width_px: int, height_px: int, error: str | None = None
    ) -> int:
        """Note a content, and return its number."""
        self.db.execute(
            "INSERT INTO contents (sha256, width_px, height_px, error) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (sha256) DO UPDATE SET error = excluded.error",
            (sha256, width_px, height_px, error),
        )
        return self._one("SELECT id FROM contents WHERE sha256 = ?", sha256)

    def put_embeddings(self, generation: int, contents: Sequence[int], first_row: int) -> None:
        """Note in which rows, one after another, the vectors of contents are."""
        self.db.executemany(
            "INSERT INTO embeddings VALUES (?, ?, ?)",
            [
                (generation, content, first_row + position)
                for position, content in enumerate(contents)
            ],
        )
        self.db.execute(
            "UPDATE generations SET (num_rows) = (?) WHERE id = ?",
            (first_row + len(contents), generation),
        )

    def count_used(self, generation: int) -> int:
        """Return how many rows of a generation belong to a file."""
        return self._one(
            "SELECT count(*) FROM embeddings AS e WHERE generation = ? AND EXISTS "
            "(SELECT 1 FROM files WHERE files.content = e.content)",
            generation,
        )

    def used_rows(self, generation: int) -> list[tuple[int, int]]:
        """Return content and row of each vector that belongs to a file, by row."""
        return self.db.execute(
            "SELECT content, row FROM embeddings AS e WHERE generation = ? AND EXISTS "
            "(SELECT 1 FROM files WHERE files.content = e.content) ORDER BY row",
            (generation,),
        ).fetchall()

    def remove_unused_contents(self) -> None:
        """Forget contents that no file has any more."""
        self.db.execute(
            "DELETE FROM contents WHERE NOT EXISTS "
            "(SELECT 1 FROM files WHERE files.content = contents.id)"
        )

    def find_missing(self, generation: int, after: int, limit: int) -> list[tuple[int, bytes, str]]:
        """Return contents without a vector in a generation, with their hash and one of their files.

        Args:
            generation: That should have them.
            after: Number of the last content that was seen.
            limit: How many at most.
        """
        return self.db.execute(
            "SELECT id, sha256, (SELECT min(path) FROM files WHERE content = contents.id) AS path "
            "FROM contents WHERE id > ? AND error IS NULL AND path IS NOT NULL AND NOT EXISTS "
            "(SELECT 1 FROM embeddings WHERE generation = ? AND content = contents.id) "
            "ORDER BY id LIMIT ?",
            (after, generation, limit),
        ).fetchall()

    def count_missing(self, generation: int) -> int:
        """Return how many contents that belong to a file have no vector in a generation."""
        return self._one(
            "SELECT count(*) FROM contents WHERE error IS NULL "
            "AND EXISTS (SELECT 1 FROM files WHERE content = contents.id) AND NOT EXISTS "
            "(SELECT 1 FROM embeddings WHERE generation = ? AND content = contents.id)",
            generation,
        )

    # Searching

    def find_copies(self, generation: int) -> list[int]:
        """Return the rows of contents that several files have."""
        found = self.db.execute(
            "SELECT row FROM embeddings JOIN (SELECT content FROM files WHERE content IS NOT NULL "
            "GROUP BY content HAVING count(*) > 1) USING (content) WHERE generation = ? "
            "ORDER BY row",
            (generation,),
        )
        return [row for (row,) in found]

    def find_rows(self, generation: int, where: Where) -> list[int]:
        """Return the rows of all images that some file of which satisfies `where`, ascending."""
        condition, values = where.to_sql()
        found = self.db.execute(
            "SELECT DISTINCT row FROM files CROSS JOIN contents ON contents.id = files.content "
            "CROSS JOIN embeddings ON generation = ? AND embeddings.content = contents.id "
            f"WHERE {condition} ORDER BY row",
            (generation, *values),
        )
        return [row for (row,) in found]

    def find_files(self, sha256: bytes) -> list[str]:
        """Return the files of a content, by path; none where the index does not have it."""
        sql = (
            "SELECT path FROM files JOIN contents ON contents.id = files.content "
            "WHERE sha256 = ? AND contents.error IS NULL ORDER BY path"
        )
        return [row[0] for row in self.db.execute(sql, (sha256,))]

    def find_hits(
        self, generation: int, score_by_row: dict[int, float], where: Where
    ) -> dict[int, Hit]:
        """Return by row the images whose files satisfy `where`; rows without such are left out."""
        condition, values = where.to_sql()
        found = self.db.execute(
            "SELECT row, files.path, size_bytes, mtime_ns, sha256, width_px, height_px "
            # In this order: the rows that are asked for are few.
            "FROM json_each(?) AS asked "
            "CROSS JOIN embeddings ON generation = ? AND row = asked.value "
            "CROSS JOIN contents ON contents.id = embeddings.content "
            f"CROSS JOIN files ON files.content = contents.id WHERE {condition} "
            "ORDER BY row, files.path",
            (json.dumps(list(score_by_row)), generation, *values),
        )
        hits: dict[int, Hit] = {}
        copies: dict[int, list[str]] = {}
        for row, path, size_bytes, mtime_ns, sha256, width_px, height_px in found:
            if row in hits:
                copies.setdefault(row, []).append(path)
                continue
            hits[row] = Hit(
                path=path,
                score=score_by_row[row],
                sha256=sha256.hex(),
                size_bytes=size_bytes,
                mtime_ns=mtime_ns,
                width_px=width_px,
                height_px=height_px,
            )
        for row, paths in copies.items():
            hits[row] = replace(hits[row], copies=tuple(paths))
        return hits

    def count(self) -> dict[str, int]:
        """Return how many files, bad files and images with a vector there are."""
        current = self.generation(is_current=True)
        return {
            "files": self._one("SELECT count(*) FROM files"),
            "bad": len(self.bad_files()),
            "images": self.count_used(current.id) if current else 0,
        }

    def bad_files(self) -> list[tuple[str, str]]:
        """Return path and reason of each file that has no vector, by path."""
        return self.db.execute(
            "SELECT path, coalesce(files.error, contents.error) AS reason FROM files "
            "LEFT JOIN contents ON contents.id = files.content WHERE reason IS NOT NULL "
            "ORDER BY path"
        ).fetchall()


def is_below(path: str, folder: str) -> bool:
    """Whether a path is below a folder; both are absolute."""
    return path.startswith(folder if folder.endswith(os.sep) else folder + os.sep)
