"""Evaluate a checkpoint as the paper does: zero-shot classification and image-text retrieval.

    python -m training.evaluate --checkpoint clip.safetensors --data imagenet/val \
        --class-names wnids.tsv
    python -m training.evaluate --checkpoint clip.safetensors --data shard-000.tar shard-001.tar
    python -m training.evaluate --help

A folder of images for each class, or WebDataset shards, go in; a table and, on request, a JSON come
out. Images that have a class are classified, with one prompt and with an ensemble of prompts;
images that have captions are retrieved by them. Prompts, preprocessing and the classifier are those
that serve.

Source: Radford et al. 2021, sections 3.1 and 3.3; retrieval as in table 13.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from clip_rt.errors import InputError
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training.evaluation.class_names import read_templates
from training.evaluation.labelled import check_exist, read_captions
from training.evaluation.metrics import Accuracy, Retrieval
from training.evaluation.source import Source, embed_data
from training.evaluation.zero_shot import retrieve, zero_shot


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Source):
    """What to evaluate, on what."""

    templates: str = "openai_imagenet"
    """Prompts of the ensemble: a named set, or a file with one template a line."""
    all_classes: bool = False
    """Choose among every class of class_names; without it, among those that have images."""
    captions: Path | None = None
    """CSV or JSON lines with `image` (a path below the folder) and `caption`, for retrieval."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Also write the figures here."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of one checkpoint on one data set."""

    num_images: int
    layout: str | None
    """Of the classes; None where the images have none."""
    accuracy: dict[str, Accuracy]
    """By what the prompts were."""
    retrieval: Retrieval | None
    """None where the images have no captions."""


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Do what `config` says.

    Raises:
        InputError, CheckpointError: something it names cannot be used.
    """
    # What can be wrong is looked at before hours of embedding.
    table = config.read_table()
    frames = read_templates(config.templates)
    captions = read_captions(config.captions) if config.captions else None
    check_exist(*config.data)
    model = config.open_model()
    embedded = embed_data(model, config.data, allow_outside=config.allow_outside, limits=config)
    if captions is not None:
        embedded.captions = [captions.get(key, ()) for key in embedded.keys]
        _check_captions(captions, embedded.keys, config.captions)
    layout: str | None = None
    accuracies: dict[str, Accuracy] = {}
    if any(label is not None for label in embedded.labels):
        layout, accuracies = zero_shot(
            model, embedded, table=table, templates=frames, all_classes=config.all_classes
        )
    found = retrieve(model, embedded) if any(embedded.captions) else None
    if layout is None and found is None:
        raise InputError("the images have neither classes nor captions: nothing to evaluate.")
    return Evaluation(len(embedded.labels), layout, accuracies, found)


def show(evaluation: Evaluation, console: Console) -> None:
    """Print the figures as tables."""
    if evaluation.accuracy:
        table = Table(
            "zero-shot", "top-1", "top-5", "mean per class", "chance", title=evaluation.layout
        )
        for title, row in evaluation.accuracy.items():
            figures = (row.top1, row.top5, row.mean_per_class, row.chance)
            table.add_row(title, *(f"{100 * figure:.2f} %" for figure in figures))
        table.caption = f"{row.num_images:,} images of {row.num_classes:,} classes"
        console.print(table)
    if found := evaluation.retrieval:
        table = Table("retrieval", *(f"R@{k}" for k in found.text_at))
        for title, recall in (
            ("texts by image", found.text_at),
            ("images by text", found.image_at),
        ):
            table.add_row(title, *(f"{100 * figure:.2f} %" for figure in recall.values()))
        table.caption = f"{found.num_images:,} images, {found.num_texts:,} texts"
        console.print(table)


def main(config: EvaluateConfig) -> None:
    """Evaluate, print tables, write a JSON where one is asked for."""
    evaluation = evaluate(config)
    show(evaluation, Console())
    if config.json_file:
        document: dict[str, Any] = {
            "model": config.model,
            "checkpoint": None if config.checkpoint is None else str(config.checkpoint),
            "data": [str(path) for path in config.data],
            **asdict(evaluation),
        }
        config.json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _check_captions(
    captions: dict[str, tuple[str, ...]], keys: Sequence[str], path: Path | None
) -> None:
    missing = sorted(captions.keys() - set(keys))
    if missing:
        raise InputError(
            f"{len(missing)} of {len(captions)} images of {str(path)!r} are not in the data, the "
            f"first is {missing[0]!r}. Name each by its path below the folder of images."
        )


if __name__ == "__main__":
    with command():
        main(tyro.cli(EvaluateConfig, prog=program("training.evaluate"), description=__doc__))
