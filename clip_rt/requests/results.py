"""What came of each item of a call: an embedding, or the error it has instead."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import ClipRTError, InputError, ServerError
from clip_rt.inputs.items import OnError
from clip_rt.requests.batches import join
from clip_rt.requests.dispatch import Answer, blame_item

MAX_ITEMS = 1024
"""Items of a part: of equal or unusable ones any number might go into one."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoded:
    """The embeddings of the items that could be used, and why others could not."""

    embeddings: NDArray[np.float32]
    """float32 (M, D), rows of length 1, in the order of the items."""
    indices: NDArray[np.intp]
    """intp (M,): position in the caller's batch of each row's item, ascending."""
    failures: tuple[ClipRTError, ...] = ()
    """An error for each other item, in order; each carries its `index`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class HiddenStates:
    """The hidden states of the texts that could be used, and why others could not."""

    hidden_states: NDArray[np.float32]
    """float32 (M, L, W), in the order of the texts: L the context length, W the tower's width."""
    attention_mask: NDArray[np.bool_]
    """bool (M, L): which positions are of the text, start and end among them; the others are what
    it was filled up with."""
    text_embeds: NDArray[np.float32]
    """float32 (M, D), projected at the end of the text and not of length 1."""
    indices: NDArray[np.intp]
    """intp (M,): position in the caller's batch of each row's text, ascending."""
    failures: tuple[ClipRTError, ...] = ()
    """An error for each other text, in order; each carries its `index`."""


@dataclass
class Gathering:
    """Which row of the answers belongs to which item, while a call is under way."""

    first_index: int = 0
    """The caller's number of the first item."""
    row_by_item: list[int] = field(default_factory=list)
    """-1 for items without one."""
    failures: dict[int, ClipRTError] = field(default_factory=dict)
    """By position in `row_by_item`."""
    num_rows: int = 0
    _first: NDArray[np.uint8] | None = None
    _row_by_content: dict[bytes, int] = field(default_factory=dict)
    _answers: list[NDArray[np.float32]] = field(default_factory=list)
    _num_answered: int = 0
    _refused: dict[int, ServerError] = field(default_factory=dict)

    def add_failure(self, error: ClipRTError) -> None:
        """Note the next item as unusable."""
        self.failures[len(self.row_by_item)] = error
        self.row_by_item.append(-1)

    def take_batch(
        self,
        items: Iterator[NDArray[np.uint8] | InputError],
        max_rows: int,
        max_items: int | None = None,
    ) -> NDArray[np.uint8] | None:
        """Take items until there are `max_rows` distinct ones, equal ones only once.

        Args:
            items: What is left of the caller's.
            max_rows: Rows of a batch.
            max_items: Items to take at most, those that give no row among them.

        Returns:
            The rows, stacked; None if there are none.
        """
        rows: list[NDArray[np.uint8]] = []
        for item in items:
            if isinstance(item, InputError):
                self.add_failure(item)
            else:
                row = self._find_row(item)
                self.row_by_item.append(row)
                if row == self.num_rows:
                    self.num_rows += 1
                    rows.append(item)
            if len(rows) == max_rows or len(self.row_by_item) == max_items:
                break
        return np.stack(rows) if rows else None

    def _find_row(self, item: NDArray[np.uint8]) -> int:
        """Return the row of an equal item, or the next one."""
        if self.num_rows == 0:
            self._first = item  # One alone, as most calls have, need not be hashed.
            return 0
        if self._first is not None:
            self._row_by_content[_digest(self._first)] = 0
            self._first = None
        return self._row_by_content.setdefault(_digest(item), self.num_rows)

    def batches(
        self, items: Iterator[NDArray[np.uint8] | InputError], max_rows: Callable[[], int]
    ) -> Iterator[NDArray[np.uint8]]:
        """Take all items, a batch at a time."""
        while (batch := self.take_batch(items, max_rows())) is not None:
            yield batch

    def add_answer(self, answer: Answer, on_error: OnError) -> None:
        """Note what came back for the next rows.

        Raises:
            ServerError: a row was refused, and `on_error` is "raise". Without an index if all of
                several were: then no item is to blame, but the server.
        """
        for row, error in answer.refused.items():
            if on_error == "raise" and len(answer.refused) == len(answer.embeddings) > 1:
                raise error
            row += self._num_answered
            if on_error == "raise":
                item = self.row_by_item.index(row)
                raise blame_item(error, self.first_index + item) from error
            self._refused[row] = error
        self._answers.append(answer.embeddings)
        self._num_answered += len(answer.embeddings)

    def finish(self, dim: int) -> Encoded:
        """Return what came of all items."""
        for item, row in enumerate(self.row_by_item):
            if row in self._refused:
                self.failures[item] = blame_item(self._refused[row], self.first_index + item)
        is_good = np.ones(len(self.row_by_item), bool)
        is_good[list(self.failures)] = False
        rows = np.asarray(self.row_by_item, np.intp)[is_good]
        answers = join(self._answers, dim=dim)
        return Encoded(
            embeddings=answers[rows],
            indices=np.nonzero(is_good)[0] + self.first_index,
            failures=tuple(self.failures[item] for item in sorted(self.failures)),
        )


def _digest(item: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(item).data, digest_size=16).digest()


def number_parts(
    items: Iterable[NDArray[np.uint8] | InputError], max_rows: Callable[[], int]
) -> Iterator[tuple[Gathering, NDArray[Any] | None]]:
    """Cut items into parts that are gathered each by itself, with the batch of each.

    A part of nothing but failures has no batch.
    """
    source, first_index = iter(items), 0
    while True:
        part = Gathering(first_index)
        batch = part.take_batch(source, max_rows(), MAX_ITEMS)
        if not part.row_by_item:
            return
        yield part, batch
        first_index += len(part.row_by_item)
