"""Labels and prompt templates as they are written at a command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import tyro

from clip_rt.errors import InputError, ServerTimeoutError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from clip_rt.client import Client

Templates: TypeAlias = str | tuple[str, ...] | None
"""Name of a set, texts with a `{}` each, or a client's own template."""


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What images may show.

    Raises:
        InputError: labels are named twice or not at all.
    """

    labels: str | None = None
    """Names with commas between them."""
    labels_file: Path | None = None
    """A text file with a label on each line."""
    templates: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A text with {} for the label, or a set: openai_imagenet, openai_cifar, simple."""

    def __post_init__(self) -> None:
        if (self.labels is None) == (self.labels_file is None):
            raise InputError("name what to look for, by one of --labels and --labels-file.")

    def read(self) -> tuple[str, ...]:
        """Return the labels, in order.

        Raises:
            InputError: there is none, or the file cannot be read.
        """
        return read_labels(self.labels, self.labels_file)

    def find_templates(self) -> Templates:
        """Return the templates as a client takes them.

        Raises:
            TemplateError: no set has that name, or a text has not exactly one `{}`.
        """
        return read_templates(self.templates)


def read_labels(labels: str | None, labels_file: Path | None) -> tuple[str, ...]:
    """Return the labels of --labels, or of --labels-file, in order.

    Raises:
        InputError: there is none, or the file cannot be read.
    """
    if labels_file is None:
        return split_labels(labels or "", "--labels")
    try:
        # With or without the mark that some editors put first.
        lines = labels_file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--labels-file cannot be read: {error}.") from error
    found = tuple(filter(None, map(str.strip, lines)))
    if not found:
        raise InputError(f"--labels-file {labels_file} holds no label.")
    return found


def read_templates(given: tuple[str, ...]) -> Templates:
    """Return the templates of --templates as a client takes them.

    Raises:
        TemplateError: no set has that name, or a text has not exactly one `{}`.
    """
    from clip_rt.inputs.prompts import SLOT, find_templates

    is_set = len(given) == 1 and SLOT not in given[0]
    templates = given[0] if is_set else given or None
    find_templates(templates)
    return templates


def split_labels(text: str, option: str) -> tuple[str, ...]:
    """Return the texts between commas.

    Raises:
        InputError: there is none; names the option.
    """
    labels = tuple(filter(None, map(str.strip, text.split(","))))
    if not labels:
        raise InputError(f"{option} is {text[:80]!r} and names nothing.")
    return labels


def embed_labels(
    client: Client, labels: Sequence[str], templates: Templates
) -> NDArray[np.float32]:
    """Embed labels as classes, as long as it takes: each call goes on where the last one ended.

    Returns:
        float32 (C, D).

    Raises:
        ServerTimeoutError: a call made none.
        ClipRTError: see `Client.class_embeddings`.
    """
    while True:
        num_made = client.cache.misses
        try:
            return client.class_embeddings(labels, templates=templates)
        except ServerTimeoutError:
            if client.cache.misses == num_made:
                raise
