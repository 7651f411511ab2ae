"""`clip-rt calibrate`: a policy fitted on labelled images, with thresholds that keep a promise."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from clip_rt.commands.connect import ModelOptions
from clip_rt.commands.exit_codes import SOME_BAD
from clip_rt.commands.files import embed_all
from clip_rt.commands.labels import embed_labels
from clip_rt.commands.output import OutputOptions, Row
from clip_rt.commands.policies import PolicyOptions
from clip_rt.commands.progress import Progress
from clip_rt.errors import InputError

if TYPE_CHECKING:
    from clip_rt.calibration.calibrate import Calibrated
    from clip_rt.calibration.examples import Example
    from clip_rt.client import Client
    from clip_rt.moderation.policy import Label, Policy, Target

COLUMNS = (
    *("label", "action", "images", "target", "threshold", "flagged"),
    *("precision", "precision_low", "recall", "recall_low", "promised", "shortfall"),
)
NUMBERS = ("threshold", "precision", "precision_low", "recall", "recall_low")
TABLE_COLUMNS = tuple(
    each for each in COLUMNS if each not in ("precision_low", "recall_low", "shortfall")
)
NUM_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Which images show what, what to look for, and what to promise.

    Raises:
        InputError: an option cannot be used.
    """

    examples: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TABLE|FOLDER")]
    """A table (.csv, .tsv, .parquet) of images and their labels, or a folder with a folder of
    images for each label; "none" is of images that no label fits."""
    wanted: Annotated[PolicyOptions, tyro.conf.arg(name="")]
    kind: Literal["softmax", "independent"] | None = None
    """One label fits an image, or any number of them; independent without it."""
    action: Literal["review", "block"] = "review"
    """What labels that are named lead to; a policy says it of each."""
    target: str = "precision=0.95"
    """Of each threshold: precision or recall, that is to be met with 95 % confidence."""
    image_column: str = "image"
    """Of a table, with paths relative to its folder."""
    label_column: str = "label"
    """Of a table; an image of several labels is in several rows, or has a JSON list."""
    others_are_none: tyro.conf.FlagCreatePairsOff[bool] = False
    """Images with other labels show none of these."""
    out: Path
    """The policy to write, .json."""
    report: Path | None = None
    """A page to write, .html, with all figures and pictures in it."""
    png: Path | None = None
    """The pictures alone, .png."""
    output: Annotated[OutputOptions, tyro.conf.arg(name="")]
    model: Annotated[ModelOptions, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        check_files(self, out=".json", report=".html", png=".png")
        _ = self.target_pair
        if self.wanted.policy is not None and self.kind is not None:
            raise InputError("--policy says itself of which kind it is; leave --kind out.")

    @property
    def target_pair(self) -> tuple[Literal["precision", "recall"], float]:
        """`target` as a measure and its value."""
        measure, _, value = self.target.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if measure not in ("precision", "recall") or not 0 < number < 1:
            raise InputError(
                f"--target is {self.target[:80]!r}; it must be precision or recall, an equals sign "
                "and a number above 0 and below 1."
            )
        return measure, number  # type: ignore[return-value]


def check_files(config: object, **suffixes: str) -> None:
    """Refuse options that name no file that can be written, before there is anything to write.

    Raises:
        InputError: names the option.
    """
    for option, suffix in suffixes.items():
        path: Path | None = getattr(config, option)
        if path is None:
            continue
        if path.suffix.lower() != suffix:
            raise InputError(f"--{option} is {path}; it must end in {suffix}.")
        if not path.absolute().parent.is_dir():
            raise InputError(f"--{option}: there is no folder {path.parent}.")


def calibrate(config: Annotated[CalibrateConfig, tyro.conf.arg(name="")]) -> int:
    """Fit a policy on labelled images: probabilities, and a threshold for each label.

    Returns:
        The exit code.

    Raises:
        ClipRTError: see `Client.stream_images` and `calibration.calibrate.calibrate`.
        OSError: the policy or the report cannot be written.
    """
    try:
        from clip_rt.calibration import examples as reading
        from clip_rt.calibration import plots, report
    except ModuleNotFoundError as error:
        raise needs(error) from error
    from clip_rt.moderation.policy import Target

    policy = read_policy(config)
    measure, value = config.target_pair
    target = Target(measure=measure, value=value)
    columns = reading.Columns(image=config.image_column, label=config.label_column)
    names = [label.name for label in policy.labels]
    examples = reading.read_examples(
        config.examples, names, columns, others_are_none=config.others_are_none
    )
    progress = Progress("images", config.output, lambda: len(examples))
    with config.model.connect() as client, progress:
        fit = _fit(client, policy, examples, target, progress)
    progress.report()
    fit.policy.save(config.out)
    if config.report is not None or config.png is not None:
        picture = plots.draw_calibration(fit)
        if config.png is not None:
            config.png.write_bytes(picture)
        if config.report is not None:
            write_text(config.report, report.describe_fit(fit, picture))
    for each in report.warnings_of(fit):
        sys.stderr.write(f"warning: {each}\n")
    _say_error(fit)
    shown = TABLE_COLUMNS if config.output.is_table else COLUMNS
    config.output.write([_make_row(each) for each in fit.policy.labels], shown, numbers=NUMBERS)
    return SOME_BAD if progress.num_bad else 0


def read_policy(config: CalibrateConfig) -> Policy:
    """Return the policy that is fitted, with the actions that were asked for.

    Raises:
        InputError: there is no such policy, or there are no such labels.
    """
    policy = config.wanted.read(config.out.stem, config.kind)
    if config.wanted.policy is not None:
        return policy
    labels = tuple(replace(label, action=config.action) for label in policy.labels)
    return replace(policy, labels=labels)


def needs(error: ModuleNotFoundError) -> InputError:
    """Return what is said where the extra is not installed."""
    module = (error.name or "").partition(".")[0]
    return InputError(f"this command needs {module}: pip install 'clip-rt[calibrate]'.")


def write_text(path: Path, text: str) -> None:
    """Write a page; names of files in it may be no text."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _fit(
    client: Client,
    policy: Policy,
    examples: Sequence[Example],
    target: Target,
    progress: Progress,
) -> Calibrated:
    import numpy as np

    from clip_rt.calibration.calibrate import calibrate, strip
    from clip_rt.calibration.examples import describe_data
    from clip_rt.moderation import decisions

    manifest = client.manifest
    bare = strip(policy)
    texts = decisions.list_texts(bare, manifest.score)
    text_embeddings = embed_labels(client, texts, bare.templates)
    images = [each.image for each in examples]
    kept, image_embeddings = embed_all(client, manifest, images, progress)
    used = [examples[index] for index in kept]
    similarities, background = decisions.compare(bare, image_embeddings, text_embeddings)
    is_true = [[label.name in each.labels for label in bare.labels] for each in used]
    return calibrate(
        bare,
        manifest,
        similarities,
        background,
        np.array(is_true, bool).reshape(similarities.shape),
        target=target,
        data=describe_data(used),
        date=datetime.datetime.now(datetime.timezone.utc).date(),
    )


def _say_error(fit: Calibrated) -> None:
    if (error := fit.policy.calibration_error) is not None:
        sys.stderr.write(
            f"expected calibration error: {error.before:.3f} before, {error.after:.3f} after\n"
        )


def _make_row(label: Label) -> Row:
    from clip_rt.calibration.calibrate import find_threshold

    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"label": label.name, "action": label.action}
    measured, target = label.measured, label.target
    if measured is None or target is None:
        return row
    row |= {
        "images": measured.num_true,
        "target": f"{target.measure}={target.value:g}",
        "flagged": measured.num_flagged,
        "promised": measured.is_target_met,
        "shortfall": measured.shortfall or None,
    }
    if (threshold := find_threshold(label)) is not None:
        row["threshold"] = round(threshold, NUM_DIGITS)
    for name in ("precision", "recall"):
        if (share := getattr(measured, name)) is not None:
            row |= {
                name: round(share.value, NUM_DIGITS),
                f"{name}_low": round(share.low, NUM_DIGITS),
            }
    return row
