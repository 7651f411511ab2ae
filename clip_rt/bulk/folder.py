"""The folder of a bulk job: what it holds is whole at any moment, whenever a process is killed.

    job.json                        which model, inputs and settings
    .listing.parquet                what is embedded, in order
    embeddings/part-FIRST-END.parquet   of the items at those positions of the listing
    errors/part-FIRST-END.parquet       those of them that could not be embedded
    items/part-FIRST-END.parquet        beside .npy files: what their rows are of

Each file is written under a hidden name, flushed to the disk and renamed. The file of embeddings
comes last: a partition is there when that is. Each of N shards has all of these for itself, with
`-00003-of-00016` in their names, in the same folders.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq

from clip_rt.bulk.partitions import EMBEDDINGS, ERRORS, ITEMS, Layout, Row
from clip_rt.errors import InputError, JobMismatchError, JobRunningError

VERSION = 1
"""Of the files in the folder."""
_PART = re.compile(r"part(|-\d{5}-of-\d{5})-(\d{12})-(\d{12})\.\w+")
_WRITING = ".writing-"


class JobFolder:
    """A folder that one job, or one shard of it, writes to.

    Args:
        path: Made when it is locked.
        shard: Number, from 0, and how many there are; None for a job that is not split.
    """

    def __init__(self, path: Path, shard: tuple[int, int] | None = None) -> None:
        self.path = path
        self._shard = "" if shard is None else f"-{shard[0]:05d}-of-{shard[1]:05d}"
        self.listing = path / f".listing{self._shard}.parquet"
        self._job = path / f"job{self._shard}.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here; a killed one does so no more.

        Raises:
            JobRunningError: one does.
            OSError: the folder cannot be made.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / f".lock{self._shard}", "a+", encoding="ascii") as file:
            if not _try_to_lock(file):
                file.seek(0)
                raise JobRunningError(
                    f"process {file.read(20).strip() or '?'} is at work on {self.path}. Wait for "
                    "it, or write to another folder."
                )
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def begin(self, job: Mapping[str, Any]) -> None:
        """Note which job this is, or check that it is the one that began here.

        Args:
            job: Facts in JSON, `model` among them.

        Raises:
            JobMismatchError: it is another.
            InputError: the folder's own file cannot be read.
        """
        jobs = sorted(self.path.glob("job*.json"))
        for path in jobs:
            found = read_job(path)
            if path != self._job and found["shard"] and job["shard"]:
                found["shard"][0] = job["shard"][0]  # Another shard of the same job.
            _compare(self.path, found, job)
        if not jobs and any((self.path / EMBEDDINGS).glob("part*")):
            raise InputError(
                f"{self.path / EMBEDDINGS} has partitions, and no job.json says of what. Write to "
                "another folder."
            )
        if self._job not in jobs:
            with written(self._job) as path:
                path.write_text(json.dumps(job, indent=1) + "\n", encoding="ascii")

    def clean(self) -> None:
        """Remove what a killed process left unfinished."""
        done = set(self.find_done())
        for name in (EMBEDDINGS, ERRORS, ITEMS):
            folder = self.path / name
            for path in folder.iterdir() if folder.is_dir() else ():
                is_unfinished = path.name.startswith(_WRITING)
                positions = self._range(path.name.removeprefix(_WRITING))
                if positions is not None and (is_unfinished or positions not in done):
                    path.unlink()
        for path in (self.listing, self._job):
            _hidden(path).unlink(missing_ok=True)

    def find_done(self) -> list[tuple[int, int]]:
        """Return first and end position of each partition there is, in order.

        Raises:
            InputError: two of them have an item in common.
        """
        folder = self.path / EMBEDDINGS
        names = os.listdir(folder) if folder.is_dir() else []
        found = sorted(filter(None, map(self._range, names)))
        for (_, end), (start, _) in itertools.pairwise(found):
            if start < end:
                raise InputError(
                    f"two partitions in {folder} have item {start}. Remove one of them, and go on."
                )
        return found

    def count_failed(self) -> int:
        """Return how many items of the partitions there are could not be embedded."""
        folder = self.path / ERRORS
        paths = folder.iterdir() if folder.is_dir() else ()
        return sum(int(pq.read_metadata(path).num_rows) for path in paths if self._range(path.name))

    def find_missing(self, num_items: int) -> Iterator[tuple[int, int]]:
        """Yield first and end position of what is still to be embedded."""
        position = 0
        for start, end in [*self.find_done(), (num_items, num_items)]:
            if position < start:
                yield position, start
            position = end

    def commit(self, start: int, rows: Sequence[Row], layout: Layout) -> None:
        """Write a partition; it is there after this, or not at all.

        Args:
            start: Position of the first row's item.
            rows: Of neighbouring items.
            layout: How they are written.

        Raises:
            OSError: they cannot be written.
        """
        name = f"part{self._shard}-{start:012d}-{start + len(rows):012d}"
        good = [row for row in rows if row.embedding is not None]
        bad = [row for row in rows if row.embedding is None]
        if bad:
            with written(self.path / ERRORS / f"{name}.parquet") as path:
                layout.write_errors(bad, path)
        if layout.format == "npy":
            with written(self.path / ITEMS / f"{name}.parquet") as path:
                layout.write_items(good, path)
        with written(self.path / EMBEDDINGS / f"{name}{layout.suffix}") as path:
            layout.write_embeddings(good, path)

    def _range(self, name: str) -> tuple[int, int] | None:
        """Return the positions of a partition of this shard."""
        match = _PART.fullmatch(name)
        if match is None or match[1] != self._shard:
            return None
        return int(match[2]), int(match[3])


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a hidden name to write to; what is there after the block gets its own name at once."""
    if not path.parent.exists():
        path.parent.mkdir(exist_ok=True)  # Another shard may just have made it.
        _sync(path.parent.parent)
    hidden = _hidden(path)
    try:
        yield hidden
        _sync(hidden)
        os.replace(hidden, path)
        _sync(path.parent)
    finally:
        hidden.unlink(missing_ok=True)


