"""Items that come slowly, in bursts, so that no answer waits for the next item."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

PAUSE_S = 0.1
"""A source that has nothing for so long is waited for by itself, and not by what came before."""
READ_AHEAD = 64


def in_bursts(items: Iterable[Item], *, pause_s: float = PAUSE_S) -> Iterator[Iterator[Item]]:
    """Cut items where their source pauses; a source that is quick gives one long burst.

    Args:
        items: Read in a thread of its own, some ahead.
        pause_s: How long a pause is.

    Yields:
        The next items, one at least, to be exhausted before the next burst is asked for.

    Raises:
        Exception: what reading the items raised; within a burst or between two.
    """
    coming: queue.Queue[tuple[Any, BaseException | None] | None] = queue.Queue(READ_AHEAD)
    # A daemon: a read of stdin cannot be ended from here.
    threading.Thread(target=_read, args=(items, coming), name="clip_rt-read", daemon=True).start()
    is_over = False

    def burst(entry: tuple[Any, BaseException | None] | None) -> Iterator[Item]:
        nonlocal is_over
        while entry is not None:
            item, error = entry
            if error is not None:
                is_over = True
                raise error
            yield item
            try:
                entry = coming.get(timeout=pause_s)
            except queue.Empty:
                return
        is_over = True

    while not is_over:
        # However long the source takes; Ctrl-C ends it.
        first = coming.get()
        if first is None:
            return
        yield burst(first)


def _read(
    items: Iterable[Any], coming: queue.Queue[tuple[Any, BaseException | None] | None]
) -> None:
    try:
        for item in items:
            coming.put((item, None))
    except BaseException as error:
        coming.put((None, error))
    else:
        coming.put(None)
