"""Accuracy against the number of examples per class, as the paper's Figure 6.

    python -m training.few_shot --checkpoint clip.safetensors --data shop/ --out few_shot.png

Labelled images go in; a plot and, on request, a JSON come out. Each seed draws its examples and
tests on the images nobody learned from, the same for every number of examples. Zero-shot learns
from none; a linear probe, CoOp, a text tower tuned with the images locked (LiT), an image tower
tuned with its classifier, and that one mixed half and half with the zero-shot model (WiSE-FT).

Source: Radford et al. 2021, section 3.1.5 and figure 6.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from clip_rt.errors import ImageError, InputError
from clip_rt.inputs.images import preprocess
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training.coop import context_probe, learn_context
from training.dual_encoder import DualEncoder
from training.evaluation.class_names import read_templates
from training.evaluation.embed import class_embeddings, embed_images
from training.evaluation.labelled import check_exist, read_samples
from training.evaluation.metrics import accuracy
from training.evaluation.source import Source, choose_shots, find_classes
from training.evaluation.tune import Recipe, tune_image, tune_text
from training.interpolate import interpolate, zero_shot_probe
from training.probe import fit_probe
from training.weights.load import fingerprint

ZERO_SHOT = "zero-shot"
METHODS = ("linear probe", "CoOp", "text tuning (LiT)", "fine-tuning", "WiSE-FT")
"""Ways to use examples, in the order of the legend."""

COOP_RECIPE = Recipe(num_steps=100, peak_lr=2e-2, batch_size=512)
TEXT_RECIPE = Recipe(num_steps=60, peak_lr=3e-4, batch_size=512)
IMAGE_RECIPE = Recipe(num_steps=40, peak_lr=1e-4, batch_size=32)
"""For many examples; few are learned from for `STEPS_PER_SHOT` each, or they would be overlearned.

