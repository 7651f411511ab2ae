"""`clip-rt classify`: which of some labels fits each image best."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from clip_rt.commands.connect import ModelOptions
from clip_rt.commands.exit_codes import SOME_BAD
from clip_rt.commands.files import embed_named
from clip_rt.commands.labels import LabelOptions, Templates, embed_labels
from clip_rt.commands.output import OutputOptions, Row
from clip_rt.commands.pictures import PictureOptions
from clip_rt.commands.progress import Progress
from clip_rt.commands.sheet import Caption
from clip_rt.errors import InputError

if TYPE_CHECKING:
    from clip_rt.bulk.sources import ImageFile
    from clip_rt.classification.zero_shot import Scores
    from clip_rt.client import Client

NUM_DIGITS = 6
"""Of a number that is written; float32 has hardly more."""
NOTHING_ABOVE = "(none above the threshold)"
TABLE_COLUMNS = ("image", "labels")


class Guess(NamedTuple):
    """A label, and how well it fits."""

    label: str
    probability: float
    similarity: float | None
    """Cosine; None of the answer "none of these"."""


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """Which images, which labels, and which of the answers.

    Raises:
        InputError: an option cannot be used.
    """

    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE")]
    """Files, folders, patterns or tar files; - reads their names from stdin."""
    labels: Annotated[LabelOptions, tyro.conf.arg(name="")]
    top: int = 3
    """How many labels of each image."""
    none_of_these: tyro.conf.FlagCreatePairsOff[bool] = False
    """Add the answer "none of these"."""
    threshold: float | None = None
    """Leave out labels less probable than this; from 0 to 1."""
    min_similarity: float | None = None
    """Leave out labels less similar to the image than this; from -1 to 1."""
    pictures: Annotated[PictureOptions, tyro.conf.arg(name="")]
    output: Annotated[OutputOptions, tyro.conf.arg(name="")]
    model: Annotated[ModelOptions, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        if not self.images:
            raise InputError("name images: files, folders, or - to read their names from stdin.")
        if self.top < 1:
            raise InputError(f"--top is {self.top}; it must be 1 or more.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"--threshold is {self.threshold}; it must be from 0 to 1.")
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise InputError(f"--min-similarity is {self.min_similarity}; it must be from -1 to 1.")


@dataclass(frozen=True)
class Answer:
    """What came of an image."""

    image: ImageFile
    guesses: Sequence[Guess] = ()
    """The most probable first."""
    error: str | None = None
    """Why there is no guess."""


def classify(config: Annotated[ClassifyConfig, tyro.conf.arg(name="")]) -> int:
    """Say which of some labels fits each image best.

    Returns:
        The exit code.

    Raises:
        ClipRTError: see `Client.stream_images` and `Client.class_embeddings`.
        OSError: the answers cannot be written.
    """
    # Only here: help needs none of it.
    from clip_rt.bulk.sources import STDIN, check_name, find_images

    for name in config.images:
        check_name(name)
    labels, templates = config.labels.read(), config.labels.find_templates()

    def count() -> int:
        return sum(1 for _ in find_images(config.images))

    progress = Progress("images", config.output, None if STDIN in config.images else count)
    num_shown = min(config.top, len(labels) + config.none_of_these)
    is_table = config.output.is_table

    def rows() -> Generator[Row, None, None]:
        for answer in _answer(client, config, labels, templates):
            progress.advance(1, answer.error is not None)
            gallery.add(answer.image.name, answer.image.to_input, _caption(answer))
            yield _show_row(answer) if is_table else _make_row(answer, num_shown)

    columns = list(TABLE_COLUMNS) if is_table else _name_columns(num_shown)
    numbers = [each for each in columns if each.startswith(("probability", "similarity"))]
    with (
        config.model.connect() as client,
        config.pictures.begin(_title(labels)) as gallery,
        progress,
        closing(rows()) as found,
    ):
        config.output.write(found, columns, numbers=numbers)
    progress.report()
    return SOME_BAD if progress.num_bad else 0


def _answer(
    client: Client,
    config: ClassifyConfig,
    labels: tuple[str, ...],
    templates: Templates,
) -> Iterator[Answer]:
    """Yield what came of each image, in order; memory stays flat."""
    from clip_rt.classification import open_set

    manifest = client.manifest
    wanted = labels
    if config.none_of_these:
        open_set.check_labels(labels)
        wanted += open_set.background_of(manifest.score, labels)
    class_embeddings = embed_labels(client, wanted, templates)
    for part in embed_named(client, manifest, config.images):
        scores = open_set.score_images(
            manifest,
            part.embeddings,
            class_embeddings,
            labels,
            none_of_these=config.none_of_these,
        )
        guesses = iter(_guess(scores, config))
        for image, error in part.images:
            yield Answer(image, () if error else next(guesses), error)


def _guess(scores: Scores, config: ClassifyConfig) -> list[list[Guess]]:
    """Return what is shown of the labels of each image."""
    limits = (config.threshold, config.min_similarity)
    least = (0.0, -1.0)
    is_above = scores.are_above(
        *(low if limit is None else limit for limit, low in zip(limits, least, strict=True))
    )
    order = (-scores.probabilities).argsort(axis=1, kind="stable")[:, : config.top]
    cosines = scores.similarities
    assert cosines is not None  # They are no probe's.
    return [
        [
            Guess(
                scores.labels[index],
                float(scores.probabilities[row, index]),
                float(cosines[row, index]) if index < cosines.shape[1] else None,
            )
            for index in ranked
            if is_above[row, index]
        ]
        for row, ranked in enumerate(order.tolist())
    ]


def _title(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:8])
    return f"{len(labels):,} labels: {shown}{', ...' if len(labels) > 8 else ''}"


def _caption(answer: Answer) -> list[Caption]:
    if answer.error is not None:
        return [Caption(answer.error, is_error=True)]
    lines = [
        Caption(f"{each.probability:.1%} {each.label}", each.probability) for each in answer.guesses
    ]
    return lines or [Caption(NOTHING_ABOVE)]


def _show_row(answer: Answer) -> Row:
    shown = ", ".join(f"{each.label} {each.probability:.1%}" for each in answer.guesses)
    text = f"error: {answer.error}" if answer.error is not None else shown or NOTHING_ABOVE
    return dict(zip(TABLE_COLUMNS, (answer.image.name, text), strict=True))


def _name_columns(num_shown: int) -> list[str]:
    names = (f"{name}{_suffix(rank)}" for rank in range(num_shown) for name in Guess._fields)
    return ["image", *names, "error"]


def _make_row(answer: Answer, num_shown: int) -> Row:
    row: dict[str, Any] = {"image": answer.image.name, "error": answer.error}
    for rank in range(num_shown):
        values = answer.guesses[rank] if rank < len(answer.guesses) else (None, None, None)
        for name, value in zip(Guess._fields, values, strict=True):
            written = round(value, NUM_DIGITS) if isinstance(value, float) else value
            row[f"{name}{_suffix(rank)}"] = written
    return row


def _suffix(rank: int) -> str:
    """Return what tells the columns of the second and later labels from those of the first."""
    return f"_{rank + 1}" if rank else ""