def read_job(path: Path) -> dict[str, Any]:
    """Read what `JobFolder.begin` wrote.

    Raises:
        InputError: it cannot be read, or another version of this package wrote it.
    """
    try:
        job = json.loads(path.read_text("ascii"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}. Write to another folder.") from error
    if not isinstance(job, dict) or job.get("version") != VERSION:
        raise InputError(
            f"{path} is of another version of clip_rt; this one reads {VERSION}. Go on with that "
            "version, or write to another folder."
        )
    return job


def _compare(folder: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse a job that differs from the one that began.

    Raises:
        JobMismatchError: it does.
    """
    for key, value in found.items():
        if key == "model":
            # The name is the server's affair.
            same = {k: v for k, v in value.items() if k != "name"}
            if any(asked["model"].get(each) != same[each] for each in same):
                raise JobMismatchError(
                    f"{folder} holds embeddings of {_describe(value)}, and the model now is "
                    f"{_describe(asked['model'])}. Have the former served to go on, or write to "
                    "another folder; do not mix them.",
                    expected=value,
                    found=asked["model"],
                )
        elif asked.get(key) != value:
            shown, other = (json.dumps(each)[:200] for each in (value, asked.get(key)))
            raise JobMismatchError(
                f"{folder} holds a job whose {key} is {shown}, and that of this one is {other}. "
                f"Repeat the former to go on, or write to another folder.",
                expected=value,
                found=asked.get(key),
            )


def _describe(model: Mapping[str, Any]) -> str:
    return (
        f"{str(model['name'])[:80]!r}, weights {str(model['fingerprint'])[:12]}, "
        f"{model['precision']}, {model['dimensions']} numbers"
    )


def _hidden(path: Path) -> Path:
    return path.with_name(_WRITING + path.name)


def _sync(path: Path) -> None:
    """Have a file or folder written to the disk."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_to_lock(file: TextIO) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
