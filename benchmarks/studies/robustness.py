"""What a change of drawing style costs each way of naming drawings: the paper, 3.3.

    python -m benchmarks.studies.robustness --checkpoint runs/drawings/checkpoint.safetensors \
        --drawings data/drawings

The task is to say of which kind an emoji is (`studies.emoji`). Classifiers are fitted on one
drawing style, Noto's, and tested on emoji they were not fitted on, in Noto's style, in styles the
model learned from, and in styles it never saw. The same emoji are tested in every style.

Effective robustness (Taori et al. 2020) is the accuracy on other styles above what accuracy on Noto
would have led to expect: a line, on logit axes, through classifiers on pixels and on HOG features
fitted on more and more of Noto. Zero-shot CLIP was fitted on no style for this task, but its
training showed it the seen styles with the names of these emoji; only the held-out ones are new.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from scipy.special import expit, logit

from benchmarks.contenders.implementation import unit
from benchmarks.record import save
from benchmarks.studies.common import show
from benchmarks.studies.drawings import hog_features, small_pixels
from benchmarks.studies.emoji import kind_by_hexcode, load_style, with_kinds
from clip_rt.inputs.prompts import DEFAULT_TEMPLATE
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training.data.drawing_batches import Drawings, load_drawings
from training.dual_encoder import DualEncoder
from training.evaluation.embed import embed_images, on_white, open_model
from training.evaluation.metrics import accuracy
from training.interpolate import zero_shot_probe
from training.probe import fit_probe

REFERENCE = "noto"
SEEN_STYLES = ("twemoji", "emojione", "fluent-emoji-flat", "fluent-emoji")
HELD_OUT_STYLES = ("openmoji", "openmoji-black")
STYLES = (REFERENCE, *SEEN_STYLES, *HELD_OUT_STYLES)
MIN_EMOJI = 12
"""Of a kind, in every style; half of them are fitted on. Kinds with fewer are left out."""
GROUPS = ("seen", "held_out")
BASELINE_SHARES = (0.125, 0.25, 0.5, 1.0)
"""Of Noto's training emoji, for the points the line goes through."""

Features = dict[str, NDArray[np.float32]]
"""One row for each emoji, by style."""


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig:
    """Measure, print a table, and write a dated JSON."""

    checkpoint: Path
    """Weights of the bundled model."""
    drawings: Path = Path("data/drawings")
    """Folder with train/*.tar."""
    seed: int = 0
    """Of the halves to fit and to test on."""


@dataclass(frozen=True)
class Task:
    """The same emoji in every style."""

    pixels_by_style: dict[str, NDArray[np.uint8]]
    """uint8 (N, S, S, 3) each, row for row the same emoji."""
    right_N: NDArray[np.int64]
    labels: tuple[str, ...]
    fit_rows: NDArray[np.int64]
    test_rows: NDArray[np.int64]


def load_drawing_style(name: str, drawings_dir: Path) -> Drawings:
    """Read all emoji of one style that have a kind."""
    if name in HELD_OUT_STYLES:
        return with_kinds(load_style(name))[0]
    return with_kinds(load_drawings([drawings_dir / f"train/{name}.tar"], progress=False))[0]


