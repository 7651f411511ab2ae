"""Sources of (image, caption) pairs in, batches out; decoding runs on worker processes.

What a batch holds depends on the seed, the step, the sources and the batch size: neither on how
many workers or ranks there are, nor on what was read before, nor on the samples that are bad.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from clip_rt.errors import InputError
from clip_rt.inputs.tokenizer import TextTokenizer
from clip_rt.specs import CLIP_MEAN, CLIP_STD, Channels, EncoderFacts
from training.data.batches import Batch, check_rank, check_seed
from training.data.mixture import Mixture
from training.data.pair_reader import Reader, Rows, Ticket
from training.data.pairs import Skips, Source
from training.data.photos import PhotoAugmentation
from training.data.shards import PipedShards

NUM_CHECKED = 1000
"""So many samples are drawn before their share of bad ones is judged."""

WORKER_END_S = 5.0
"""So long a worker whose socket closed may take to end."""


class PairBatches:
    """An endless stream of augmented batches of a user's own pairs.

    `skips` grows while batches are taken and says what was left out, on this rank.
    """

    def __init__(
        self,
        sources: Source | Sequence[Source] | PipedShards,
        *,
        batch_size: int,
        facts: EncoderFacts,
        tokenizer: TextTokenizer,
        seed: int,
        weights: Sequence[float] | None = None,
        augmentation: PhotoAugmentation | None = None,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        max_bad_share: float = 0.2,
    ) -> None:
        """Plan the batches; nothing is read yet.

        Args:
            sources: One or several; or shards that can only be streamed, alone.
            batch_size: Pairs per batch, over all ranks.
            facts: How the model is fed.
            tokenizer: Of the model; captions that are too long for it are cut.
            seed: Of order, choice of captions and augmentation.
            weights: How often each source is drawn from, in proportion; None is by its size, so
                that every pair comes once per epoch.
            augmentation: What happens to images; None is open_clip's default crop.
            num_workers: Processes that decode; 0 decodes in this one.
            device: Where images are put. To a GPU, pixels travel as pinned bytes and are
                normalised there. Tokens and groups stay on the CPU, in pinned memory then.
            max_bad_share: Of the first `NUM_CHECKED` pairs drawn; more is an error.

        Raises:
            InputError: a size is not positive, weights do not fit, or streams are mixed.
        """
        if not 0 <= max_bad_share <= 1:
            raise InputError(f"max_bad_share is {max_bad_share}; it must be within 0 and 1.")
        for name, size in (("batch_size", batch_size), ("side_px", facts.side_px)):
            if size < 1:
                raise InputError(f"{name} is {size}; it must be at least 1.")
        self._facts = facts
        self.batch_size = batch_size
        self._pipe = sources if isinstance(sources, PipedShards) else None
        self._sources = _as_sources(sources)
        self._seed = check_seed(seed)
        if self._pipe is None:
            sizes = [len(source) for source in self._sources]
            self._mixture = Mixture(sizes, weights, seed=seed)
        elif weights is not None:
            raise InputError("streamed shards cannot be mixed by weight; name each set by itself.")
        self._reader = Reader(
            self._sources,
            facts=facts,
            tokenizer=tokenizer,
            seed=seed,
            augmentation=augmentation or PhotoAugmentation(),
        )
        self._num_workers = num_workers
        self._device = torch.device(device)
        self._max_bad_share = max_bad_share
        self._num_good = self._num_filled = 0
        self._is_judged = False
        self._known = [np.zeros(len(source), np.bool_) for source in self._sources]
        """Of each source, which samples were read so far: each is counted once."""
        self.skips = self._pipe.skips if self._pipe is not None else Skips()
        for source in self._sources:
            self.skips.merge(source.skips)
        self._skipped_before = self.skips.total
        self._bad = Skips()
        """As `skips`, but each sample counts once, however often it is drawn."""
        self._bad.merge(self.skips)

    def stream(self, start_step: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield this rank's rows of batches `start_step`, `start_step` + 1, ... without end.

        With random access: rows r::`world_size` of the same batch, bit for bit; only columns of
        tokens that pad may be more or fewer. A bad sample is replaced by another of its source,
        drawn from seed, step and row. With `PipedShards` see there for what is exact; a bad
        sample's place is taken by a good one of the same rows.

        Workers start with the first batch and end when the iterator is closed.

        Raises:
            InputError: the batch cannot be split evenly, or too much of the data is bad.
            RuntimeError: a worker was killed or crashed.
        """
        check_rank(start_step, rank, world_size, batch_size=self.batch_size)
        return self._stream(start_step, rank, world_size)

    def _stream(self, start_step: int, rank: int, world_size: int) -> Iterator[Batch]:
        local_size = self.batch_size // world_size
        # All workers share each batch, so that the first one is there soon.
        chunk_size = -(-local_size // max(1, self._num_workers))
        chunks_per_batch = -(-local_size // chunk_size)
        loader = DataLoader(
            self._reader,
            batch_sampler=_chunks(self._tickets(start_step, rank, world_size), chunk_size),
            num_workers=self._num_workers,
            collate_fn=_unchanged,
            pin_memory=self._device.type == "cuda",
            # Its own, because a loader takes a number from torch's otherwise: of weights, dropout.
            generator=torch.Generator(),
        )
        chunks = iter(loader)
        while True:
            yield self._assemble(_take(chunks, chunks_per_batch))

    def _tickets(self, start_step: int, rank: int, world_size: int) -> Iterator[list[Ticket]]:
        """Yield the rows of batch after batch."""
        rows = range(rank, self.batch_size, world_size)
        if self._pipe is not None:
            pairs = self._pipe.stream(seed=self._seed, rank=rank, world_size=world_size)
            pairs = islice(pairs, start_step * len(rows), None)
            for step in count(start_step):
                yield [Ticket(step, row, 0, -1, next(pairs)) for row in rows]
        for step in count(start_step):
            source, index = self._mixture.take(step * self.batch_size, self.batch_size)
            yield [Ticket(step, row, int(source[row]), int(index[row])) for row in rows]

    def _assemble(self, chunks: list[Rows]) -> Batch:
        for chunk in chunks:
            self._count(chunk)
        tokens_BL = torch.cat([chunk.tokens_NL for chunk in chunks])
        group_B = torch.cat([chunk.group_N for chunk in chunks])
        pixels = torch.cat(
            [chunk.pixels_NSSC.to(self._device, non_blocking=True) for chunk in chunks]
        )
        length_B = torch.cat([chunk.length_N for chunk in chunks])
        is_good_B = length_B.numpy() > 0
        self._judge(is_good_B)
        if not is_good_B.all():
            good = is_good_B.nonzero()[0]
            places = np.arange(len(is_good_B))
            rows = torch.from_numpy(np.where(is_good_B, places, good[places % len(good)]))
            tokens_BL, group_B, pixels = tokens_BL[rows], group_B[rows], pixels[rows]
            length_B = length_B[rows]
        tokens_BL = tokens_BL[:, : int(length_B.numpy().max())]
        if self._device.type == "cuda":
            tokens_BL, group_B = tokens_BL.pin_memory(), group_B.pin_memory()
        image_BCSS = normalise_pixels(pixels, self._facts.mean, self._facts.std)
        return Batch(image_BCSS, tokens_BL, group_B, length_B)

    def _count(self, rows: Rows) -> None:
        self._num_filled += len(rows.good)
        self._num_good += sum(self._is_new(*sample) for sample in rows.good)
        for bad in rows.bad:
            self.skips.add(bad.reason, bad.example)
            if self._is_new(bad.source, bad.pair_index):
                self._bad.add(bad.reason, bad.example)

    def _is_new(self, source: int, index: int) -> bool:
        if index < 0:
            return True  # Streamed; each comes once in an epoch.
        known_N = self._known[source]
        is_new = not known_N[index]
        known_N[index] = True
        return is_new

    def _judge(self, is_good_B: NDArray[np.bool_]) -> None:
        """Give up on data of which too much is bad."""
        num_bad_draws = self.num_read - self._num_filled
        is_due = self.num_read >= NUM_CHECKED and not self._is_judged
        self._is_judged |= is_due
        is_hopeless = not is_good_B.any() or (self._pipe is None and not is_good_B.all())
        if is_hopeless or (is_due and num_bad_draws > self._max_bad_share * self.num_read):
            # A streamed shard leaves out samples that never reach a row.
            bad = self._bad if self._pipe is None else self.skips
            num_bad = bad.total - self._skipped_before
            found = f"{num_bad} of the first {self._num_good + num_bad} samples are bad"
            if is_hopeless:
                raise InputError(f"{found}, so that a batch cannot be filled: {bad}. Repair them.")
            raise InputError(
                f"{found}; at most {self._max_bad_share:.0%} may be: {bad}. Repair the data, or "
                "raise --max-bad-share."
            )

    @property
    def num_read(self) -> int:
        """Pairs tried so far, good and bad."""
        return self._num_filled + self.skips.total - self._skipped_before


def normalise_pixels(
    pixels_NSSC: Tensor, mean: Channels = CLIP_MEAN, std: Channels = CLIP_STD
) -> Tensor:
    """Turn uint8 (N, S, S, 3) into what the image tower takes: float32 (N, 3, S, S), mean and std.

    Strides stay as they are, which torch calls channels_last.
    """
    mean_C, std_C = (torch.tensor(each, device=pixels_NSSC.device) * 255 for each in (mean, std))
    return pixels_NSSC.float().sub_(mean_C).div_(std_C).permute(0, 3, 1, 2)


def _as_sources(sources: Source | Sequence[Source] | PipedShards) -> list[Source]:
    if isinstance(sources, PipedShards):
        return []
    listed: list[Any] = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    if any(isinstance(source, PipedShards) for source in listed):
        raise InputError("streamed shards cannot be mixed with others; pass them alone.")
    return listed


def _chunks(batches: Iterator[list[Ticket]], size: int) -> Iterator[list[Ticket]]:
    for batch in batches:
        for start in range(0, len(batch), size):
            yield batch[start : start + size]


def _take(chunks: Iterator[Rows], num_chunks: int) -> list[Rows]:
    try:
        return list(islice(chunks, num_chunks))
    except (ConnectionError, EOFError):
        # The socket of a killed worker closes before it has ended, and torch passes on what the
        # socket says, an EOFError without a word. At the end itself torch raises, here, and says
        # which worker it was and what killed it.
        time.sleep(WORKER_END_S)
        raise


def _unchanged(rows: Any) -> Any:
    return rows  # not collated: a reader fills whole chunks
