"""A checkpoint and labelled images on disk in, a model and embeddings with their classes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from clip_rt.errors import ImageError, InputError
from clip_rt.inputs.decoding import DEFAULT_LIMITS, ImageInput, Limits
from clip_rt.specs import Activation
from training.dual_encoder import DualEncoder
from training.evaluation.class_names import NameTable, name_classes, read_name_table, sort_ids
from training.evaluation.embed import embed_images, open_model
from training.evaluation.labelled import Sample, read_samples


@dataclass(frozen=True, kw_only=True)
class Source(Limits):
    """What every command that looks at labelled images is told."""

    checkpoint: str | None = None
    """Weights: a file, a folder in the hub's layout, hf:owner/name@revision, or openai. Models of
    other libraries that have their own need none."""
    data: tuple[Path, ...]
    """A folder with one folder of images for each class; a .csv or .jsonl with the columns image
    and label, or caption; or .tar shards in WebDataset's layout."""
    class_names: Path | None = None
    """What the classes are called: id, tab, name a line; or names alone in the order of the ids; or
    JSON of either kind. Needed for wnids and numbers."""
    model: str | None = None
    """Architecture; without it, the one the checkpoint names. Or a model of another library:
    open_clip:NAME, open_clip:FOLDER, hf:owner/name or hf:FOLDER."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one, for models of open_clip whose tokenizer is not
    OpenAI's and cannot be had from the hub."""
    activation: Activation | None = None
    """Of the MLP blocks, as the weights were trained; needed where nothing beside them says it."""
    device: str = "cpu"
    """Where torch computes: cpu, cuda, cuda:1."""
    allow_outside: bool = False
    """Let paths in tables and links in folders of `data` lead out of them."""

    def open_model(self) -> DualEncoder:
        """Load the checkpoint; see `training.evaluation.embed.open_model`."""
        model = open_model(
            self.checkpoint,
            model=self.model,
            activation=self.activation,
            tokenizer=self.tokenizer,
        )
        return model.to(torch.device(self.device))

    def read_table(self) -> NameTable | None:
        """Read the names of the classes, where there is a file of them."""
        return read_name_table(self.class_names) if self.class_names else None


@dataclass
class Embedded:
    """Embedded images, with what is known of each."""

    image_NE: NDArray[np.float32]
    keys: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    captions: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Classes:
    """Which images have a class, and which one of C."""

    rows_N: NDArray[np.int64]
    """Rows of the images that have a class."""
    right_N: NDArray[np.int64]
    """Index of the class of each of those."""
    ids: list[str]
    names: list[str]
    """What each class is called."""


def embed_data(
    model: DualEncoder,
    data: Sequence[Path],
    *,
    allow_outside: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> Embedded:
    """Read and embed a folder or shards, with a progress bar; see `embed_samples`."""
    samples = read_samples(data, allow_outside=allow_outside, max_bytes=limits.max_bytes)
    bar = tqdm(samples, desc="embedding", unit="image", dynamic_ncols=True)
    return embed_samples(model, bar, limits=limits)


def embed_samples(
    model: DualEncoder, samples: Iterable[Sample], *, limits: Limits = DEFAULT_LIMITS
) -> Embedded:
    """Embed the images of samples, a few in memory at a time.

    Raises:
        ImageError: an image cannot be used; the message says which.
    """
    found = Embedded(np.empty((0, model.facts.embedding_dim), np.float32))

    def images() -> Iterator[ImageInput]:
        for sample in samples:
            found.keys.append(sample.key)
            found.labels.append(sample.label)
            found.captions.append(sample.captions)
            yield sample.image

    try:
        found.image_NE = embed_images(model, images(), limits=limits)
    except ImageError as error:
        where = "" if error.index is None else f"{found.keys[error.index]}: "
        raise ImageError(f"{where}{error}", index=error.index) from error
    return found


def find_classes(
    labels: Sequence[str | None], table: NameTable | None = None, *, all_classes: bool = False
) -> Classes:
    """Number and name the classes of images.

    Args:
        labels: Of each image, as the data have it; None where it has no class.
        table: Names of the classes; see `name_classes`.
        all_classes: Take every class of the table, not only those that have images.

    Raises:
        InputError: a class has no name, or no image has a class.
    """
    present = [(row, label) for row, label in enumerate(labels) if label is not None]
    if not present:
        raise InputError("no image has a class. Put each into a folder named for its class.")
    ids = sort_ids(list({label for _, label in present}))
    if all_classes:
        ids = _all_ids(ids, table)
    index_by_id = {each: index for index, each in enumerate(ids)}
    return Classes(
        rows_N=np.array([row for row, _ in present], np.int64),
        right_N=np.array([index_by_id[label] for _, label in present], np.int64),
        ids=ids,
        names=name_classes(ids, table),
    )


def choose_shots(
    right_N: NDArray[np.int64], shots: int, *, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Choose examples of each class at random.

    Args:
        right_N: Class of each image.
        shots: How many of each class.
        rng: Chooses. With the same state, the first k of each class are the same for every `shots`.

    Returns:
        Rows of the chosen, int64 (C * shots,): one of each class, then another of each, and so on.

    Raises:
        InputError: a class has too few, or `shots` is below 1.
    """
    columns = []
    for each in np.unique(right_N):
        rows = rng.permutation(np.flatnonzero(right_N == each))
        if not 1 <= shots <= len(rows):
            raise InputError(f"{shots} examples of each class; class {each} has {len(rows)}.")
        columns.append(rows[:shots])
    chosen: NDArray[np.int64] = np.stack(columns, axis=1).reshape(-1)
    return chosen


def _all_ids(ids: list[str], table: NameTable | None) -> list[str]:
    if table is None:
        raise InputError("all_classes needs the table of all classes: pass --class-names too.")
    if set(ids) <= set(table.ids):
        return list(table.ids)
    numbers = [str(index) for index in range(len(table.in_order))]
    if set(ids) <= set(numbers):
        return numbers
    raise InputError(
        "all_classes needs a table with the ids of the classes, and "
        f"{next(iter(set(ids) - set(table.ids)))!r} is not among its {len(table.ids)}."
    )
