"""What a fitted policy is worth, on drawings of styles that the bundled model never saw.

    python -m benchmarks.studies.calibration

Emoji are split at random into those a policy is fitted on and those it is tested on, many times.
Measured are the expected calibration error before and after, whether thresholds reach their target
on drawings that they were not chosen on, beside the lowest threshold that reaches it on its own,
and what a policy says that was fitted on too few. Every embedding comes from the real
Triton through `clip_rt.Client`; fits are those of `clip-rt calibrate`.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

import clip_rt
from benchmarks.findings import Bar, at_least, at_most
from benchmarks.record import describe_bar, save
from benchmarks.studies.common import ROOT, show
from benchmarks.studies.drawings import EMOJI_STYLES, TEMPLATES, pictures
from benchmarks.studies.emoji import kind_by_hexcode, load_style
from clip_rt.calibration.calibrate import Calibrated, calibrate, find_threshold
from clip_rt.calibration.measures import calibration_error
from clip_rt.moderation import decisions
from clip_rt.moderation.curve import precision_recall, wilson
from clip_rt.moderation.policy import Data, Kind, Label, Measure, Policy, Target
from clip_rt.wire.manifest import Manifest
from clip_rt_commands import program
from clip_rt_commands.errors import command

KINDS_BY_LABEL = {
    "person": (
        *("person", "person gesturing", "person with a profession", "fantasy person"),
        *("person doing something", "person doing sport", "family"),
    ),
    "animal": ("mammal", "bird"),
    "food": ("fruit", "meal", "drink"),
    "vehicle or building": ("land vehicle", "building"),
    "button": ("arrow", "media control button", "letter button", "geometric shape"),
    "flag": ("flag",),
}
"""Labels of a task, and the kinds of emoji that each fits, `studies.emoji`."""
PROMPTS_BY_LABEL = KINDS_BY_LABEL | {
    "person": ("man", "woman", "boy", "girl", "woman teacher", "person walking", "man dancing"),
    "animal": ("dog", "cat", "horse", "monkey", "bear", "rabbit", "cow", "bird", "chicken"),
    "vehicle or building": ("automobile", "bus", "truck", "train", "house", "castle"),
    "flag": ("flag: France", "flag: Germany", "flag: Japan", "flag: Brazil", "flag: Kenya"),
}
"""What is asked for them."""
TARGETS: tuple[tuple[Measure, float], ...] = (("precision", 0.8), ("recall", 0.9))
NUM_FEW = 40
"""Images that are too few for any of the targets."""
MAX_MISSED = 1 / 20
DATA = Data(sha256="0" * 64, size_bytes=0, num_images=0)
"""Of a policy that is not kept."""
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Measure, print tables, and write a dated JSON."""

    repository: Path = ROOT / "model_repository"
    """Model repository to serve."""
    num_splits: int = 20
    """Random halves; one is fitted on, the other is tested on."""
    seed: int = 0
    """Of the splits."""


