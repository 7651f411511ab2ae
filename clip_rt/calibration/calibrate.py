"""A policy, cosines and truths in; the policy with its probabilities, thresholds and promises out.

What is said of a policy was measured on predictions of images that were not fitted on: the images
are cut into five folds, and each is predicted by what was fitted on the other four. The policy
itself is fitted on all of them.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_rt.calibration import fitting, measures
from clip_rt.calibration.thresholds import choose_threshold
from clip_rt.errors import InputError
from clip_rt.moderation.curve import measure_share
from clip_rt.moderation.decisions import find_probabilities
from clip_rt.moderation.policy import (
    CalibrationError,
    Data,
    Label,
    Measured,
    Policy,
    Target,
)
from clip_rt.wire.manifest import Manifest

REVIEW_FROM = 0.5
"""Where a label is more probable than not: a person looks from there on, where nothing better was
shown; and below what blocks."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Calibrated:
    """A fitted policy, and the predictions that its figures are of."""

    policy: Policy
    is_true: NDArray[np.bool_]
    """bool (N, C): whether a label fits an image."""
    before: NDArray[np.float64]
    """float64 (N, C): probabilities of the model's own score."""
    after: NDArray[np.float64]
    """float64 (N, C): each by what was fitted on other images."""

    @property
    def is_flagged(self) -> NDArray[np.bool_]:
        """Bool (N, C): at or above the threshold of the label's action."""
        limits = [find_threshold(label) for label in self.policy.labels]
        return self.after >= np.array([np.inf if each is None else each for each in limits])


def find_threshold(label: Label) -> float | None:
    """Return the threshold that the figures of a label are of: the one of the severest action."""
    return label.review_threshold if label.block_threshold is None else label.block_threshold


def calibrate(
    policy: Policy,
    manifest: Manifest,
    similarities: NDArray[np.floating[Any]],
    background: NDArray[np.floating[Any]],
    is_true: NDArray[np.bool_],
    *,
    target: Target,
    data: Data,
    date: datetime.date,
) -> Calibrated:
    """Fit a policy on labelled images.

    Args:
        policy: What to look for; what an earlier fit left in it is dropped.
        manifest: Of the model.
        similarities: (N, C) cosines, of `moderation.decisions.compare` with `strip(policy)`.
        background: (N, B) cosines, of the same.
        is_true: bool (N, C): whether a label fits an image.
        target: Of every threshold.
        data: What the images are.
        date: Of the fit.

    Raises:
        InputError: there is no image; or one with several labels, or without any, where the policy
            says that one label fits.
    """
    bare = strip(policy)
    if not len(is_true):
        raise InputError("there is no image to fit on.")
    if bare.kind == "softmax":
        _check_one_label(is_true, bare.none_of_these)
    before = find_probabilities(bare, manifest, similarities, background)
    fitted, after = _fit(bare, manifest, similarities, background, is_true)
    labels = tuple(
        _promise(label, target, after[:, index], is_true[:, index], _is_fitted(fitted, label))
        for index, label in enumerate(fitted.labels)
    )
    error = CalibrationError(
        before=measures.calibration_error(bare.kind, before, is_true, bare.none_of_these),
        after=measures.calibration_error(bare.kind, after, is_true, bare.none_of_these),
    )
    done = replace(
        fitted,
        labels=labels,
        model=manifest.model,
        fingerprint=manifest.fingerprint,
        data=data,
        calibration_error=error,
        date=date.isoformat(),
    )
    return Calibrated(policy=done, is_true=is_true, before=before, after=after)


def strip(policy: Policy) -> Policy:
    """Return a policy as it is before it is fitted."""
    return replace(
        policy,
        labels=tuple(
            Label(name=each.name, prompts=each.prompts, action=each.action)
            for each in policy.labels
        ),
        temperature=None,
        none_bias=0.0,
        model=None,
        fingerprint=None,
        data=None,
        calibration_error=None,
        date=None,
    )


def _check_one_label(is_true: NDArray[np.bool_], none_of_these: bool) -> None:
    num_labels = is_true.sum(axis=1)
    if (num_labels > 1).any():
        raise InputError(
            f"{int((num_labels > 1).sum()):,} images have several labels, and of a softmax one "
            "fits. Take --kind independent."
        )
    if not none_of_these and (num_labels == 0).any():
        raise InputError(
            f"{int((num_labels == 0).sum()):,} images have none of the labels, and of a softmax "
            "one fits. Add --none-of-these, or leave them out."
        )


