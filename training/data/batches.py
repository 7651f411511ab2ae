"""What a training step reads: pairs as tensors, in an order anyone can seek in.

A stream of batches is an object with `stream(start_step, *, rank=0, world_size=1)`. Batch k is a
pure function of the seed, k and the global batch size, never of what was read before; rank r gets
rows r::world_size of it. So a run goes on at any step, on any number of ranks, as if it had never
stopped. Randomness therefore has no state: each use derives its own from `rng` or `torch_rng`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_rt.errors import InputError
from clip_rt.inputs.tokenizer import tokenize
from clip_rt.specs import END_OF_TEXT
from training.data.pairs import Skips

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Batch:
    """Pairs for one update."""

    image_BCSS: Tensor
    """float32 (B, 3, S, S), normalised."""
    tokens_BL: Tensor
    """Integers (B, L); L is what the longest text of these rows needs."""
    group_B: Tensor
    """int64 (B,); equal for pairs whose texts mean the same. Comparable between ranks."""
    length_B: Tensor
    """int64 (B,), on the CPU: tokens of each text that the text tower must read, its padding left
    out where that changes no embedding."""


class BatchStream(Protocol):
    """A source of batches that can begin at any step."""

    skips: Skips
    """What this process found to be bad so far, and replaced."""

    def stream(self, start_step: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield this rank's part of batches `start_step`, `start_step` + 1, ... without end."""
        ...


class Purpose(IntEnum):
    """What random numbers are for, so that no two uses share any."""

    ORDER = 1
    AUGMENTATION = 2
    CAPTION = 3
    REPLACEMENT = 4
    MIXTURE = 5


def rng(purpose: Purpose, seed: int, *where: int) -> np.random.Generator:
    """Return the generator of one place: `where` is an epoch, or a step and a row, from 0."""
    # The purpose comes first because NumPy pads short keys with zeros: (1, 2) equals (1, 2, 0).
    return np.random.default_rng((purpose, seed, *where))


def torch_rng(purpose: Purpose, seed: int, *where: int) -> torch.Generator:
    """As `rng`, for torch on the CPU."""
    state = np.random.SeedSequence((purpose, seed, *where)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def check_seed(seed: int) -> int:
    """Return `seed`; raise InputError unless it is within 0 and 2^32 - 1."""
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed is {seed}; it must be within 0 and {MAX_SEED}.")
    return seed


def check_rank(start_step: int, rank: int, world_size: int, *, batch_size: int) -> None:
    """Raise InputError unless each of `world_size` ranks has an equal part of every batch."""
    if start_step < 0:
        raise InputError(f"start_step is {start_step}; steps are counted from 0.")
    if world_size < 1 or not 0 <= rank < world_size:
        raise InputError(f"rank is {rank} of {world_size}; it must be within 0 and world_size - 1.")
    if batch_size % world_size:
        raise InputError(
            f"a batch of {batch_size} pairs cannot be split evenly over {world_size} processes. "
            f"Make --batch-size a multiple of {world_size}."
        )


class Shuffled:
    """All of range(`num_items`) in random order, then again in another, without end.

    Any part can be read at the cost of its epochs' permutations, of which two are kept.
    """

    def __init__(self, num_items: int, *, seed: int, key: int = 0) -> None:
        """Shuffle by `seed`; sequences with different `key` are independent."""
        if num_items < 1:
            raise InputError("there is nothing to shuffle: the data set is empty.")
        self.num_items = num_items
        self._seed = check_seed(seed)
        self._key = key
        self._orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """Return items `start` to `start` + `count` of the sequence, int64 (count,)."""
        parts = []
        end = start + count
        while start < end:
            epoch, offset = divmod(start, self.num_items)
            parts.append(self._order(epoch)[offset : offset + end - start])
            start += len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            generator = rng(Purpose.ORDER, self._seed, self._key, epoch)
            self._orders[epoch] = generator.permutation(self.num_items)
            if len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]


def count_tokens(tokens_BL: Tensor) -> Tensor:
    """Return how many tokens each text of OpenAI's tokenizer has, int64 (B,).

    Padding cannot be told from a text's tokens by its id: 0 is also the exclamation mark.
    """
    return 1 + (tokens_BL.cpu() == END_OF_TEXT).int().argmax(dim=1)


def cut_tokens(texts: Sequence[str], *, context_length: int) -> Tensor:
    """Tokenise, cut to `context_length`, drop the columns that only pad; int32 (N, L)."""
    tokens_BL = tokenize(texts, context_length=context_length, truncate=True)
    used = int((tokens_BL != 0).any(axis=0).sum())
    return torch.from_numpy(tokens_BL[:, :used])