@dataclass(frozen=True)
class Task:
    """A policy that is not fitted yet, and images with what they show."""

    policy: Policy
    manifest: Manifest
    similarity_NC: NDArray[np.float32]
    background_NB: NDArray[np.float32]
    is_true_NC: NDArray[np.bool_]

    def fit(self, rows: NDArray[np.intp], target: Target) -> Calibrated:
        """Fit the policy on some of the images."""
        return calibrate(
            self.policy,
            self.manifest,
            self.similarity_NC[rows],
            self.background_NB[rows],
            self.is_true_NC[rows],
            target=target,
            data=DATA,
            date=datetime.date.today(),
        )

    def predict(self, policy: Policy, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the probabilities that a policy gives some of the images."""
        cosines = self.similarity_NC[rows], self.background_NB[rows]
        return decisions.find_probabilities(policy, self.manifest, *cosines)

    def error(self, policy: Policy, rows: NDArray[np.intp]) -> float:
        """Return the calibration error of a policy on some of the images."""
        probabilities = self.predict(policy, rows)
        is_true = self.is_true_NC[rows]
        return calibration_error(policy.kind, probabilities, is_true, policy.none_of_these)


class Styles:
    """Drawings of each style, embedded once."""

    def __init__(self, client: clip_rt.Client, styles: Sequence[str]) -> None:
        self._client = client
        self.drawings = {style: load_style(style) for style in styles}
        self._image_NE = {
            style: client.encode_images(pictures(each)) for style, each in self.drawings.items()
        }

    def make_task(self, style: str, policy: Policy, shown: Sequence[str | None]) -> Task:
        """Compare the drawings of a style with the labels of a policy.

        Args:
            style: One of `drawings`.
            policy: Not fitted.
            shown: Of each drawing the label that fits; "" where none does, None leaves it out.
        """
        manifest = self._client.manifest
        texts = decisions.list_texts(policy, manifest.score)
        text_PE = self._client.class_embeddings(texts, templates=policy.templates)
        rows = [row for row, label in enumerate(shown) if label is not None]
        cosines = decisions.compare(policy, self._image_NE[style][rows], text_PE)
        labels = np.array([label.name for label in policy.labels])
        is_true = np.array([shown[row] for row in rows])[:, None] == labels
        return Task(policy, manifest, *cosines, is_true)

    def kinds(self, style: str, kind: Kind, *, none_of_these: bool = False) -> Task:
        """Say of which kinds drawings are, among those that have a kind.

        Args:
            style: One of `drawings`.
            kind: Of the policy.
            none_of_these: Of a softmax; without it drawings that no label fits are left out.
        """
        policy = Policy(
            name="kinds",
            kind=kind,
            labels=tuple(
                Label(name=name, prompts=prompts) for name, prompts in PROMPTS_BY_LABEL.items()
            ),
            templates=tuple(TEMPLATES),
            none_of_these=none_of_these,
        )
        kinds, kind_by_code = kind_by_hexcode()
        label_by_kind = {
            kind: label for label, members in KINDS_BY_LABEL.items() for kind in members
        }
        other = "" if none_of_these or kind == "independent" else None
        shown = [
            label_by_kind.get(kinds[kind_by_code[record["emoji"]]], other)
            if record["emoji"] in kind_by_code
            else None
            for record in self.drawings[style].records
        ]
        return self.make_task(style, policy, shown)


def split(rng: np.random.Generator, num: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return two random halves of the rows."""
    order = rng.permutation(num)
    return order[: num // 2], order[num // 2 :]


def measure_error(
    task: Task, splits: Iterable[tuple[NDArray[np.intp], NDArray[np.intp]]]
) -> Figures:
    """Return the calibration error on the half that was not fitted on, means over splits."""
    # The error is of the probabilities; no threshold is searched for.
    labels = tuple(replace(label, action="allow") for label in task.policy.labels)
    task = replace(task, policy=replace(task.policy, labels=labels))
    target = Target(measure="recall", value=0.5)
    rows = []
    for fitted, others in splits:
        policy = task.fit(fitted, target).policy
        rows.append((task.error(task.policy, others), task.error(policy, others)))
    before, after = np.mean(rows, axis=0)
    return {
        "before": float(before),
        "after": float(after),
        "ratio": float(after / before),
        "worst_ratio": float(max(after / before for before, after in rows)),
        "images": len(task.is_true_NC),
        "labels": task.is_true_NC.shape[1],
    }


def measure_thresholds(
    task: Task, splits: Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]], target: Target
) -> Figures:
    """Return how often thresholds do on other images what they were chosen for, by label."""
    found: Figures = {}
    trials: dict[str, list[tuple[float, float, float]]] = {}
    naive: dict[str, list[bool]] = {}
    kept = dict.fromkeys((label.name for label in task.policy.labels), 0)
    for fitted, others in splits:
        fit = task.fit(fitted, target)
        after = task.predict(fit.policy, others)
        for index, label in enumerate(fit.policy.labels):
            threshold = find_threshold(label)
            if threshold is None or label.measured is None or not label.measured.is_target_met:
                continue
            kept[label.name] += 1
            is_true = task.is_true_NC[others, index]
            right, of = _count(after[:, index] >= threshold, is_true, target)
            trials.setdefault(label.name, []).append((right / of if of else 1.0, *_ends(right, of)))
            # The lowest or highest threshold that does it on the images that are fitted on.
            lucky = _choose_lucky(fit.after[:, index], fit.is_true[:, index], target)
            right, of = _count(after[:, index] >= lucky, is_true, target)
            naive.setdefault(label.name, []).append(of > 0 and right / of < target.value)
    for name, rows in trials.items():
        share, _, high = (np.array(column) for column in zip(*rows, strict=True))
        found[name] = {
            "splits_with_threshold": kept[name],
            "reached_within_interval": int((high >= target.value).sum()),
            "reached": int((share >= target.value).sum()),
            "mean": float(share.mean()),
            "worst": float(share.min()),
            "missed_by_lowest_on_own_images": int(sum(naive[name])),
        }
    return found


def _count(
    is_flagged: NDArray[np.bool_], is_true: NDArray[np.bool_], target: Target
) -> tuple[int, int]:
    of = is_flagged if target.measure == "precision" else is_true
    return int((is_flagged & is_true).sum()), int(of.sum())


def _ends(successes: int, trials: int) -> tuple[float, float]:
    low, high = wilson(successes, trials)
    return float(low), float(high)


def _choose_lucky(
    probabilities: NDArray[np.float64], is_true: NDArray[np.bool_], target: Target
) -> float:
    curve = precision_recall(probabilities, is_true)
    if target.measure == "precision":
        return float(curve.thresholds[np.flatnonzero(curve.precision >= target.value)[0]])
    return float(curve.thresholds[np.flatnonzero(curve.recall >= target.value)[-1]])


def measure_few(task: Task, rng: np.random.Generator, num_draws: int) -> Figures:
    """Return what policies say that were fitted on too few images."""
    target = Target(measure="precision", value=0.95)
    num_labels = num_promised = num_said = 0
    for _ in range(num_draws):
        rows = rng.permutation(len(task.is_true_NC))[:NUM_FEW]
        policy = task.fit(rows, target).policy
        num_labels += len(policy.labels)
        measured = [label.measured for label in policy.labels if label.measured is not None]
        num_promised += sum(each.is_target_met for each in measured)
        num_said += sum("at least" in each.shortfall for each in measured)
    return {
        "images": NUM_FEW,
        "labels": num_labels,
        "promised": num_promised,
        "said_how_many_it_takes": num_said,
    }


