"""`clip-rt score`: how well images fit the prompts they were made of."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from clip_rt.commands.connect import ModelOptions
from clip_rt.commands.exit_codes import SOME_BAD
from clip_rt.commands.output import OutputOptions, Row
from clip_rt.commands.progress import Progress
from clip_rt.errors import InputError

if TYPE_CHECKING:
    from clip_rt.bulk.sources import ImageFile
    from clip_rt.client import Client

NUM_DIGITS = 6
COLUMNS = ("image", "prompt", "score", "error")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which images, and the prompt of each.

    Raises:
        InputError: an option cannot be used, or two exclude each other.
    """

    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE")] = ()
    """Files, folders, patterns or tar files."""
    prompts: tuple[str, ...] = ()
    """A prompt for each image, in order; or one, for all images."""
    prompts_file: Path | None = None
    """A text file with a prompt on each line, in place of --prompts."""
    pairs: Path | None = None
    """A table of images and prompts, in place of both: .csv, .tsv or .parquet."""
    image_column: str = "image"
    """Of the table, with paths, relative to the table's folder."""
    text_column: str = "prompt"
    """Of the table, with prompts."""
    truncate: tyro.conf.FlagCreatePairsOff[bool] = False
    """Cut prompts that are too long for the model."""
    summary: Path | None = None
    """A JSON file to write, with the mean, its standard error and the number of pairs."""
    output: Annotated[OutputOptions, tyro.conf.arg(name="")]
    model: Annotated[ModelOptions, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        if self.pairs is not None:
            if self.images or self.prompts or self.prompts_file is not None:
                raise InputError(
                    "--pairs has images and prompts; leave IMAGE, --prompts and --prompts-file out."
                )
        elif not self.images:
            raise InputError("name images and their --prompts, or a table with --pairs.")
        elif bool(self.prompts) == (self.prompts_file is not None):
            raise InputError("name what images show by one of --prompts and --prompts-file.")
        if self.summary is not None and not self.summary.absolute().parent.is_dir():
            raise InputError(f"--summary: there is no folder {self.summary.parent}.")

    def read(self) -> tuple[list[ImageFile], list[str]]:
        """Return the images and as many prompts.

        Raises:
            InputError: there are not as many of the one as of the other, or they cannot be read.
        """
        from clip_rt.bulk.sources import find_images

        if self.pairs is not None:
            return self._read_pairs(self.pairs)
        images, prompts = list(find_images(self.images)), list(self.prompts)
        if self.prompts_file is not None:
            try:
                # With or without the mark that some editors put first.
                prompts = self.prompts_file.read_text("utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"--prompts-file cannot be read: {error}.") from error
        if len(prompts) == 1:
            prompts *= len(images)
        if len(prompts) != len(images):
            raise InputError(
                f"there are {len(images):,} images and {len(prompts):,} prompts; name a prompt for "
                "each image, or one for all."
            )
        return images, prompts

    def _read_pairs(self, table: Path) -> tuple[list[ImageFile], list[str]]:
        from clip_rt.bulk.sources import ImageFile

        try:
            from clip_rt.bulk.tables import TABLE_SUFFIXES, is_table, read_columns
        except ModuleNotFoundError as error:
            raise InputError(
                f"a table needs {error.name}: pip install 'clip-rt[commands]', or take --prompts."
            ) from error
        if not is_table(table.name):
            raise InputError(f"--pairs is {table}; it must end in {', '.join(TABLE_SUFFIXES)}.")
        images, prompts = [], []
        for number, (image, prompt) in enumerate(
            read_columns(table, (self.image_column, self.text_column))
        ):
            problem = "" if image else f"row {number} has no {self.image_column!r}"
            images.append(ImageFile(table.parent / (image or table.name), problem=problem))
            prompts.append(prompt or "")
        return images, prompts


def score(config: Annotated[ScoreConfig, tyro.conf.arg(name="")]) -> int:
    """Say how well images fit their prompts, as CLIP score.

    Returns:
        The exit code.

    Raises:
        ClipRTError: see `clip_rt.clip_score`.
        OSError: the answers cannot be written.
    """
    images, prompts = config.read()
    found: list[float] = []
    progress = Progress("pairs", config.output, lambda: len(images))

    def rows() -> Generator[Row, None, None]:
        for index, value, error in _score(client, config, images, prompts):
            progress.advance(1, error is not None)
            if value is not None:
                found.append(value)
            yield {
                "image": images[index].name,
                "prompt": prompts[index],
                "score": None if value is None else round(value, NUM_DIGITS),
                "error": error,
            }

    with config.model.connect() as client, progress, closing(rows()) as made:
        config.output.write(made, COLUMNS, numbers=("score",))
    progress.report()
    summary = _summarise(found)
    sys.stderr.write(_describe(summary) + "\n")
    if config.summary is not None:
        config.summary.write_text(json.dumps(summary) + "\n", "utf-8")
    return SOME_BAD if progress.num_bad else 0


def _score(
    client: Client, config: ScoreConfig, images: Sequence[ImageFile], prompts: Sequence[str]
) -> Iterator[tuple[int, float | None, str | None]]:
    """Yield the position, the score and the error of each pair, in order."""
    from clip_rt.inputs import transform
    from clip_rt.scoring import index_of, stream_scores

    problems: dict[int, str] = {}
    prefixes: dict[int, str] = {}

    def read() -> Iterator[Path | bytes]:
        for index, image in enumerate(images):
            content: Path | bytes = b""
            try:
                content = image.to_input()
            except OSError as reason:
                problems[index] = reason.strerror or str(reason)
            prefixes[index] = transform.describe(content, index) + " "
            yield content

    parts = stream_scores(client, read(), prompts, truncate=config.truncate, on_error="skip")
    for part in parts:
        scores = dict(zip(part.indices.tolist(), part.scores.tolist(), strict=True))
        errors = {index_of(error): str(error) for error in part.failures}
        for index in sorted(scores.keys() | errors.keys()):
            prefix = prefixes.pop(index)
            if index in scores:
                yield index, scores[index], None
            else:
                yield index, None, problems.get(index) or errors[index].removeprefix(prefix)


def _summarise(scores: Sequence[float]) -> dict[str, float | int | None]:
    import numpy as np

    from clip_rt.scoring import ClipScores

    found = ClipScores(scores=np.array(scores), indices=np.arange(len(scores)))
    num_pairs = len(scores)
    # JSON has no NaN.
    return {
        "mean": found.mean if num_pairs else None,
        "standard_error": found.standard_error if num_pairs > 1 else None,
        "pairs": num_pairs,
    }


def _describe(summary: dict[str, float | int | None]) -> str:
    words = f"{summary['pairs']:,} pairs"
    if summary["mean"] is None:
        return f"no CLIP score: {words}"
    words = f"CLIP score {summary['mean']:.4f}, of {words}"
    if summary["standard_error"] is not None:
        words += f"; standard error {summary['standard_error']:.4f}"
    return words
