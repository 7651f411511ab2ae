"""`clip-rt fairness`: how often each label is given in each group of images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from clip_rt.commands.calibrate import check_files, needs, write_text
from clip_rt.commands.connect import ModelOptions
from clip_rt.commands.exit_codes import SOME_BAD
from clip_rt.commands.files import embed_all
from clip_rt.commands.labels import embed_labels
from clip_rt.commands.output import OutputOptions, Row
from clip_rt.commands.policies import PolicyOptions
from clip_rt.commands.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from clip_rt.bulk.sources import ImageFile
    from clip_rt.calibration.groups import Comparison
    from clip_rt.client import Client
    from clip_rt.moderation.policy import Policy

COLUMNS = ("label", "group", "images", "given", "rate", "low", "high", "differs_from")
NUM_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class FairnessConfig:
    """Which images are of which group, and what is looked for.

    Raises:
        InputError: an option cannot be used.
    """

    examples: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TABLE")]
    """A table (.csv, .tsv, .parquet) of images and the group of each."""
    group: str
    """The column with the groups; images without one are left out."""
    wanted: Annotated[PolicyOptions, tyro.conf.arg(name="")]
    allow_uncalibrated: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with a policy of which nothing was measured."""
    image_column: str = "image"
    """Of the table, with paths relative to its folder."""
    html: Path | None = None
    """A page to write, with all figures and the picture in it."""
    png: Path | None = None
    """The picture alone."""
    output: Annotated[OutputOptions, tyro.conf.arg(name="")]
    model: Annotated[ModelOptions, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        check_files(self, html=".html", png=".png")


def fairness(config: Annotated[FairnessConfig, tyro.conf.arg(name="")]) -> int:
    """Compare groups of images by how often each is given each label.

    Labels that are named share out each image: the most probable one is given. Labels of a policy
    are given where they reach a threshold.

    Returns:
        The exit code.

    Raises:
        ClipRTError: see `Client.stream_images` and `calibration.groups.compare_groups`.
        OSError: the answers cannot be written.
    """
    try:
        from clip_rt.calibration import plots, report
        from clip_rt.calibration.examples import Columns, read_examples
        from clip_rt.calibration.groups import compare_groups
    except ModuleNotFoundError as error:
        raise needs(error) from error

    policy = config.wanted.read("labels", "softmax")
    columns = Columns(image=config.image_column, label=None, group=config.group)
    examples = read_examples(config.examples, (), columns)
    grouped = [(each.image, each.group) for each in examples if each.group is not None]
    if num_left_out := len(examples) - len(grouped):
        sys.stderr.write(f"warning: {num_left_out:,} images have no group and are left out\n")
    progress = Progress("images", config.output, lambda: len(grouped))
    with config.model.connect() as client, progress:
        images = [image for image, _ in grouped]
        kept, labels, is_given = _give(client, config, policy, images, progress)
    progress.report()
    comparison = compare_groups(is_given, labels, [grouped[index][1] for index in kept])
    if config.html is not None or config.png is not None:
        picture = plots.draw_groups(comparison)
        if config.png is not None:
            config.png.write_bytes(picture)
        if config.html is not None:
            title = f"Rates of labels by {config.group}"
            write_text(config.html, report.describe_groups(comparison, picture, title))
    for each in report.differences_of(comparison):
        sys.stderr.write(f"warning: {each}\n")
    config.output.write(_make_rows(comparison), COLUMNS)
    return SOME_BAD if progress.num_bad else 0


def _give(
    client: Client,
    config: FairnessConfig,
    policy: Policy,
    images: Sequence[ImageFile],
    progress: Progress,
) -> tuple[list[int], list[str], NDArray[np.bool_]]:
    """Return which images could be used, the labels, and which image is given which."""
    import numpy as np

    from clip_rt.calibration.measures import with_none
    from clip_rt.classification.open_set import NONE_OF_THESE
    from clip_rt.moderation import decisions

    manifest = client.manifest
    labels = [label.name for label in policy.labels]
    is_named = config.wanted.policy is None
    if not is_named:
        allow = config.allow_uncalibrated
        decisions.check_policy(policy, manifest, allow_uncalibrated=allow)
    texts = decisions.list_texts(policy, manifest.score)
    text_embeddings = embed_labels(client, texts, policy.templates)
    kept, image_embeddings = embed_all(client, manifest, images, progress)
    cosines = decisions.compare(policy, image_embeddings, text_embeddings)
    probabilities = decisions.find_probabilities(policy, manifest, *cosines)
    if not is_named:
        is_given = [
            [
                label.decide(each)[1] is not None
                for label, each in zip(policy.labels, row, strict=True)
            ]
            for row in probabilities.tolist()
        ]
        return kept, labels, np.array(is_given, bool).reshape(probabilities.shape)
    if policy.none_of_these:
        probabilities, labels = with_none(probabilities), [*labels, NONE_OF_THESE]
    best = probabilities.argmax(axis=1) if len(probabilities) else np.empty(0, np.intp)
    return kept, labels, np.arange(len(labels)) == best[:, None]


def _make_rows(comparison: Comparison) -> list[Row]:
    low, high = comparison.intervals
    rows: list[Row] = []
    for index, label in enumerate(comparison.labels):
        for place, group in enumerate(comparison.groups):
            differs = comparison.differs[place, :, index].nonzero()[0].tolist()
            rows.append(
                {
                    "label": label,
                    "group": group,
                    "images": int(comparison.num_images[place]),
                    "given": int(comparison.num_given[place, index]),
                    "rate": round(float(comparison.rates[place, index]), NUM_DIGITS),
                    "low": round(float(low[place, index]), NUM_DIGITS),
                    "high": round(float(high[place, index]), NUM_DIGITS),
                    "differs_from": ", ".join(comparison.groups[each] for each in differs) or None,
                }
            )
    return rows
