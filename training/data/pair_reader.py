"""Tickets in, the rows of a batch they stand for out; runs in the worker processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from clip_rt.errors import ImageError, TextError
from clip_rt.inputs.tokenizer import TextTokenizer, pad
from clip_rt.specs import EncoderFacts
from training.data.batches import Purpose, rng
from training.data.pairs import BadSampleError, Pair, Source
from training.data.photos import PhotoAugmentation

_MAX_TRIES = 100
"""Samples tried for one row of a batch before the data count as hopeless."""


class Ticket(NamedTuple):
    """One row of one batch, to be filled by a worker."""

    step: int
    row: int
    source: int
    pair_index: int
    """Of the pair in its source; without meaning when `pair` is there."""
    pair: Pair | None = None
    """A pair that came by a stream."""


class Bad(NamedTuple):
    """A sample that was tried and cannot be used."""

    source: int
    pair_index: int
    """Of the pair in its source; -1 if it came by a stream."""
    reason: str
    example: str


class Rows(NamedTuple):
    """Rows a worker has filled; those it could not are zeros."""

    pixels_NSSC: Tensor
    """uint8 (N, S, S, 3)."""
    tokens_NL: Tensor
    """int32 (N, context_length)."""
    length_N: Tensor
    """int64 (N,): tokens of each text, see `Batch.length_B`; 0 in rows that none could fill."""
    group_N: Tensor
    """int64 (N,)."""
    good: list[tuple[int, int]]
    """Source and index of each pair that fills a row."""
    bad: list[Bad]
    """Each time that one was tried, so that one sample may be among them often."""


class Reader(Dataset[Rows]):
    """Fills rows."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        facts: EncoderFacts,
        tokenizer: TextTokenizer,
        seed: int,
        augmentation: PhotoAugmentation,
    ) -> None:
        self._sources = sources
        self._facts = facts
        self._tokenizer = tokenizer
        self._seed = seed
        self._augmentation = augmentation

    def __getitems__(self, tickets: list[Ticket]) -> Rows:
        """Fill the rows of some tickets; torch's loader calls this with each chunk."""
        good: list[tuple[int, int]] = []
        bad: list[Bad] = []
        facts = self._facts
        pixels = np.zeros((len(tickets), facts.side_px, facts.side_px, 3), np.uint8)
        token_ids: list[list[int]] = []
        groups = []
        for ticket, pixels_SSC in zip(tickets, pixels, strict=True):
            ids, group = self._fill(ticket, pixels_SSC, good, bad)
            token_ids.append(ids)
            groups.append(group)
        tokens_NL = pad(
            token_ids, length_tokens=facts.context_length, pad_id=facts.tokenization.pad_id
        )
        whole = 0 if facts.is_any_length_exact else facts.context_length
        return Rows(
            torch.from_numpy(pixels),
            torch.from_numpy(tokens_NL),
            torch.tensor([max(len(ids), whole) if ids else 0 for ids in token_ids]),
            torch.tensor(groups),
            good,
            bad,
        )

    def _fill(
        self,
        ticket: Ticket,
        pixels_SSC: NDArray[np.uint8],
        good: list[tuple[int, int]],
        bad: list[Bad],
    ) -> tuple[list[int], int]:
        """Read a ticket's pair, or else the first good one of its replacements.

        Writes the pixels; returns token ids, none if all were bad, and group.
        """
        for attempt in range(1 if ticket.pair else _MAX_TRIES):
            index = self._choose(ticket, attempt)
            try:
                pair = ticket.pair or self._sources[ticket.source][index]
                filled = self._read(pair, ticket, pixels_SSC)
            except BadSampleError as error:
                bad.append(Bad(ticket.source, index, error.reason, error.example))
            else:
                good.append((ticket.source, index))
                return filled
        return [], 0

    def _choose(self, ticket: Ticket, attempt: int) -> int:
        if attempt == 0 or ticket.pair:
            return ticket.pair_index
        spare = rng(Purpose.REPLACEMENT, self._seed, ticket.step, ticket.row, attempt)
        return int(spare.integers(len(self._sources[ticket.source])))

    def _read(
        self, pair: Pair, ticket: Ticket, pixels_SSC: NDArray[np.uint8]
    ) -> tuple[list[int], int]:
        where = ticket.step, ticket.row
        chosen = rng(Purpose.CAPTION, self._seed, *where).integers(len(pair.captions))
        try:
            token_ids = self._encode(pair.captions[int(chosen)])
            meaning = token_ids if pair.label is None else self._encode(pair.label)
        except TextError as error:
            raise BadSampleError("caption is no text", pair.name) from error
        try:
            generator = rng(Purpose.AUGMENTATION, self._seed, *where)
            pixels_SSC[:] = self._augmentation(
                pair.image, side_px=self._facts.side_px, rng=generator
            )
        except ImageError as error:
            raise BadSampleError("unusable image", f"{pair.name}: {error}") from error
        # A number that all ranks and runs agree on.
        digest = hashlib.blake2b(np.array(meaning, np.int64).tobytes(), digest_size=8).digest()
        return token_ids, int.from_bytes(digest, "little", signed=True)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode_text(text, truncate=True)
