"""`clip-rt moderate`: which images are allowed, which reviewed or blocked, and why."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from clip_rt.commands.connect import ModelOptions
from clip_rt.commands.exit_codes import FLAGGED, SOME_BAD
from clip_rt.commands.files import embed_named
from clip_rt.commands.labels import embed_labels
from clip_rt.commands.output import OutputOptions, Row
from clip_rt.commands.pictures import PictureOptions
from clip_rt.commands.progress import Progress
from clip_rt.commands.sheet import Caption
from clip_rt.errors import InputError

if TYPE_CHECKING:
    from clip_rt.bulk.sources import ImageFile
    from clip_rt.client import Client
    from clip_rt.moderation.decisions import Decision
    from clip_rt.moderation.policy import Policy

NUM_DIGITS = 6
COLUMNS = ("image", "action", "label", "probability", "threshold", "reasons", "error")
TABLE_COLUMNS = ("image", "action", "reasons")


@dataclass(frozen=True, kw_only=True)
class ModerateConfig:
    """Which images, and by which policy.

    Raises:
        InputError: an option cannot be used.
    """

    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE")]
    """Files, folders, patterns or tar files; - reads their names from stdin."""
    policy: str
    """A file that `clip-rt calibrate` wrote; or a starter, to see what it does: medical,
    people-present, safe-for-work, screenshots, text-in-image, violence, weapons."""
    allow_uncalibrated: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with a policy of which nothing was measured."""
    fail_on: Literal["review", "block"] | None = None
    """Exit with 4 where an image has this action, or a more severe one."""
    pictures: Annotated[PictureOptions, tyro.conf.arg(name="")]
    output: Annotated[OutputOptions, tyro.conf.arg(name="")]
    model: Annotated[ModelOptions, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        if not self.images:
            raise InputError("name images: files, folders, or - to read their names from stdin.")


@dataclass(frozen=True)
class Answer:
    """What came of an image."""

    image: ImageFile
    decision: Decision | None
    """None where there is an error."""
    error: str | None = None


def moderate(config: Annotated[ModerateConfig, tyro.conf.arg(name="")]) -> int:
    """Say which images are allowed, which a person should review, which are blocked, and why.

    Returns:
        The exit code.

    Raises:
        ClipRTError: see `Client.moderate`.
        OSError: the answers cannot be written.
    """
    from clip_rt.bulk.sources import STDIN, check_name, find_images
    from clip_rt.moderation.decisions import SEVERITY
    from clip_rt.moderation.policy import find_policy

    policy = find_policy(config.policy)
    for name in config.images:
        check_name(name)

    def count() -> int:
        return sum(1 for _ in find_images(config.images))

    progress = Progress("images", config.output, None if STDIN in config.images else count)
    is_table = config.output.is_table
    counts: Counter[str] = Counter()

    def rows() -> Generator[Row, None, None]:
        for answer in _answer(client, config, policy):
            progress.advance(1, answer.error is not None)
            if answer.decision is not None:
                counts[answer.decision.action] += 1
            gallery.add(answer.image.name, answer.image.to_input, _caption(answer))
            yield _show_row(answer) if is_table else _make_row(answer)

    with (
        config.model.connect() as client,
        config.pictures.begin(f"Policy {policy.name}") as gallery,
        progress,
        closing(rows()) as found,
    ):
        config.output.write(
            found,
            TABLE_COLUMNS if is_table else COLUMNS,
            numbers=("probability", "threshold"),
        )
    progress.report()
    if progress.num_done:
        said = ", ".join(f"{counts[action]:,} {action}" for action in SEVERITY)
        sys.stderr.write(f"{said}\n")
    least = SEVERITY[config.fail_on] if config.fail_on else len(SEVERITY)
    if any(counts[each] for each in SEVERITY if SEVERITY[each] >= least):
        return FLAGGED
    return SOME_BAD if progress.num_bad else 0


def _answer(client: Client, config: ModerateConfig, policy: Policy) -> Iterator[Answer]:
    """Yield what came of each image, in order; memory stays flat."""
    from clip_rt.moderation import decisions

    manifest = client.manifest
    decisions.check_policy(policy, manifest, allow_uncalibrated=config.allow_uncalibrated)
    if not policy.is_calibrated:
        sys.stderr.write(
            f"warning: the policy {policy.name!r} is not calibrated; nothing is known of how often "
            "it is right\n"
        )
    for label, shortfall in policy.shortfalls.items():
        sys.stderr.write(f"warning: label {label!r} has no threshold that was shown: {shortfall}\n")
    texts = decisions.list_texts(policy, manifest.score)
    text_embeddings = embed_labels(client, texts, policy.templates)
    for part in embed_named(client, manifest, config.images):
        moderation = decisions.decide(policy, manifest, part.embeddings, text_embeddings)
        found = iter(moderation.decisions)
        for image, error in part.images:
            yield Answer(image, next(found) if error is None else None, error)


def _reasons(decision: Decision) -> list[str]:
    return [
        f"{each.label} {each.probability:.1%} (from {each.threshold:.1%})"
        for each in decision.reasons
    ]


def _caption(answer: Answer) -> list[Caption]:
    if answer.decision is None:
        return [Caption(answer.error or "", is_error=True)]
    action = answer.decision.action
    lines = [Caption(action, is_error=action == "block")]
    return lines + [
        Caption(f"{each.probability:.1%} {each.label}", each.probability)
        for each in answer.decision.reasons[:3]
    ]


def _show_row(answer: Answer) -> Row:
    if answer.decision is None:
        values: tuple[str, ...] = (answer.image.name, "error", answer.error or "")
    else:
        reasons = ", ".join(_reasons(answer.decision))
        values = (answer.image.name, answer.decision.action, reasons)
    return dict(zip(TABLE_COLUMNS, values, strict=True))


def _make_row(answer: Answer) -> Row:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"image": answer.image.name, "error": answer.error}
    if answer.decision is not None:
        row["action"] = answer.decision.action
        row["reasons"] = "; ".join(_reasons(answer.decision)) or None
        for reason in answer.decision.reasons[:1]:
            row["label"] = reason.label
            row["probability"] = round(reason.probability, NUM_DIGITS)
            row["threshold"] = round(reason.threshold, NUM_DIGITS)
    return row