def _fit(
    policy: Policy,
    manifest: Manifest,
    similarities: NDArray[np.floating[Any]],
    background: NDArray[np.floating[Any]],
    is_true: NDArray[np.bool_],
) -> tuple[Policy, NDArray[np.float64]]:
    """Return the fitted policy, and the probabilities by what was fitted on other images."""
    num_images, num_labels = is_true.shape
    if policy.kind == "softmax":
        if num_images < fitting.MIN_EXAMPLES:
            return policy, find_probabilities(policy, manifest, similarities, background)
        logits = manifest.logit_scale * np.hstack([similarities, background]).astype(np.float64)
        right = np.where(is_true.any(axis=1), is_true.argmax(axis=1), num_labels)

        def fit(rows: NDArray[np.intp]) -> Policy:
            found = fitting.fit_softmax(logits[rows], right[rows], num_labels)
            biases = found.biases.tolist()
            return replace(
                policy,
                labels=tuple(
                    replace(label, bias=bias)
                    for label, bias in zip(policy.labels, biases[:num_labels], strict=True)
                ),
                temperature=found.temperature,
                none_bias=sum(biases[num_labels:]),
            )

        after = fitting.predict_out_of_fold(
            num_images,
            None,
            lambda rows, others: find_probabilities(
                fit(rows), manifest, similarities[others], background[others]
            ),
        )
        return fit(np.arange(num_images)), after

    after = find_probabilities(policy, manifest, similarities, background)
    labels = []
    for index, label in enumerate(policy.labels):
        column, own = similarities[:, index].astype(np.float64), is_true[:, index]
        num_true = int(own.sum())
        if min(num_true, num_images - num_true) < fitting.MIN_EXAMPLES:
            labels.append(label)
            continue
        after[:, index] = fitting.predict_out_of_fold(
            num_images,
            own.astype(np.int64),
            partial(_predict, column, own),
        )
        labels.append(replace(label, calibration=fitting.fit_logistic(column, own)))
    return replace(policy, labels=tuple(labels)), after


def _predict(
    column: NDArray[np.float64],
    is_true: NDArray[np.bool_],
    rows: NDArray[np.intp],
    others: NDArray[np.intp],
) -> NDArray[np.float64]:
    fitted = fitting.fit_logistic(column[rows], is_true[rows])
    probabilities: NDArray[np.float64] = (
        1 + np.tanh((fitted.slope * column[others] + fitted.intercept) / 2)
    ) / 2
    return probabilities


def _is_fitted(policy: Policy, label: Label) -> bool:
    return label.calibration is not None or policy.temperature is not None


def _promise(
    label: Label,
    target: Target,
    probabilities: NDArray[np.float64],
    is_true: NDArray[np.bool_],
    is_fitted: bool,
) -> Label:
    """Return a label with its thresholds, and what they were measured to do."""
    if label.action == "allow":
        return label
    num_true, num_images = int(is_true.sum()), len(is_true)
    review: float | None = REVIEW_FROM
    block = None
    shortfall = ""
    if not is_fitted:
        fewest = min(num_true, num_images - num_true)
        shortfall = (
            f"it fits {num_true:,} of {num_images:,} images; at least {fitting.MIN_EXAMPLES} that "
            f"it fits and {fitting.MIN_EXAMPLES} that it does not are needed to fit it at all"
            if fewest < fitting.MIN_EXAMPLES
            else f"at least {fitting.MIN_EXAMPLES} images are needed"
        )
    else:
        choice = choose_threshold(probabilities, is_true, target)
        shortfall = choice.shortfall
        if choice.threshold is not None and label.action == "block":
            block, review = choice.threshold, min(REVIEW_FROM, choice.threshold)
        elif choice.threshold is not None:
            review = choice.threshold
    label = replace(label, review_threshold=review, block_threshold=block, target=target)
    limit = find_threshold(label)
    is_flagged = probabilities >= (np.inf if limit is None else limit)
    num_right = int((is_flagged & is_true).sum())
    measured = Measured(
        num_images=num_images,
        num_true=num_true,
        num_flagged=int(is_flagged.sum()),
        precision=measure_share(num_right, int(is_flagged.sum())),
        recall=measure_share(num_right, num_true),
        is_target_met=not shortfall,
        shortfall=shortfall,
    )
    return replace(label, measured=measured)
