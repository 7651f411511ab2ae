"""The user's own images and texts in, what an export is calibrated on and measured by out.

A folder of images for each class, a table, or a WebDataset shard: what `training.evaluate` reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import ImageError, InputError
from clip_rt.inputs.decoding import DEFAULT_LIMITS, Limits
from clip_rt.inputs.prompts import DEFAULT_TEMPLATE, fill
from clip_rt.inputs.tokenizer import OpenAITokenizer, TextTokenizer
from clip_rt.inputs.transform import prepare
from clip_rt.requests.batches import plan_texts
from clip_rt.specs import EncoderFacts
from training.evaluation.class_names import NameTable, name_classes, sort_ids
from training.evaluation.labelled import Sample, read_samples

NO_TEXT = -1


@dataclass(frozen=True)
class Samples:
    """Images, and the texts they are told apart by."""

    name: str
    """Of the file or folder they are from."""
    pixels_NSSC: NDArray[np.uint8]
    token_ids: tuple[tuple[int, ...], ...]
    """Of each of M texts, unpadded: a prompt for every class, or the captions."""
    right_N: NDArray[np.int64]
    """Which text belongs to an image; `NO_TEXT` where none does."""

    def image_batches(self, max_rows: int) -> Iterable[NDArray[np.uint8]]:
        """Return the pixels, uint8 (n, S, S, 3), n up to `max_rows`."""
        starts = range(0, len(self.pixels_NSSC), max_rows)
        return [self.pixels_NSSC[start : start + max_rows] for start in starts]

    def fingerprint(self) -> str:
        """Return a hash of everything in it."""
        digest = hashlib.sha256(self.pixels_NSSC.tobytes())
        digest.update(repr((self.pixels_NSSC.shape, self.token_ids)).encode())
        return digest.hexdigest()


def load_samples(
    path: Path,
    facts: EncoderFacts,
    *,
    tokenizer: TextTokenizer | None = None,
    num_images: int,
    table: NameTable | None = None,
    allow_outside: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> Samples:
    """Read a data set and prepare some of its images, the same ones each time.

    Args:
        path: What `training.evaluation.labelled.read_samples` reads.
        facts: Of the model they are for.
        tokenizer: Of the model; OpenAI's where it is None.
        num_images: How many to keep, chosen at random; all where there are fewer.
        table: Names of the classes, where their ids say nothing.
        allow_outside: Whether paths of a table, and links in a folder, may lead out of it.
        limits: How large an image may be.

    Raises:
        InputError: the data cannot be read, or a class has no name.
        ImageError: an image cannot be used; says which.
    """
    kept, texts, right_N = read_choices(
        path, num_images=num_images, table=table, allow_outside=allow_outside, limits=limits
    )
    tokenizer = tokenizer or OpenAITokenizer(facts.context_length)
    token_ids = [
        tokenizer.encode_text(text, index=index, truncate=True) for index, text in enumerate(texts)
    ]
    return Samples(
        name=path.name,
        pixels_NSSC=np.stack([_prepare(sample, facts, limits) for sample in kept]),
        token_ids=tuple(map(tuple, token_ids)),
        right_N=right_N,
    )


def read_choices(
    path: Path,
    *,
    num_images: int,
    table: NameTable | None = None,
    allow_outside: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[list[Sample], list[str], NDArray[np.int64]]:
    """Read images as they are, the M texts they are told apart by, and which text is right, (N,).

    The arguments and errors are those of `load_samples`; `NO_TEXT` stands where none is right.
    """
    samples = read_samples([path], allow_outside=allow_outside, max_bytes=limits.max_bytes)
    kept, ids = _choose(samples, num_images)
    if ids:
        ids = sort_ids(ids)
        own = [each.label for each in kept]
        texts = [fill(DEFAULT_TEMPLATE, name) for name in name_classes(ids, table)]
    else:
        own = [each.captions[0] if each.captions else None for each in kept]
        texts = ids = list(dict.fromkeys(text for text in own if text is not None))
    row = {each: index for index, each in enumerate(ids)}
    right = [NO_TEXT if each is None else row[each] for each in own]
    return kept, texts, np.array(right, np.int64)


def calibration_batches(
    samples: Sequence[Samples], *, length_tokens: int | None = None, pad_id: int = 0
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.int32]]]:
    """Return single images, uint8 (1, S, S, 3), and single texts, int32 (1, L).

    Args:
        samples: Of the user.
        length_tokens: To pad every text to, where the model reads padding; None pads none.
        pad_id: What it is padded with.
    """
    images = [batch for each in samples for batch in each.image_batches(1)]
    ids = list(dict.fromkeys(ids for each in samples for ids in each.token_ids))
    buckets = () if length_tokens is None else (length_tokens,)
    texts = list(plan_texts(ids, max_rows=1, buckets=buckets, pad_id=pad_id).batches)
    # In no order, so that any first few of them are of every length and sample.
    rng = np.random.default_rng(0)
    return (
        [images[row] for row in rng.permutation(len(images))],
        [texts[row] for row in rng.permutation(len(texts))],
    )


def _choose(samples: Iterable[Sample], count: int) -> tuple[list[Sample], list[str]]:
    """Keep `count` samples, each as likely as any other, and every class there is.

    Source: Vitter 1985, "Random Sampling with a Reservoir", algorithm R.
    """
    rng = np.random.default_rng(0)
    kept: list[tuple[int, Sample]] = []
    ids: dict[str, None] = {}
    for number, sample in enumerate(samples):
        if sample.label is not None:
            ids[sample.label] = None
        if len(kept) < count:
            kept.append((number, sample))
        elif (place := int(rng.integers(number + 1))) < count:
            kept[place] = (number, sample)
    return [sample for _, sample in sorted(kept, key=lambda item: item[0])], list(ids)


def _prepare(sample: Sample, facts: EncoderFacts, limits: Limits) -> NDArray[np.uint8]:
    try:
        return prepare(
            sample.image,
            side_px=facts.side_px,
            resizing=facts.resizing,
            max_pixels=limits.max_pixels,
            max_bytes=limits.max_bytes,
        )
    except ImageError as error:
        raise InputError(f"{sample.key}: {error}") from error