def measure(styles: Styles, config: CalibrationConfig) -> tuple[Figures, list[Bar]]:
    """Measure all tasks; return the figures, and what they are held to."""
    rng = np.random.default_rng(config.seed)
    errors: Figures = {}
    thresholds: Figures = {}
    bars: list[Bar] = []
    for style in styles.drawings:
        kinds = styles.kinds(style, "independent")
        tasks = {
            "6 kinds": styles.kinds(style, "softmax"),
            "6 kinds or none": styles.kinds(style, "softmax", none_of_these=True),
            "6 kinds, independent": kinds,
        }
        errors[style] = {}
        for name, task in tasks.items():
            halves = [split(rng, len(task.is_true_NC)) for _ in range(config.num_splits)]
            errors[style][name] = figures = measure_error(task, halves)
            what = f"{style}, {name}: error after / before"
            bars.append(at_most(what, figures["ratio"], 0.5))
        thresholds[style] = {}
        for measure_name, value in TARGETS:
            target = Target(measure=measure_name, value=value)
            halves = [split(rng, len(kinds.is_true_NC)) for _ in range(config.num_splits)]
            figures = measure_thresholds(kinds, halves, target)
            thresholds[style][f"{measure_name} {value:g}"] = figures
            for label, row in figures.items():
                bars.append(
                    at_least(
                        f"{style}, {label}, {measure_name} {value:g}: reached within its interval",
                        row["reached_within_interval"] / row["splits_with_threshold"],
                        1 - MAX_MISSED,
                    )
                )
    first = next(iter(styles.drawings))
    few = measure_few(styles.kinds(first, "independent"), rng, config.num_splits)
    bars.append(at_most("promised by policies fitted on too few images", few["promised"], 0))
    bars.append(
        at_least(
            "of their labels, that say how many it takes",
            few["said_how_many_it_takes"] / few["labels"],
            1,
        )
    )
    return {"errors": errors, "thresholds": thresholds, "few": few}, bars


def measure_shift(styles: Styles, config: CalibrationConfig) -> Figures:
    """Return the calibration error on the second style of what was fitted on the first."""
    fitted_on, other = styles.drawings
    rng = np.random.default_rng(config.seed)
    found: Figures = {}
    settings: tuple[tuple[str, Kind, bool], ...] = (
        ("6 kinds", "softmax", False),
        ("6 kinds or none", "softmax", True),
        ("6 kinds, independent", "independent", False),
    )
    for name, kind, none_of_these in settings:
        first, second = (
            styles.kinds(style, kind, none_of_these=none_of_these) for style in (fitted_on, other)
        )
        rows, _ = split(rng, len(first.is_true_NC))
        policy = first.fit(rows, Target(measure="recall", value=0.5)).policy
        everything = np.arange(len(second.is_true_NC))
        found[name] = {
            "fitted_on": fitted_on,
            "tested_on": other,
            "before": second.error(second.policy, everything),
            "after": second.error(policy, everything),
        }
    return found


def main(config: CalibrationConfig) -> None:
    """Measure, print, write."""
    with clip_rt.Client(repository=config.repository, timeout_s=300.0) as client:
        styles = Styles(client, EMOJI_STYLES)
        results, bars = measure(styles, config)
        results["shift"] = measure_shift(styles, config)
    for style, tasks in results["errors"].items():
        show(
            ("calibration error", "before", "after", "ratio", "worst ratio"),
            [
                (
                    name,
                    *(f"{row[key]:.3f}" for key in ("before", "after", "ratio", "worst_ratio")),
                )
                for name, row in tasks.items()
            ],
            title=style,
        )
        for target, rows in results["thresholds"][style].items():
            show(
                (target, "splits", "within interval", "reached", "mean", "worst", "lowest missed"),
                [
                    (
                        label,
                        row["splits_with_threshold"],
                        row["reached_within_interval"],
                        row["reached"],
                        f"{row['mean']:.3f}",
                        f"{row['worst']:.3f}",
                        row["missed_by_lowest_on_own_images"],
                    )
                    for label, row in rows.items()
                ],
                title=style,
            )
    show(
        ("bar", "value", "limit", "met"),
        [(b.what, f"{b.value:.3f}", b.limit, b.is_met) for b in bars],
    )
    document = {
        "templates": TEMPLATES,
        "kinds_by_label": KINDS_BY_LABEL,
        "prompts_by_label": PROMPTS_BY_LABEL,
        "splits": config.num_splits,
        "results": results,
        "bars": [describe_bar(each) for each in bars],
    }
    packages = ("numpy", "scikit-learn", "scipy", "onnxruntime", "openvino")
    save("studies.calibration", document, packages=packages)


if __name__ == "__main__":
    with command():
        main(tyro.cli(CalibrationConfig, prog=program(__spec__.name), description=__doc__))