Chosen on one draw of OpenMoji's black drawings; `benchmarks.studies.few_shot` says what that is
worth.
"""
STEPS_PER_SHOT = 10
COOP_WORDS = "a photo of a"
"""Where the context starts (Zhou et al. 2022 try it too): noise needs more examples than words."""
WISE_ALPHA = 0.5

Curves = dict[str, dict[int, list[float]]]
"""Accuracy of each seed, by number of examples, by method."""


@dataclass(frozen=True)
class Task:
    """Labelled images that a model may learn from and be tested on."""

    pixels_NSSC: NDArray[np.uint8]
    """uint8 (N, S, S, 3), as `clip_rt.preprocess` makes them."""
    image_NE: NDArray[np.float32]
    """Their embeddings."""
    right_N: NDArray[np.int64]
    labels: tuple[str, ...]
    """C names."""
    templates: tuple[str, ...]


def make_task(
    model: DualEncoder,
    pixels_NSSC: NDArray[np.uint8],
    right_N: NDArray[np.int64],
    labels: Sequence[str],
    templates: Sequence[str],
) -> Task:
    """Embed the images of a task once."""
    image_NE = embed_images(model, pixels_NSSC)
    return Task(pixels_NSSC, image_NE, right_N, tuple(labels), tuple(templates))


def measure(
    model: DualEncoder,
    task: Task,
    *,
    shots: Sequence[int],
    seeds: Sequence[int],
    progress: bool = True,
) -> Curves:
    """Measure every method at every number of examples with every seed.

    Returns:
        Mean recall over classes on the images that no number of examples takes; zero-shot at 0.

    Raises:
        InputError: a class has no more images than the largest number of examples.
    """
    most = max(shots)
    rarest = int(np.bincount(task.right_N, minlength=len(task.labels)).min())
    if min(shots) < 1 or rarest <= most:
        raise InputError(
            f"shots are {tuple(shots)} and the rarest class has {rarest} images; each must be at "
            "least 1 and leave an image to test on."
        )
    curves: Curves = {name: {} for name in (ZERO_SHOT, *METHODS)}
    total = len(seeds) * (1 + len(shots) * len(METHODS))
    with tqdm(total=total, desc="few-shot", unit="fit", disable=not progress) as bar:
        for seed in seeds:
            chosen = choose_shots(task.right_N, most, rng=np.random.default_rng(seed))
            test = np.setdiff1d(np.arange(len(task.right_N)), chosen)
            weight_CE = zero_shot_probe(model, task.labels, templates=task.templates).weight
            score = _score(task.image_NE[test] @ weight_CE.T, task, test)
            curves[ZERO_SHOT].setdefault(0, []).append(score)
            bar.update()
            for k in shots:
                rows = chosen[: k * len(task.labels)]
                for name, score in _fit_all(model, task, rows, test, seed=seed).items():
                    curves[name].setdefault(k, []).append(score)
                    bar.update()
    return curves


def _fit_all(
    model: DualEncoder, task: Task, rows: NDArray[np.int64], test: NDArray[np.int64], *, seed: int
) -> dict[str, float]:
    """Use the examples in `rows` in every way; score each on `test`."""
    image_NE, right_N = task.image_NE[rows], task.right_N[rows]
    test_NE = task.image_NE[test]
    found = {}
    probe = fit_probe(
        image_NE,
        right_N,
        labels=task.labels,
        fingerprint=fingerprint(model.weights()),
        rng=np.random.default_rng(seed),
    )
    found["linear probe"] = _score(probe.classify(test_NE).logits, task, test)
    shots = len(rows) // len(task.labels)
    recipe = _limit(COOP_RECIPE, shots, seed)
    context_MD = learn_context(
        model, image_NE, right_N, task.labels, words=COOP_WORDS, recipe=recipe
    )
    probe = context_probe(model, context_MD, task.labels)
    found["CoOp"] = _score(probe.classify(test_NE).logits, task, test)
    recipe = _limit(TEXT_RECIPE, shots, seed)
    tuned = tune_text(model, image_NE, right_N, task.labels, recipe, templates=task.templates)
    class_CE = class_embeddings(tuned, task.labels, templates=task.templates)
    found["text tuning (LiT)"] = _score(test_NE @ class_CE.T, task, test)
    class_CE = class_embeddings(model, task.labels, templates=task.templates)
    recipe = _limit(IMAGE_RECIPE, shots, seed)
    tuned, tuned_CE = tune_image(model, task.pixels_NSSC[rows], right_N, class_CE, recipe)
    pixels = task.pixels_NSSC[test]
    found["fine-tuning"] = _score(embed_images(tuned, pixels) @ tuned_CE.T, task, test)
    tuned.load_state_dict(interpolate(model.state_dict(), tuned.state_dict(), WISE_ALPHA))
    mixed_CE = (1 - WISE_ALPHA) * class_CE + WISE_ALPHA * tuned_CE
    found["WiSE-FT"] = _score(embed_images(tuned, pixels) @ mixed_CE.T, task, test)
    return found


def _limit(recipe: Recipe, shots: int, seed: int) -> Recipe:
    return replace(recipe, num_steps=min(recipe.num_steps, STEPS_PER_SHOT * shots), seed=seed)


def _score(logits_NC: NDArray[np.float32], task: Task, test: NDArray[np.int64]) -> float:
    return accuracy(logits_NC, task.right_N[test]).mean_per_class


def summarise(curves: Curves) -> dict[str, dict[int, dict[str, float]]]:
    """Return mean and standard deviation over seeds, by number of examples, by method."""
    return {
        name: {
            k: {"mean": float(np.mean(scores)), "std": float(np.std(scores))}
            for k, scores in points.items()
        }
        for name, points in curves.items()
    }


def draw(curves: Curves, picture: Path, *, title: str, subtitle: str = "") -> None:
    """Draw accuracy against examples per class; bands are one standard deviation over seeds."""
    summary = summarise(curves)
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    axes = figure.subplots()
    zero = 100 * summary[ZERO_SHOT][0]["mean"]
    axes.axhline(zero, color="0.35", linestyle=(0, (5, 3)), linewidth=1.3, zorder=1)
    axes.plot([0], [zero], marker="*", markersize=15, color="0.15", linestyle="none", zorder=4)
    shots = sorted(summary[METHODS[0]])
    ends = []
    for index, name in enumerate(METHODS):
        mean = 100 * np.array([summary[name][k]["mean"] for k in shots])
        std = 100 * np.array([summary[name][k]["std"] for k in shots])
        colour = f"C{index}"
        axes.plot(shots, mean, marker="o", markersize=5, color=colour, zorder=3)
        axes.fill_between(shots, mean - std, mean + std, color=colour, alpha=0.13, lw=0)
        ends.append((float(mean[-1]), name, colour))
    _label_ends(axes, shots[-1], ends)
    axes.annotate(
        f"zero-shot\n{zero:.1f} %", (0, zero), xytext=(9, -31), textcoords="offset points",
        color="0.15",
    )  # fmt: skip
    axes.set_xscale("symlog", linthresh=1, linscale=0.6, base=2)
    axes.set_xticks([0, *shots])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_xlim(-0.12, shots[-1] * 2.6)
    axes.set(xlabel="labelled examples per class", ylabel="mean recall over classes, %")
    axes.set_title(title, loc="left", fontweight="bold", pad=24 if subtitle else None)
    if subtitle:
        axes.text(0, 1.025, subtitle, transform=axes.transAxes, color="0.35", fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=130)


def show(curves: Curves, console: Console) -> None:
    """Print the curves as a table."""
    summary = summarise(curves)
    shots = sorted(summary[METHODS[0]])
    table = Table("mean recall, %", *(f"{k} per class" for k in shots))
    zero = summary[ZERO_SHOT][0]
    for name in (ZERO_SHOT, *METHODS):
        points = [zero] * len(shots) if name == ZERO_SHOT else [summary[name][k] for k in shots]
        cells = (f"{100 * point['mean']:.1f} ± {100 * point['std']:.1f}" for point in points)
        table.add_row(name, *cells)
    console.print(table)


@dataclass(frozen=True, kw_only=True)
class FewShotConfig(Source):
    """What to learn from, how often."""

    templates: str = "simple"
    """Prompts: a named set, or a file with one template a line."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Examples of each class."""
    num_seeds: int = 3
    """Draws of examples to average over."""
    out: Path = Path("few_shot.png")
    """Where the plot goes."""
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Also write the figures here."""


def main(config: FewShotConfig) -> None:
    """Measure, print a table, draw the plot."""
    table = config.read_table()
    templates = read_templates(config.templates)
    check_exist(*config.data)
    model = config.open_model()
    samples = list(
        read_samples(config.data, allow_outside=config.allow_outside, max_bytes=config.max_bytes)
    )
    classes = find_classes([sample.label for sample in samples], table)
    kept = [samples[row] for row in classes.rows_N]
    try:
        pixels = preprocess(
            (sample.image for sample in kept),
            side_px=model.facts.side_px,
            resizing=model.facts.resizing,
            max_pixels=config.max_pixels,
            max_bytes=config.max_bytes,
        )
    except ImageError as error:
        where = "" if error.index is None else f"{kept[error.index].key}: "
        raise ImageError(f"{where}{error}", index=error.index) from error
    task = make_task(model, pixels, classes.right_N, classes.names, templates)
    curves = measure(model, task, shots=config.shots, seeds=range(config.num_seeds))
    show(curves, Console())
    title = f"{len(classes.names):,} classes of {', '.join(path.stem for path in config.data)}"
    draw(curves, config.out, title=title)
    if config.json_file:
        text = json.dumps({"curves": curves, "summary": summarise(curves)}, indent=2)
        config.json_file.write_text(text + "\n", encoding="utf-8")


def _label_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each method beside the end of its line, spread so that none covers another."""
    low, high = axes.get_ylim()
    gap = 0.05 * (high - low)
    y = -np.inf
    for value, name, colour in sorted(ends):
        y = max(value, y + gap)
        axes.annotate(
            name, (x, value), xytext=(x * 1.12, y), color=colour, va="center", fontsize=10
        )


if __name__ == "__main__":
    with command():
        main(tyro.cli(FewShotConfig, prog=program("training.few_shot"), description=__doc__))
