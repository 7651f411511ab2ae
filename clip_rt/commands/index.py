"""`clip-rt index`: embeds the images of folders once, and keeps up with them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from clip_rt.commands.connect import ModelOptions
from clip_rt.commands.exit_codes import SOME_BAD
from clip_rt.commands.output import OutputOptions
from clip_rt.commands.progress import Progress
from clip_rt.errors import InputError

if TYPE_CHECKING:
    from clip_rt.client import Client
    from clip_rt.search.index import Index
    from clip_rt.search.update import Report

MAX_SHOWN_BAD = 20
"""Of an update; all that are bad are listed by `--bad`."""
COLUMNS = ("images", "files", "new", "known", "removed", "bad", "seconds")
BAD_COLUMNS = ("path", "error")
WATCH_DEBOUNCE_MS = 1600
"""Changes within that time are one update; a move is two changes."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Which folders, which index, and what to do with it.

    Raises:
        InputError: options exclude each other.
    """

    folders: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FOLDER")] = ()
    """Folders, image files or .tar shards; those that were given before if there are none."""
    index: Path | None = None
    """Folder of the index. Without it: $CLIP_RT_INDEX, else ~/.local/share/clip_rt/index."""
    watch: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on, and keep up with changes until Ctrl-C."""
    forget: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Take a folder out of the index, in place of an update."""
    bad: tyro.conf.FlagCreatePairsOff[bool] = False
    """List the files that could not be used, in place of an update."""
    migrate: tyro.conf.FlagCreatePairsOff[bool] = False
    """Embed all images again with another model; searches use the old until all is done."""
    accept_compare: Path | None = None
    """Report of `export compare` that lets another model go on with the index."""
    output: Annotated[OutputOptions, tyro.conf.arg(name="")]
    model: Annotated[ModelOptions, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        if self.bad and (self.folders or self.watch or self.forget or self.migrate):
            raise InputError(
                "--bad only lists; leave folders, --watch, --forget and --migrate out."
            )
        if self.forget and (self.folders or self.watch or self.migrate):
            raise InputError("--forget takes out; leave folders, --watch and --migrate out.")
        if self.migrate and self.folders:
            raise InputError("--migrate is for all folders of the index; name none.")
        for each in self.folders:
            if not os.path.exists(each):
                raise InputError(f"there is no folder or file {each[:200]!r}.")


def index(config: Annotated[IndexConfig, tyro.conf.arg(name="")]) -> int:
    """Embed the images of folders for `search`, and keep up with what changes in them.

    Returns:
        The exit code.

    Raises:
        ClipRTError: see `Index.update`.
        OSError: the index cannot be written.
    """
    # Only here: help needs none of it.
    from clip_rt.search.index import Index

    is_new = bool(config.folders)
    with Index.open(config.index, create=is_new) as opened:
        if config.bad:
            rows = [dict(zip(BAD_COLUMNS, each, strict=True)) for each in opened.bad_files()]
            config.output.write(rows, BAD_COLUMNS)
            return 0
        for each in config.forget:
            num = opened.forget(each)
            sys.stderr.write(f"{num:,} files below {each} are forgotten\n")
        if config.forget:
            return 0
        if config.accept_compare is not None:
            verdict = opened.accept(config.accept_compare)
            for each in verdict.weak:
                sys.stderr.write(f"warning: {each}\n")
            sys.stderr.write(f"{verdict.b_name} may go on with the index: {verdict.sentence}\n")
        num_bad = 0
        with opened.writing(), config.model.connect() as client:
            updates = _Updates(config, opened, client)
            rows_of_updates = updates.watch() if config.watch else iter([updates.run(None)])
            if config.output.is_table:
                for row in rows_of_updates:
                    sys.stdout.write(_sentence(row) + "\n")
                    sys.stdout.flush()
            else:
                config.output.write(rows_of_updates, COLUMNS)
            num_bad = updates.num_bad
    return SOME_BAD if num_bad else 0


class _Updates:
    """Brings an index up to date, once or again and again, and shows how far it has come."""

    def __init__(self, config: IndexConfig, index: Index, client: Client) -> None:
        self.num_bad = 0
        self._config = config
        self._index = index
        self._client = client

    def run(self, changed: Iterable[str] | None) -> dict[str, Any]:
        """Update, and return a row that says what was done.

        Args:
            changed: Paths that changed, where it is known; the folders of the index if None.
        """
        started_s = time.monotonic()
        is_scanned = threading.Event()
        total = 0
        done = (0, 0)

        def count() -> int:
            is_scanned.wait()
            return total

        def show(report: Report) -> None:
            nonlocal total, done
            if report.num_to_read and not is_scanned.is_set():
                total = report.num_to_read
                is_scanned.set()
            now = (report.num_read, report.num_bad)
            progress.advance(now[0] - done[0], now[1] - done[1])
            done = now

        num_shown = 0

        def say_bad(path: str, reason: str) -> None:
            nonlocal num_shown
            num_shown += 1
            if num_shown <= MAX_SHOWN_BAD:
                sys.stderr.write(f"warning: {path}: {reason}\n")
            elif num_shown == MAX_SHOWN_BAD + 1:
                sys.stderr.write("warning: more are bad; clip-rt index --bad lists them\n")

        with Progress("images", self._config.output, count) as progress:
            if changed is None and self._config.migrate:
                report = self._index.migrate(self._client, on_progress=show, on_bad=say_bad)
            else:
                names = changed if changed is not None else self._config.folders or None
                report = self._index.update(self._client, names, on_progress=show, on_bad=say_bad)
        self.num_bad += report.num_bad
        counts = self._index.count()
        return {
            "images": counts["images"],
            "files": counts["files"],
            "new": report.num_embedded,
            "known": report.num_known,
            "removed": report.num_removed,
            "bad": report.num_bad,
            "seconds": round(time.monotonic() - started_s, 3),
        }

    def watch(self) -> Iterator[dict[str, Any]]:
        """Update, then again whenever something changes, until Ctrl-C."""
        try:
            import watchfiles
        except ModuleNotFoundError as error:
            raise InputError(
                f"--watch needs {error.name}: pip install 'clip-rt[search]'."
            ) from error

        # One that is not there now, as of a disk that is not mounted, is said by each full update.
        folders = list(self._config.folders) or list(filter(os.path.exists, self._index.folders))
        # The watch begins before the first update, so that no change falls between the two.
        changes = watchfiles.watch(
            *folders,
            watch_filter=None,
            debounce=WATCH_DEBOUNCE_MS,
            rust_timeout=100,
            yield_on_timeout=True,
            raise_interrupt=True,
        )
        next(changes)
        yield self.run(None)
        for each in changes:
            paths = {os.path.abspath(path) for _, path in each}
            if wanted := sorted(filter(self._is_wanted, paths)):
                yield self.run(wanted)

    def _is_wanted(self, path: str) -> bool:
        """Whether a change can matter: no hidden file, and an image, a shard or a folder."""
        from clip_rt.bulk.sources import SHARD_SUFFIX, SUFFIXES

        folder = next(
            (
                each
                for each in self._index.folders
                if path == each or path.startswith(each + os.sep)
            ),
            None,
        )
        if folder is None:
            return False
        parts = path[len(folder) :].split(os.sep)
        if any(each.startswith(".") for each in parts):
            return False
        # What is gone may have been a folder.
        suffix = os.path.splitext(path)[1].lower()
        return suffix in SUFFIXES or suffix == SHARD_SUFFIX or not os.path.isfile(path)


def _sentence(row: dict[str, Any]) -> str:
    what = (
        (row["new"], "new"),
        (row["known"], "moved or copied"),
        (row["removed"], "removed"),
        (row["bad"], "bad"),
    )
    said = ", ".join(f"{num:,} {name}" for num, name in what if num) or "nothing new"
    return f"{row['images']:,} images in {row['files']:,} files; {said} ({row['seconds']:.1f} s)"
