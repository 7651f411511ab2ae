"""How often the bundled model says "none of these" of drawings that none of the labels names.

    python -m benchmarks.studies.open_set

Labels are some names of emoji; the drawings are those of every emoji, in styles that the model
never saw. A drawing is known where its name is among the labels, and strange otherwise: many of
these are near to a label, as "grinning cat" is to "cat face". Measured are
`Client.zero_shot(none_of_these=True)` and thresholds on the probability and on the similarity of
the best label: what they answer, and how well each tells strange drawings from known ones whatever
the threshold (AUROC: how often a strange drawing looks stranger than a known one).

Every embedding comes from the real Triton through `clip_rt.Client`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

import clip_rt
from benchmarks.record import save
from benchmarks.studies.common import ROOT, show
from benchmarks.studies.drawings import EMOJI_STYLES, TEMPLATES, pictures
from benchmarks.studies.emoji import load_style, names
from clip_rt.classification.open_set import (
    BACKGROUND,
    NONE_OF_THESE,
    background_of,
    score_images,
)
from clip_rt.wire.manifest import Manifest
from clip_rt_commands import program
from clip_rt_commands.errors import command

THRESHOLDS = (0.5, 0.9)
MAX_REFUSED = 0.1
"""Share of known drawings that may be refused, where ways are compared at equal cost."""
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class OpenSetConfig:
    """Measure, print a table, and write a dated JSON."""

    repository: Path = ROOT / "model_repository"
    """Model repository to serve."""
    num_labels: tuple[int, ...] = (10, 60, 300)
    """Labels of a task that are drawn from all names."""
    num_draws: int = 20
    """Tasks of each size; figures are means."""
    seed: int = 0
    """Of the draws."""


@dataclass(frozen=True)
class Style:
    """All drawings of one style, embedded."""

    names: Sequence[str]
    image_NE: NDArray[np.float32]


class Measure:
    """Measures tasks on styles, all embeddings made once."""

    def __init__(self, client: clip_rt.Client, styles: Sequence[str]) -> None:
        drawings = {style: load_style(style) for style in styles}
        self.styles = {
            style: Style(names(each), client.encode_images(pictures(each)))
            for style, each in drawings.items()
        }
        self.labels = tuple(sorted({name for each in self.styles.values() for name in each.names}))
        texts = tuple(dict.fromkeys((*self.labels, *BACKGROUND)))
        rows = client.class_embeddings(texts, templates=TEMPLATES)
        self._row_by_text = dict(zip(texts, rows, strict=True))
        self.manifest: Manifest = client.manifest

    def __call__(self, style: Style, labels: Sequence[str]) -> Figures:
        """Return what became of known and of strange drawings, with each way to tell them."""
        is_known = np.isin(style.names, labels)
        true_N = np.where(is_known, style.names, NONE_OF_THESE)
        background = background_of(self.manifest.score, labels)
        class_CE = np.stack([self._row_by_text[each] for each in (*labels, *background)])
        closed = score_images(self.manifest, style.image_NE, class_CE[: len(labels)], labels)
        opened = score_images(self.manifest, style.image_NE, class_CE, labels, none_of_these=True)
        figures = {"right": float(np.mean(np.array(closed.best)[is_known] == true_N[is_known]))}
        strangeness = {
            "none of these": opened.probabilities[:, -1],
            "probability": -closed.probabilities.max(axis=1),
            "similarity": -closed.logits.max(axis=1),
        }
        for signal, strange_N in strangeness.items():
            figures[f"{signal}: AUROC"] = float(roc_auc_score(~is_known, strange_N))
            limit = np.quantile(strange_N[is_known], 1 - MAX_REFUSED)
            refused = float(np.mean(strange_N[~is_known] > limit))
            figures[f"{signal}: strange refused, with 1 in 10 known"] = refused
        answers = {"none of these": np.array(opened.best)}
        for threshold in THRESHOLDS:
            answers[f"threshold {threshold}"] = np.array(
                [each[0][0] if each else NONE_OF_THESE for each in closed.above(threshold)]
            )
        for way, answer_N in answers.items():
            is_none = answer_N == NONE_OF_THESE
            figures |= {
                f"{way}: known right": float(np.mean((answer_N == true_N)[is_known])),
                f"{way}: known refused": float(np.mean(is_none[is_known])),
                f"{way}: strange refused": float(np.mean(is_none[~is_known])),
            }
        return figures


def mean(rows: Sequence[Figures]) -> Figures:
    """Average figures over tasks."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def main(config: OpenSetConfig) -> None:
    """Measure label sets of each size on each style."""
    rng = np.random.default_rng(config.seed)
    with clip_rt.Client(repository=config.repository) as client:
        measure = Measure(client, EMOJI_STYLES)
    tasks = {
        f"{number} names": [
            tuple(rng.choice(measure.labels, number, replace=False).tolist())
            for _ in range(config.num_draws)
        ]
        for number in config.num_labels
    }
    results = {
        style_name: {
            task: mean([measure(style, labels) for labels in draws])
            for task, draws in tasks.items()
        }
        for style_name, style in measure.styles.items()
    }
    for style_name, figures_by_task in results.items():
        show(
            ("", *figures_by_task),
            [
                (name, *(f"{row[name]:.3f}" for row in figures_by_task.values()))
                for name in next(iter(figures_by_task.values()))
            ],
            title=style_name,
        )
    document = {
        "templates": TEMPLATES,
        "background": BACKGROUND,
        "draws": config.num_draws,
        "drawings": {name: len(each.names) for name, each in measure.styles.items()},
        "results": results,
    }
    save("studies.open_set", document, packages=("numpy", "onnxruntime", "openvino"))


if __name__ == "__main__":
    with command():
        main(tyro.cli(OpenSetConfig, prog=program(__spec__.name), description=__doc__))
