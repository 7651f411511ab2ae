"""Shards of named drawings in, batches of (picture, caption) pairs out; all pictures in memory."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from clip_rt.errors import InputError
from clip_rt.inputs.decoding import MAX_BYTES, open_image
from clip_rt.inputs.prompts import fill
from training.data.augment import Dice, augment
from training.data.batches import (
    Batch,
    Purpose,
    Shuffled,
    check_rank,
    check_seed,
    count_tokens,
    cut_tokens,
    torch_rng,
)
from training.data.pairs import Skips
from training.data.tar_samples import read_shard
from training.drawings import letters

CAPTION_TEMPLATES = (
    "a photo of a {}.", "a drawing of a {}.", "a drawing of {}", "an icon of {}", "{} icon",
    "an emoji of {}", "the {} emoji", "a picture of a {}", "a line drawing of {}", "{} symbol",
)  # fmt: skip
"""Frames of a name, so that the model answers to whatever template its user prefers."""

SHORT_CAPTION_TOKENS = 24
LONG_CAPTIONS_ONE_STEP_IN = 16
"""Every so many steps the captions are lists of all that is known, up to the context length."""
MAX_PIXELS = 1024 * 1024
"""Of one drawing; they are kept in memory."""


@dataclass(frozen=True)
class Drawings:
    """Pictures in memory with what each is called."""

    pixels: NDArray[np.uint8]
    """uint8 (N, S, S, 4), RGBA."""
    records: list[dict[str, Any]]
    """The metadata of each, as `training.drawings` wrote it."""

    def __len__(self) -> int:
        return len(self.records)


def load_drawings(shards: Sequence[Path], *, progress: bool = True) -> Drawings:
    """Read every sample of the shards into memory.

    Only PNG, WebP and JSON are decoded, whatever else a shard may hold.

    Raises:
        InputError: a shard is damaged, or holds something else than drawings with their names.
    """
    pixels, records = [], []
    samples = chain.from_iterable(map(read_shard, shards))
    for name, members in tqdm(
        samples, desc="reading drawings", unit="drawing", disable=not progress
    ):
        picture = members.get("webp") or members.get("png")
        if picture is None or "json" not in members:
            raise InputError(
                f"sample {name!r} is no drawing: .webp or .png, and .json, are needed."
            )
        try:
            image = open_image(picture, max_pixels=MAX_PIXELS, max_bytes=MAX_BYTES)
            pixels.append(np.asarray(image.convert("RGBA")))
            records.append(json.loads(members["json"]))
        # On damaged bytes Pillow's decoders raise nearly anything.
        except Exception as error:
            raise InputError(f"sample {name!r} cannot be decoded: {error}") from error
    return Drawings(np.stack(pixels), records)


def caption(record: dict[str, Any], rng: random.Random) -> str:
    """Say what a drawing shows, in one of the many ways its metadata allows."""
    name: str = record["name"]
    aliases, keywords = record["aliases"], record["keywords"]
    kind = rng.random()
    if aliases and kind < 0.15:
        name = rng.choice(aliases)
    elif keywords and kind < 0.25:
        name = f"{name}, {rng.choice(keywords)}"
    elif keywords and record["emoji"] and kind < 0.32:
        name = ", ".join(rng.sample(keywords, min(len(keywords), 3)))
    if rng.random() < 0.35:
        return name
    return fill(rng.choice(CAPTION_TEMPLATES), name)


def long_caption(record: dict[str, Any], rng: random.Random) -> str:
    """List everything a drawing is called, in random order behind its name."""
    others = [*record["aliases"], *record["keywords"]]
    rng.shuffle(others)
    return ", ".join([record["name"], *others])


class DrawingBatches:
    """An endless stream of augmented batches, one part emoji, the rest icons."""

    def __init__(
        self,
        drawings: Drawings,
        *,
        batch_size: int,
        emoji_fraction: float,
        context_length: int,
        seed: int,
        random_convolutions: float = 0.2,
    ) -> None:
        self.drawings = drawings
        self._random_convolutions = random_convolutions
        self.skips = Skips()  # A bad drawing ends the run before it begins.
        self.batch_size = batch_size
        self.context_length = context_length
        self._seed = check_seed(seed)
        is_emoji = np.array([record["emoji"] is not None for record in drawings.records], bool)
        num_emoji = round(batch_size * emoji_fraction)
        if is_emoji.all() or not is_emoji.any():
            num_emoji = batch_size if is_emoji.all() else 0
        self._parts = [
            (np.flatnonzero(pool), size, Shuffled(int(pool.sum()), seed=seed, key=key))
            for key, (pool, size) in enumerate(
                [(is_emoji, num_emoji), (~is_emoji, batch_size - num_emoji)]
            )
            if size
        ]
        self._palette = torch.tensor([record["palette"] for record in drawings.records])
        group_by_name: dict[str, int] = {}
        names = [letters(record["name"]) or record["name"] for record in drawings.records]
        self._group = torch.tensor([group_by_name.setdefault(n, len(group_by_name)) for n in names])

    def stream(self, start_step: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield this rank's rows of batches `start_step`, `start_step` + 1, ... without end.

        Rows r::`world_size` of the same batch, bit for bit; only columns of tokens that pad may
        be more or fewer. Groups are equal for drawings of one name.

        Raises:
            InputError: the batch cannot be split evenly.
        """
        check_rank(start_step, rank, world_size, batch_size=self.batch_size)
        rows = slice(rank, None, world_size)
        return (self._batch(step, rows) for step in count(start_step))

    def _batch(self, step: int, rows: slice) -> Batch:
        index = np.concatenate(
            [pool[order.take(step * size, size)] for pool, size, order in self._parts]
        )[rows]
        long = step % LONG_CAPTIONS_ONE_STEP_IN == LONG_CAPTIONS_ONE_STEP_IN - 1
        describe = long_caption if long else caption
        limit = self.context_length if long else min(SHORT_CAPTION_TOKENS, self.context_length)
        texts = [
            # Seeded from text: the same in every process, which the hash of a tuple is not.
            describe(self.drawings.records[i], random.Random(f"{self._seed} {step} {row}"))
            for i, row in zip(index, range(self.batch_size)[rows], strict=True)
        ]
        dice = Dice(
            torch_rng(Purpose.AUGMENTATION, self._seed, step),
            batch_size=self.batch_size,
            rows=rows,
        )
        rgba = torch.from_numpy(self.drawings.pixels[index])
        tokens_BL = cut_tokens(texts, context_length=limit)
        return Batch(
            augment(
                rgba,
                self._palette[index],
                dice,
                random_convolutions=self._random_convolutions,
            ),
            tokens_BL,
            self._group[index],
            count_tokens(tokens_BL),
        )
