"""What a fit is worth, and how groups differ, as pictures."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from clip_rt.calibration import measures
from clip_rt.calibration.calibrate import Calibrated, find_threshold
from clip_rt.classification.open_set import NONE_OF_THESE
from clip_rt.moderation.curve import precision_recall

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from clip_rt.calibration.groups import Comparison

MAX_CURVES = 8
MAX_CLASSES = 30
"""Of a picture; those with the most images."""
MAX_CHARACTERS = 28
"""Of a name in a picture."""
DPI = 110
BEFORE, AFTER, FAINT = "#b0b7c0", "#1f6feb", "#d1d9e0"


def draw_calibration(fit: Calibrated) -> bytes:
    """Draw reliability, precision and recall of each label, and confusions; returns a PNG."""
    figure = Figure(figsize=(15, 5), layout="constrained", dpi=DPI)
    left, middle, right = figure.subplots(1, 3)
    _draw_reliability(left, fit)
    _draw_curves(middle, fit)
    _draw_confusion(right, fit)
    return _encode(figure)


def draw_groups(comparison: Comparison) -> bytes:
    """Draw the rate of each label in each group, with intervals; returns a PNG."""
    order = np.argsort(-comparison.rates.max(axis=0), kind="stable")[:MAX_CLASSES]
    num_groups = len(comparison.groups)
    height = 1.5 + 0.22 * len(order) * max(num_groups, 2)
    figure = Figure(figsize=(10, height), layout="constrained", dpi=DPI)
    axes = figure.subplots()
    width = 0.8 / num_groups
    for index, group in enumerate(comparison.groups):
        centres = np.arange(len(order)) + (index - (num_groups - 1) / 2) * width
        rates = comparison.rates[index, order]
        low, high = (each[index, order] for each in comparison.intervals)
        axes.barh(centres, rates, width, label=_shorten(group))
        axes.errorbar(
            rates, centres, xerr=[rates - low, high - rates], fmt="none", ecolor="#59636e", lw=1
        )
    names = [
        _shorten(comparison.labels[index]) + (" *" if comparison.differs[:, :, index].any() else "")
        for index in order
    ]
    axes.set_yticks(range(len(order)), names)
    axes.invert_yaxis()
    axes.set_xlabel("share of the images of the group, with 95 % intervals; * differs")
    axes.legend(fontsize="small")
    return _encode(figure)


def _draw_reliability(axes: Axes, fit: Calibrated) -> None:
    policy = fit.policy
    error = policy.calibration_error
    axes.plot([0, 1], [0, 1], color=FAINT, lw=1)
    for name, probabilities, colour in (
        ("before", fit.before, BEFORE),
        ("after", fit.after, AFTER),
    ):
        found = measures.reliability(
            *measures.predictions(policy.kind, probabilities, fit.is_true, policy.none_of_these)
        )
        shown = "" if error is None else f", error {getattr(error, name):.3f}"
        sizes = 12 + 120 * np.sqrt(found.num_predictions / found.num_predictions.sum())
        axes.plot(found.mean_probability, found.share_right, color=colour, lw=1)
        axes.scatter(
            found.mean_probability, found.share_right, sizes, colour, label=f"{name}{shown}"
        )
    axes.set(xlabel="probability", ylabel="share that is right", title="Reliability")
    axes.legend(loc="upper left", fontsize="small")


def _draw_curves(axes: Axes, fit: Calibrated) -> None:
    counts = fit.is_true.sum(axis=0)
    for index in np.argsort(-counts, kind="stable")[:MAX_CURVES]:
        label = fit.policy.labels[index]
        if label.action == "allow" or not counts[index]:
            continue
        curve = precision_recall(fit.after[:, index], fit.is_true[:, index])
        (line,) = axes.plot(curve.recall, curve.precision, lw=1.5, label=_shorten(label.name))
        threshold, measured = find_threshold(label), label.measured
        if threshold is not None and measured is not None and measured.is_target_met:
            chosen = min(int(np.searchsorted(curve.thresholds, threshold)), len(curve.recall) - 1)
            axes.plot(curve.recall[chosen], curve.precision[chosen], "o", color=line.get_color())
    axes.set(
        xlabel="recall",
        ylabel="precision",
        ylim=(0, 1.02),
        title="Precision and recall, thresholds",
    )
    if axes.has_data():
        axes.legend(loc="lower left", fontsize="small")


def _draw_confusion(axes: Axes, fit: Calibrated) -> None:
    policy = fit.policy
    share = measures.confusion(
        policy.kind, fit.after, fit.is_true, fit.is_flagged, policy.none_of_these
    )
    counts = fit.is_true.sum(axis=0)
    kept = np.sort(np.argsort(-counts, kind="stable")[:MAX_CLASSES])
    names = [_shorten(policy.labels[index].name) for index in kept] + [NONE_OF_THESE]
    share = share[np.ix_([*kept, -1], [*kept, -1])]
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = "small" if len(names) <= 12 else "xx-small"
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    if len(names) <= 12:
        for row, column in np.ndindex(share.shape):
            if np.isfinite(share[row, column]):
                colour = "white" if share[row, column] > 0.5 else "black"
                text = f"{share[row, column]:.2f}"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
    what = "answered" if policy.kind == "softmax" else "flagged as"
    axes.set(xlabel=what, ylabel="shown", title="Confusion, shares of a row")


def _shorten(name: str) -> str:
    # A dollar would begin a formula.
    text = "".join(each if each.isprintable() else "?" for each in name).replace("$", r"\$")
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 3] + "..."


def _encode(figure: Figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Names may be in any script; what the font lacks is a box.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(file, format="png")
    return file.getvalue()
