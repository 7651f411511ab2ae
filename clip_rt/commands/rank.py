"""`clip-rt rank`: which caption, or which answer to a question, fits an image best."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from clip_rt.commands.connect import ModelOptions
from clip_rt.commands.exit_codes import SOME_BAD
from clip_rt.commands.labels import split_labels
from clip_rt.commands.output import OutputOptions
from clip_rt.errors import ImageError, InputError

NUM_DIGITS = 6
COLUMNS = ("caption", "probability", "similarity")


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Which image, and which texts.

    Raises:
        InputError: an option cannot be used.
    """

    image: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGE")]
    """A file."""
    captions: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CAPTION")
    ] = ()
    """Texts that may describe it."""
    question: str | None = None
    """A question on it, or a statement with {} for the answer."""
    answers: str | None = None
    """Answers to the question, with commas between them."""
    output: Annotated[OutputOptions, tyro.conf.arg(name="")]
    model: Annotated[ModelOptions, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        if (self.question is None) != (self.answers is None):
            raise InputError("--question and --answers go together; name both or neither.")
        if bool(self.captions) == (self.question is not None):
            raise InputError("name either captions, or --question and --answers.")

    def make_captions(self) -> tuple[tuple[str, ...], str]:
        """Return the texts that are ordered, and the template they are put into.

        Raises:
            InputError: there is no answer, or the question has several `{}`.
        """
        from clip_rt.inputs.prompts import SLOT, check_template

        if self.question is None:
            return self.captions, SLOT
        template = self.question if SLOT in self.question else f"{self.question} {SLOT}"
        return split_labels(self.answers or "", "--answers"), check_template(template)


def rank(config: Annotated[RankConfig, tyro.conf.arg(name="")]) -> int:
    """Order captions, or answers to a question, by how well they fit an image.

    Returns:
        The exit code.

    Raises:
        ClipRTError: see `Client.zero_shot`.
        OSError: the answers cannot be written.
    """
    captions, template = config.make_captions()
    with config.model.connect() as client:
        try:
            scores = client.zero_shot(config.image, captions, templates=[template])
        except ImageError as error:
            sys.stderr.write(f"error: {error}\n")
            return SOME_BAD
    assert scores.similarities is not None  # They are no probe's.
    probabilities, similarities = scores.probabilities[0], scores.similarities[0]
    rows = [
        {
            "caption": captions[index],
            "probability": round(float(probabilities[index]), NUM_DIGITS),
            "similarity": round(float(similarities[index]), NUM_DIGITS),
        }
        for index in (-probabilities).argsort(kind="stable").tolist()
    ]
    config.output.write(rows, COLUMNS)
    return 0
