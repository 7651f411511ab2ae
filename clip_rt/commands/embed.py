"""`clip-rt embed`: any number of images or texts into files; the same command goes on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from clip_rt.commands.connect import ModelOptions
from clip_rt.commands.exit_codes import SOME_BAD
from clip_rt.errors import InputError

if TYPE_CHECKING:
    from clip_rt.bulk import Progress

SHOW_EVERY_S = 0.5
"""On a terminal, where each report replaces the one before."""
LOG_EVERY_S = 10.0
"""Elsewhere."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Embed any number of images or texts into files; the same command goes on after a kill.

    Raises:
        InputError: an option cannot be used, or two exclude each other.
    """

    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Images: files, folders, patterns, .tar shards, URLs, tables (.csv, .tsv, .parquet), and - for
    such names on stdin."""
    out: Path
    """Folder for the result."""
    texts: tuple[str, ...] = ()
    """Embed texts instead: files with one a line, tables, - for lines on stdin."""
    connection: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    image_column: str = "image"
    """Of tables, with paths, relative to the table's folder, or URLs."""
    caption_column: str = "caption"
    """Of tables of images; kept beside the embeddings."""
    text_column: str = "text"
    """Of tables of texts."""
    image_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Host that images are fetched from by URL; without it none are."""
    truncate: tyro.conf.FlagCreatePairsOff[bool] = False
    """Cut texts that are too long for the model."""
    format: Literal["parquet", "npy"] = "parquet"
    """Of the embeddings; npy has matrices beside Parquet files of what their rows are."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the embeddings."""
    dimensions: int | None = None
    """Numbers of each embedding to keep, of a model that was trained for it; all without it."""
    shard: str | None = None
    """i/n, i from 0: do the i-th of n disjoint parts of the inputs."""
    partition_items: int = 10_000
    """Most items of a file."""
    partition_s: float = 60.0
    """A file is ended after that time, so that no more is lost by a kill."""

    def __post_init__(self) -> None:
        if bool(self.inputs) == bool(self.texts):
            raise InputError("name images, or texts with --texts, and not both.")
        _ = self.shard_pair

    @property
    def shard_pair(self) -> tuple[int, int] | None:
        """`shard` as numbers."""
        if self.shard is None:
            return None
        number, _, of = self.shard.partition("/")
        if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
            raise InputError(
                f"--shard is {self.shard[:80]!r}; it must be i/n, i from 0 to n - 1: 0/4 to 3/4."
            )
        return int(number), int(of)


def embed(config: Annotated[EmbedConfig, tyro.conf.arg(name="")]) -> int:
    """Embed any number of images or texts into files; the same command goes on after a kill.

    Returns:
        0 when all is done, 3 when some items could not be embedded; 130 or 143 when SIGINT or
        SIGTERM ended it, with what was done in the folder.
    """
    from clip_rt import bulk

    reports = _Reports()
    with _caught_signals() as caught, config.connection.connect() as client:
        summary = bulk.embed(
            config.texts or config.inputs,
            config.out,
            client,
            kind="text" if config.texts else "image",
            image_column=config.image_column,
            caption_column=config.caption_column,
            text_column=config.text_column,
            image_hosts=config.image_host,
            truncate=config.truncate,
            format=config.format,
            dtype=config.dtype,
            dimensions=config.dimensions,
            shard=config.shard_pair,
            partition_items=config.partition_items,
            partition_s=config.partition_s,
            on_progress=reports.show,
            should_stop=caught.is_set,
        )
    reports.end()
    words = f"{summary.num_embedded:,} of {summary.num_items:,} are in {config.out}"
    if summary.num_failed:
        words += f"; {summary.num_failed:,} could not be embedded: {config.out / 'errors'}"
    if not summary.is_complete:
        words += "; stopped, the same command goes on"
    sys.stderr.write(words + "\n")
    if not summary.is_complete:
        return 128 + caught.number
    return SOME_BAD if summary.num_failed else 0


class _Signals(threading.Event):
    """Set by the first SIGINT or SIGTERM."""

    number = signal.SIGINT


@contextmanager
def _caught_signals() -> Iterator[_Signals]:
    """Have SIGINT and SIGTERM asked for instead of ending the process; a second one ends it."""
    caught = _Signals()

    def note(number: int, frame: FrameType | None) -> None:
        if caught.is_set():
            raise KeyboardInterrupt
        caught.number = signal.Signals(number)
        caught.set()
        # Not through sys.stderr, which may be at work in the frame that this interrupts.
        os.write(2, b"\nending after what is under way; once more ends at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Reports:
    """Progress on stderr: one line that changes on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._shown_s = time.monotonic()
        self._width = 0

    def show(self, progress: Progress) -> None:
        """Show how far it is, unless that was done a moment ago."""
        now_s = time.monotonic()
        if now_s - self._shown_s < (SHOW_EVERY_S if self._is_terminal else LOG_EVERY_S):
            return
        self._shown_s = now_s
        text = describe(progress)
        if self._is_terminal:
            sys.stderr.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the line that changes."""
        if self._width:
            sys.stderr.write("\n")


def describe(progress: Progress) -> str:
    """Say how far it is: done, rate, time that is left, bad items."""
    if not progress.is_listed:
        return f"{progress.num_listed:,} found"
    share = progress.num_done / progress.num_listed if progress.num_listed else 1.0
    words = f"{progress.num_done:,} of {progress.num_listed:,} ({share:.1%})"
    if progress.rate:
        words += f", {progress.rate:,.0f}/s, {_duration(progress.remaining_s)} left"
    return words + f", {progress.num_failed:,} bad"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{int(seconds):02d}"
