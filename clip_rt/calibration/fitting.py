"""Cosines and truths in, probabilities out: Platt scaling; a temperature and biases of a softmax.

Sources: Platt 1999, "Probabilistic Outputs for Support Vector Machines", section 2.2, with its
targets that are not quite 0 and 1, so that few examples do not give a slope without end; Guo et al.
2017, "On Calibration of Modern Neural Networks", section 4.2; Alexandari et al. 2020, "Maximum
Likelihood with Bias-Corrected Calibration is Hard-To-Beat at Label Shift Adaptation", section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold

from clip_rt.errors import InputError
from clip_rt.moderation.policy import Calibration

NUM_FOLDS = 5
MIN_EXAMPLES = 2 * NUM_FOLDS
"""Images that a label fits, and images that it does not, to fit it on: two in each fold."""
TEMPERATURES = (0.01, 100.0)
"""Between which the best is searched."""
NO_PENALTY = 1e12
"""Of scikit-learn's logistic regression, whose versions spell an infinite one differently."""
SEED = 0
"""Of the folds, so that the same images give the same policy."""


def fit_logistic(
    similarities: NDArray[np.floating[Any]], is_true: NDArray[np.bool_]
) -> Calibration:
    """Fit slope and intercept of the log-odds that a label fits.

    Args:
        similarities: (N,) cosines of images with the label.
        is_true: bool (N,): whether it fits; both occur.

    Raises:
        InputError: only one occurs.
    """
    num_true = int(is_true.sum())
    num_false = len(is_true) - num_true
    if not num_true or not num_false:
        raise InputError(
            f"{num_true} images with the label and {num_false} without: both are needed."
        )
    values = similarities.astype(np.float64)
    # The optimiser is at ease around 0 and 1; cosines of CLIP are in a narrow range.
    centre, spread = float(values.mean()), float(values.std()) or 1.0
    column = ((values - centre) / spread)[:, None]
    target = np.where(is_true, (num_true + 1) / (num_true + 2), 1 / (num_false + 2))
    # A target between 0 and 1 is an image of both kinds, with a weight each.
    model = LogisticRegression(C=NO_PENALTY, max_iter=1000)
    model.fit(
        np.vstack([column, column]),
        np.repeat([True, False], len(values)),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    slope = float(model.coef_[0, 0]) / spread
    return Calibration(slope=slope, intercept=float(model.intercept_[0]) - slope * centre)


@dataclass(frozen=True, eq=False)
class SoftmaxFit:
    """Answer k has the logit of the model, divided by the temperature, plus bias k."""

    temperature: float
    biases: NDArray[np.float64]
    """float64 (K,)."""


def fit_softmax(
    logits: NDArray[np.floating[Any]],
    right: NDArray[np.integer[Any]],
    num_labels: int,
    *,
    min_images: int = MIN_EXAMPLES,
) -> SoftmaxFit:
    """Find the temperature and the biases with the smallest negative log-likelihood.

    Biases have a normal prior with a variance of 1, which counts as much as one image.

    Args:
        logits: (N, C + B): of the labels, and of B background labels after them.
        right: (N,): index of the label that fits, or C where none does.
        num_labels: C. There are K = C answers, one more where there are background labels.
        min_images: That an answer needs to get a bias; the others have 0.
    """
    values = logits.astype(np.float64)
    num_answers = num_labels + (values.shape[1] > num_labels)
    counts = np.bincount(right, minlength=num_answers)
    biased = np.flatnonzero(counts >= min_images)
    wanted = np.eye(num_answers)[right]

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scaled = values * np.exp(parameters[0])
        joined, slope = scaled[:, :num_labels], scaled[:, :num_labels]
        if num_answers > num_labels:
            others = scaled[:, num_labels:]
            none = np.logaddexp.reduce(others, axis=1, keepdims=True)
            # The derivative of its logarithm of a sum by the logarithm of the scale.
            part = (np.exp(others - none) * others).sum(axis=1, keepdims=True)
            joined, slope = np.hstack([joined, none]), np.hstack([slope, part])
        biases = np.zeros(num_answers)
        biases[biased] = parameters[1:]
        joined = joined + biases
        total = np.logaddexp.reduce(joined, axis=1, keepdims=True)
        excess = np.exp(joined - total) - wanted
        value = np.sum(total) - np.sum(joined * wanted) + np.sum(biases**2) / 2
        gradient = np.append(np.sum(excess * slope), excess.sum(axis=0)[biased] + biases[biased])
        return float(value) / len(values), gradient / len(values)

    low, high = np.log(1 / TEMPERATURES[1]), np.log(1 / TEMPERATURES[0])
    found = minimize(
        loss,
        np.zeros(1 + len(biased)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(low, high), *[(None, None)] * len(biased)],
        options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-8},
    )
    biases = np.zeros(num_answers)
    biases[biased] = found.x[1:]
    return SoftmaxFit(float(np.exp(-found.x[0])), biases)


def predict_out_of_fold(
    num_images: int,
    stratum: NDArray[np.integer[Any]] | None,
    predict: Callable[[NDArray[np.intp], NDArray[np.intp]], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Predict each image by what was fitted on the other folds.

    Args:
        num_images: N, at least as many as there are folds.
        stratum: (N,): kinds of images, to be spread evenly over folds; None is one kind.
        predict: Called with the rows to fit on and the M rows to predict; returns (M, ...).

    Returns:
        (N, ...), in order.
    """
    options = {"n_splits": NUM_FOLDS, "shuffle": True, "random_state": SEED}
    rows = np.zeros(num_images)
    splits = (
        KFold(**options).split(rows)
        if stratum is None
        else StratifiedKFold(**options).split(rows, stratum)
    )
    found: NDArray[np.float64] | None = None
    for fit_rows, rows_left_out in splits:
        part = predict(fit_rows, rows_left_out)
        if found is None:
            found = np.empty((num_images, *part.shape[1:]))
        found[rows_left_out] = part
    assert found is not None
    return found
