"""How far a command has come, on stderr, for people who look at it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from clip_rt.commands.output import OutputOptions


class Progress:
    """A line with the number of items done and bad, the rate, and the time left.

    Shown where stderr is a terminal and Rich is installed, unless rows are printed there meanwhile.
    In any case the numbers are counted.

    Args:
        what: Items are, in the plural.
        output: Where the rows go.
        count: Returns how many items there are, which may take its time: it is called in a thread.
            None where nobody knows.
    """

    def __init__(
        self, what: str, output: OutputOptions, count: Callable[[], int] | None = None
    ) -> None:
        self.num_done = 0
        self.num_bad = 0
        self._what = what
        self._count = count
        self._started_s = time.monotonic()
        prints_rows = sys.stdout.isatty() and not output.is_table and output.parquet is None
        self._bar = _make_bar() if sys.stderr.isatty() and not prints_rows else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task(self._what, total=None, rate="", bad="")
            if self._count is not None:
                # A daemon: nobody waits for what is only shown.
                threading.Thread(target=self._find_total, args=(self._count,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_done: int, num_bad: int) -> None:
        """Count items that are done, the bad ones among them."""
        self.num_done += num_done
        self.num_bad += num_bad
        if self._bar is not None:
            rate = self.num_done / max(time.monotonic() - self._started_s, 1e-9)
            self._bar.update(
                self._bar.task_ids[0],
                completed=self.num_done,
                rate=f"{rate:,.1f}/s",
                bad=f"{self.num_bad:,} bad" if self.num_bad else "",
            )

    def report(self) -> None:
        """Say on stderr how many items were bad, if any was, and that there was none at all."""
        if not self.num_done:
            sys.stderr.write(f"warning: no {self._what} were found\n")
        if self.num_bad:
            sys.stderr.write(
                f"warning: {self.num_bad:,} of {self.num_done:,} {self._what} could not be used\n"
            )

    def _find_total(self, count: Callable[[], int]) -> None:
        # What cannot be counted is said by whoever reads it.
        with suppress(OSError):
            total = count()
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], total=total)


def _make_bar() -> Bar | None:
    try:
        from rich import progress
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TextColumn("[red]{task.fields[bad]}"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