def make_task(drawings_dir: Path, *, seed: int) -> Task:
    """Line up the emoji that every style has, and choose half of each kind to fit on."""
    labels, kinds = kind_by_hexcode()
    rows_by_style, pixels_by_style = {}, {}
    for style in STYLES:
        drawings = load_drawing_style(style, drawings_dir)
        pixels_by_style[style] = on_white(drawings.pixels)
        rows_by_style[style] = {
            r["emoji"]: row for row, r in reversed([*enumerate(drawings.records)])
        }
    shared = sorted(set.intersection(*(set(rows) for rows in rows_by_style.values())))
    count_by_kind = Counter(kinds[code] for code in shared)
    common = sorted(kind for kind, count in count_by_kind.items() if count >= MIN_EMOJI)
    shared = [code for code in shared if kinds[code] in common]
    right_N = np.array([common.index(kinds[code]) for code in shared])
    rng = np.random.default_rng(seed)
    fit = np.zeros(len(shared), np.bool_)
    for each in np.unique(right_N):
        rows = rng.permutation(np.flatnonzero(right_N == each))
        fit[rows[: len(rows) // 2]] = True
    return Task(
        {
            style: pixels_by_style[style][[rows_by_style[style][code] for code in shared]]
            for style in STYLES
        },
        right_N,
        tuple(labels[kind] for kind in common),
        rng.permutation(np.flatnonzero(fit)),
        np.flatnonzero(~fit),
    )


def probe_accuracy(
    features: Features, task: Task, *, share: float = 1.0, seed: int
) -> dict[str, float]:
    """Fit a linear probe on a share of the reference style; return its accuracy on every style."""
    rng = np.random.default_rng(seed)
    rows = task.fit_rows
    if share < 1:
        kinds = [rows[task.right_N[rows] == each] for each in np.unique(task.right_N)]
        rows = np.concatenate([each[: max(1, round(share * len(each)))] for each in kinds])
    probe = fit_probe(
        features[REFERENCE][rows],
        task.right_N[rows],
        labels=task.labels,
        fingerprint="",
        rng=rng,
    )
    return {
        style: score(probe.classify(rows_of(features[style], task)).logits, task)
        for style in STYLES
    }


def rows_of(features: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
    """Keep the emoji that are tested."""
    return features[task.test_rows]


def score(logits_NC: NDArray[np.float32], task: Task) -> float:
    """Mean recall over the kinds of the emoji that are tested."""
    return accuracy(logits_NC, task.right_N[task.test_rows]).mean_per_class


def shifted(scores: dict[str, float], styles: tuple[str, ...]) -> float:
    """Average over some styles."""
    return float(np.mean([scores[style] for style in styles]))


def expect(points: list[tuple[float, float]]) -> Callable[[float], float]:
    """Fit a line on logit axes through (accuracy on the reference, on a shift)."""
    x, y = logit(np.array(points)).T
    slope, offset = np.polyfit(x, y, 1)
    return lambda reference: float(expit(slope * logit(reference) + offset))


def measure_once(
    model: DualEncoder, task: Task, *, seed: int
) -> tuple[dict[str, dict[str, float]], list[dict[str, float]]]:
    """Return the accuracy on every style by classifier, and that of the baselines of the line."""
    embedding = {style: embed_images(model, task.pixels_by_style[style]) for style in STYLES}
    zero = zero_shot_probe(model, task.labels, templates=[DEFAULT_TEMPLATE])
    found = {
        "zero-shot": {
            style: score(zero.classify(rows_of(embedding[style], task)).logits, task)
            for style in STYLES
        },
        "linear probe": probe_accuracy(embedding, task, seed=seed),
    }
    line = []
    for name, make in (("HOG", hog_features), ("16x16 pixels", small_pixels)):
        features = {style: unit(make(list(task.pixels_by_style[style]))) for style in STYLES}
        for share in BASELINE_SHARES:
            line.append(probe_accuracy(features, task, share=share, seed=seed))
        found[f"{name}, linear"] = line[-1]
    return found, line


def summarise(
    found: dict[str, dict[str, float]], line: list[dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """Add the averages of seen and of held-out styles, and the effective robustness on each."""
    rows = {}
    for name, scores in found.items():
        row: dict[str, Any] = {"accuracy": scores}
        for group, styles in zip(GROUPS, (SEEN_STYLES, HELD_OUT_STYLES), strict=True):
            expected = expect([(each[REFERENCE], shifted(each, styles)) for each in line])
            row[group] = shifted(scores, styles)
            row[f"effective_robustness_{group}"] = row[group] - expected(scores[REFERENCE])
        rows[name] = row
    return rows


def main(config: RobustnessConfig) -> None:
    """Measure every classifier on every style, and draw the line through the baselines."""
    task = make_task(config.drawings, seed=config.seed)
    found, line = measure_once(open_model(config.checkpoint), task, seed=config.seed)
    results = summarise(found, line)
    notes = {REFERENCE: "fitted on"} | dict.fromkeys(HELD_OUT_STYLES, "held out")
    rows = [
        (
            f"{style}, {notes.get(style, 'seen')}",
            *(f"{100 * row['accuracy'][style]:.1f}" for row in results.values()),
        )
        for style in STYLES
    ]
    rows += [
        (
            f"robustness, {group.replace('_', ' ')}",
            *(f"{100 * row[f'effective_robustness_{group}']:+.1f}" for row in results.values()),
        )
        for group in GROUPS
    ]
    show(("mean recall, %", *results), rows)
    document = {
        "reference": REFERENCE,
        "seen_hands": SEEN_STYLES,
        "held_out_hands": HELD_OUT_STYLES,
        "classes": task.labels,
        "fitted_emoji": len(task.fit_rows),
        "tested_emoji": len(task.test_rows),
        "templates": [DEFAULT_TEMPLATE],
        "metric": "mean recall over classes",
        "results": results,
        "line": line,
    }
    packages = ("numpy", "scikit-image", "scikit-learn", "torch")
    save("studies.robustness", document, packages=packages)


if __name__ == "__main__":
    with command():
        main(tyro.cli(RobustnessConfig, prog=program(__spec__.name), description=__doc__))
