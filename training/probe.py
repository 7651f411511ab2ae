"""Fit a linear classifier on a model's image embeddings, as the paper's linear probe.

    python -m training.probe --checkpoint clip.safetensors --data shop/ --out shop.npz

Images in class folders or shards go in; a file goes out that `clip_rt.Probe.load` reads and
`Client.classify` serves. The strength of the L2 penalty is found on a validation split, then the
classifier is fitted on everything.

Source: Radford et al. 2021, section 3.2 and appendix A.3: scikit-learn's L-BFGS, 1,000 iterations,
96 steps of the penalty from 1e-6 to 1e6, searched from coarse to fine. Deviation: the paper's
features are those before the projection; ours are the embeddings, because they are what is served.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from clip_rt.classification.probe import Probe
from clip_rt.errors import InputError
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training.evaluation.class_names import NameTable
from training.evaluation.labelled import check_exist
from training.evaluation.metrics import Accuracy, accuracy
from training.evaluation.source import Embedded, Source, embed_data, find_classes
from training.weights.load import fingerprint

STEPS_PER_DECADE = 8
L2_GRID = 10.0 ** (np.arange(12 * STEPS_PER_DECADE + 1) / STEPS_PER_DECADE - 6)
"""1e-6 to 1e6, 96 steps."""
COARSE_STEP = 2 * STEPS_PER_DECADE
"""The search begins with 1e-6, 1e-4, ... 1e6."""
DEFAULT_L2 = 1.0
"""Where no class has an example to spare for validation."""
MAX_ITERATIONS = 1000


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(Source):
    """What to fit, on what."""

    out: Path
    """The probe to write; ends in .npz."""
    validation: tuple[Path, ...] = ()
    """Like data; without it, a part of data is held back while the penalty is searched."""
    validation_fraction: float = 0.2
    """Size of that part."""
    test: tuple[Path, ...] = ()
    """Like data; only to report the accuracy of the finished probe."""
    seed: int = 0
    """Of the validation split."""


def search_l2(score: Callable[[float], float]) -> float:
    """Find the penalty with the highest score, from coarse to fine around the peak.

    Of equal scores the stronger penalty wins.

    Args:
        score: Quality on validation data of a classifier fitted with a penalty of `L2_GRID`.
    """
    known: dict[int, float] = {}

    def look(index: int) -> tuple[float, int]:
        if index not in known:
            known[index] = score(float(L2_GRID[index]))
        return known[index], index

    best = max(map(look, range(0, len(L2_GRID), COARSE_STEP)))
    step = COARSE_STEP // 2
    while step:
        sides = (best[1] - step, best[1] + step)
        best = max([best, *(look(index) for index in sides if 0 <= index < len(L2_GRID))])
        step //= 2
    return float(L2_GRID[best[1]])


def fit_logistic(
    image_NE: NDArray[np.float32], right_N: NDArray[np.int64], *, l2: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Minimise the summed cross-entropy plus l2 / 2 times the squared norm of the weights.

    Args:
        image_NE: Embeddings, (N, E).
        right_N: Class of each, 0 to C - 1, each at least once and C at least 2.
        l2: Strength of the penalty; the bias is free.

    Returns:
        Weight (C, E) and bias (C,), float32.

    Raises:
        InputError: there is one class only, or one has no example.
    """
    num_classes = int(right_N.max()) + 1 if len(right_N) else 0
    if num_classes < 2 or len(np.unique(right_N)) != num_classes:
        raise InputError(
            f"{len(np.unique(right_N))} of {num_classes} classes have an example; at least 2 "
            "classes, each with one, are needed."
        )
    model = LogisticRegression(C=1 / l2, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        # The paper stops at 1,000 iterations whether it has converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # One example of each class is no regression problem.
        warnings.filterwarnings("ignore", message="The number of unique classes")
        model.fit(image_NE.astype(np.float64), right_N)
    weight, bias = model.coef_, model.intercept_
    if num_classes == 2:
        # scikit-learn keeps the difference of the two only.
        weight = np.concatenate([np.zeros_like(weight), weight])
        bias = np.concatenate([np.zeros_like(bias), bias])
    return weight.astype(np.float32), bias.astype(np.float32)


def split_validation(
    right_N: NDArray[np.int64], *, fraction: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Choose what to hold back: of each class the same share, at least one, never all.

    Returns:
        bool (N,); nothing of classes with one example.
    """
    held_N = np.zeros(len(right_N), np.bool_)
    for each in np.unique(right_N):
        rows = rng.permutation(np.flatnonzero(right_N == each))
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held_N[rows[:count]] = True
    return held_N


def find_l2(
    image_NE: NDArray[np.float32],
    right_N: NDArray[np.int64],
    validation_NE: NDArray[np.float32],
    validation_right_N: NDArray[np.int64],
) -> float:
    """Search the penalty that is most accurate on validation data; the default without any."""
    if len(validation_right_N) == 0:
        return DEFAULT_L2

    def score(l2: float) -> float:
        weight_CE, bias_C = fit_logistic(image_NE, right_N, l2=l2)
        return accuracy(validation_NE @ weight_CE.T + bias_C, validation_right_N).top1

    return search_l2(score)


def fit_probe(
    image_NE: NDArray[np.float32],
    right_N: NDArray[np.int64],
    *,
    labels: Sequence[str],
    fingerprint: str,
    validation_fraction: float = 0.2,
    rng: np.random.Generator,
) -> Probe:
    """Search the penalty on a part of the examples, then fit on all.

    Args:
        image_NE: Embeddings, (N, E), rows of length 1.
        right_N: Class of each, an index into `labels`.
        labels: C names.
        fingerprint: Of the weights that made the embeddings.
        validation_fraction: Share of each class held back during the search.
        rng: Chooses that share.

    Raises:
        InputError: see `fit_logistic`.
    """
    held_N = split_validation(right_N, fraction=validation_fraction, rng=rng)
    l2 = find_l2(image_NE[~held_N], right_N[~held_N], image_NE[held_N], right_N[held_N])
    return _finish(image_NE, right_N, labels=labels, fingerprint=fingerprint, l2=l2)


def run(config: ProbeConfig) -> tuple[Probe, Accuracy | None]:
    """Do what `config` says; return the probe and its accuracy on the test data.

    Raises:
        InputError, CheckpointError: something it names cannot be used.
    """
    table = config.read_table()
    check_exist(*config.data, *config.validation, *config.test)
    model = config.open_model()
    embed = partial(embed_data, model, allow_outside=config.allow_outside, limits=config)
    images = embed(config.data)
    classes = find_classes(images.labels, table)
    image_NE, right_N = images.image_NE[classes.rows_N], classes.right_N
    weights = fingerprint(model.weights())
    if config.validation:
        held = embed(config.validation)
        held_NE, held_right_N = _same_classes(held, classes.ids, table)
        l2 = find_l2(image_NE, right_N, held_NE, held_right_N)
        image_NE = np.concatenate([image_NE, held_NE])
        right_N = np.concatenate([right_N, held_right_N])
        probe = _finish(image_NE, right_N, labels=classes.names, fingerprint=weights, l2=l2)
    else:
        probe = fit_probe(
            image_NE,
            right_N,
            labels=classes.names,
            fingerprint=weights,
            validation_fraction=config.validation_fraction,
            rng=np.random.default_rng(config.seed),
        )
    probe.save(config.out)
    if not config.test:
        return probe, None
    test_NE, test_right_N = _same_classes(embed(config.test), classes.ids, table)
    return probe, accuracy(probe.classify(test_NE).logits, test_right_N)


def main(config: ProbeConfig) -> None:
    """Fit, save, and say what came of it."""
    probe, found = run(config)
    console = Console(highlight=False)
    console.print(f"{config.out}: {len(probe.labels):,} classes, {probe.method}", soft_wrap=True)
    if found:
        console.print(
            f"test: top-1 {100 * found.top1:.2f} %, top-5 {100 * found.top5:.2f} %, mean per class "
            f"{100 * found.mean_per_class:.2f} %, {found.num_images:,} images",
            soft_wrap=True,
        )


def _finish(
    image_NE: NDArray[np.float32],
    right_N: NDArray[np.int64],
    *,
    labels: Sequence[str],
    fingerprint: str,
    l2: float,
) -> Probe:
    weight_CE, bias_C = fit_logistic(image_NE, right_N, l2=l2)
    return Probe(
        weight=weight_CE,
        bias=bias_C,
        labels=tuple(labels),
        fingerprint=fingerprint,
        method=f"linear probe on {len(right_N)} images, L2 {l2:.2g}",
    )


def _same_classes(
    images: Embedded, ids: Sequence[str], table: NameTable | None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Number the classes of further images as those of the training images."""
    classes = find_classes(images.labels, table)
    unknown = sorted(set(classes.ids) - set(ids))
    if unknown:
        raise InputError(
            f"{len(unknown)} classes have no image in --data, the first is {unknown[0]!r}."
        )
    index_C = np.array([ids.index(each) for each in classes.ids])
    return images.image_NE[classes.rows_N], index_C[classes.right_N]


if __name__ == "__main__":
    with command():
        main(tyro.cli(ProbeConfig, prog=program("training.probe"), description=__doc__))
