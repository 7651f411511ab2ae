"""Says what is being measured, how far it is, and about how long the rest takes."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A bar of the cases of a run, used as a context manager.

    Where nobody watches (a file, a pipe) there is a line for each case instead.

    Args:
        console: Where to draw.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("start", total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def plan(self, num_steps: int) -> None:
        """Say how many steps there will be more than was known."""
        total = self._bar.tasks[0].total or 0
        self._bar.update(self._task, total=total + num_steps)

    def step(self, what: str) -> None:
        """Begin a step."""
        self.say(what)
        if not self.console.is_terminal:
            self.console.print(what, highlight=False)

    def say(self, what: str) -> None:
        """Say what happens within a step."""
        self._bar.update(self._task, description=what)

    def tell(self, what: str) -> None:
        """Say what happens before the first step, for good: it may take minutes."""
        self.say(what[:100])
        self.console.print(what, style="dim", highlight=False, markup=False)

    def done(self) -> None:
        """End a step."""
        self._bar.advance(self._task)
