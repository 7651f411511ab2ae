"""Shards of named drawings as batches of (picture, caption) pairs."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clip_rt.prompts import fill
from clip_rt.tokenizer import tokenize
from training.augment import augment
from training.drawings import letters

CAPTION_TEMPLATES = (
    "a photo of a {}.", "a drawing of a {}.", "a drawing of {}", "an icon of {}", "{} icon",
    "an emoji of {}", "the {} emoji", "a picture of a {}", "a line drawing of {}", "{} symbol",
)  # fmt: skip
"""Frames of a name, so that the model answers to whatever template its user prefers."""

SHORT_CAPTION_TOKENS = 24
LONG_CAPTIONS_ONE_STEP_IN = 16
"""Every so many steps the captions are lists of all that is known, up to the context length."""


@dataclass(frozen=True)
class Drawings:
    """Pictures in memory with what each is called."""

    pixels: np.ndarray
    """uint8 (N, S, S, 4), RGBA."""
    records: list[dict[str, Any]]
    """The metadata of each, as `training.drawings` wrote it."""

    def __len__(self) -> int:
        return len(self.records)


def load_drawings(shards: Sequence[Path], *, progress: bool = True) -> Drawings:
    """Read every sample of the shards into memory.

    Only PNG, WebP and JSON are decoded, whatever else a shard may hold.
    """
    pixels, records = [], []
    urls = [str(path) for path in shards]
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    for sample in tqdm(samples, desc="reading drawings", unit="drawing", disable=not progress):
        picture = sample.get("webp") or sample["png"]
        image = Image.open(io.BytesIO(picture), formats=("PNG", "WEBP"))
        pixels.append(np.asarray(image.convert("RGBA")))
        records.append(json.loads(sample["json"]))
    return Drawings(np.stack(pixels), records)


def caption(record: dict[str, Any], rng: random.Random) -> str:
    """Say what a drawing shows, in one of the many ways its metadata allows."""
    name, aliases, keywords = record["name"], record["aliases"], record["keywords"]
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


@dataclass(frozen=True)
class Batch:
    """Pairs for one update."""

    image_BCSS: Tensor
    tokens_BL: Tensor
    group_B: Tensor
    """int64 (B,); equal for drawings of one name."""


def cut_tokens(texts: Sequence[str], *, context_length: int) -> Tensor:
    """Tokenise, cut to `context_length`, drop the columns that only pad."""
    tokens_BL = tokenize(texts, context_length=context_length, truncate=True)
    used = int((tokens_BL != 0).any(axis=0).sum())
    return torch.from_numpy(tokens_BL[:, :used])


class DrawingBatches:
    """An endless stream of augmented batches, one part emoji, the rest icons.

    The same seed gives the same stream.
    """

    def __init__(
        self,
        drawings: Drawings,
        *,
        batch_size: int,
        emoji_fraction: float,
        context_length: int,
        seed: int,
    ) -> None:
        self.drawings = drawings
        self.batch_size = batch_size
        self.context_length = context_length
        is_emoji = np.array([record["emoji"] is not None for record in drawings.records])
        self._pools = [
            (np.flatnonzero(is_emoji), round(batch_size * emoji_fraction)),
            (np.flatnonzero(~is_emoji), batch_size - round(batch_size * emoji_fraction)),
        ]
        self._palette = torch.tensor([record["palette"] for record in drawings.records])
        group_by_name: dict[str, int] = {}
        names = [letters(record["name"]) or record["name"] for record in drawings.records]
        self._group = torch.tensor([group_by_name.setdefault(n, len(group_by_name)) for n in names])
        self._seed = seed

    def __iter__(self) -> Iterator[Batch]:
        rng = random.Random(self._seed)
        choose = np.random.default_rng(self._seed)
        generator = torch.Generator().manual_seed(self._seed)
        streams = [(_shuffled(pool, choose), count) for pool, count in self._pools if len(pool)]
        step = 0
        while True:
            index = np.array([next(stream) for stream, count in streams for _ in range(count)])
            long = step % LONG_CAPTIONS_ONE_STEP_IN == LONG_CAPTIONS_ONE_STEP_IN - 1
            describe = long_caption if long else caption
            texts = [describe(self.drawings.records[i], rng) for i in index]
            limit = self.context_length if long else min(SHORT_CAPTION_TOKENS, self.context_length)
            rgba = torch.from_numpy(self.drawings.pixels[index])
            yield Batch(
                augment(rgba, self._palette[index], generator),
                cut_tokens(texts, context_length=limit),
                self._group[index],
            )
            step += 1


def _shuffled(pool: np.ndarray, choose: np.random.Generator) -> Iterator[int]:
    """Yield every member of the pool once in random order, then all again in another."""
    while True:
        yield from choose.permutation(pool).tolist()
