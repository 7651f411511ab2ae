"""Embeddings of images and of prompts in, decisions of a policy out; pure NumPy.

A calibrated label has the probability sigmoid(slope * cosine + intercept) (Platt 1999,
"Probabilistic Outputs for Support Vector Machines"); the labels of a softmax have its logits
divided by a temperature, and a bias added (Guo et al. 2017, "On Calibration of Modern Neural
Networks"; Alexandari et al. 2020, "Maximum Likelihood with Bias-Corrected Calibration is
Hard-To-Beat at Label Shift Adaptation").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_rt.classification import open_set, zero_shot
from clip_rt.errors import ClipRTError, ContractError, PolicyError
from clip_rt.moderation.policy import Action, Policy
from clip_rt.specs import Score
from clip_rt.wire.manifest import Manifest

SEVERITY: dict[Action, int] = {"allow": 0, "review": 1, "block": 2}


@dataclass(frozen=True)
class Reason:
    """A label that reached a threshold."""

    label: str
    action: Action
    """What the threshold is of: review or block."""
    probability: float
    threshold: float


@dataclass(frozen=True)
class Decision:
    """What becomes of an image."""

    action: Action
    """The most severe of the reasons'; allow without one."""
    reasons: tuple[Reason, ...] = ()
    """The most severe first, of equal ones the most probable."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Moderation:
    """The decisions on N images, and what they were made of."""

    labels: tuple[str, ...]
    """C names, in the order of the policy."""
    decisions: tuple[Decision, ...]
    """N of them."""
    probabilities: NDArray[np.float32]
    """float32 (N, C): that a label fits an image."""
    similarities: NDArray[np.float32]
    """float32 (N, C): cosines of image and label, from -1 to 1."""
    indices: NDArray[np.intp] | None = None
    """intp (N,): position in the caller's batch of each row's image; None is all, in order."""
    failures: tuple[ClipRTError, ...] = ()
    """An error for each image that was left out; each carries its `index`."""

    def of_items(self, indices: NDArray[np.intp], failures: tuple[ClipRTError, ...]) -> Moderation:
        """Return them with whose they are."""
        return replace(self, indices=indices, failures=failures)

    @property
    def actions(self) -> list[Action]:
        """The action of each decision."""
        return [each.action for each in self.decisions]


def check_policy(policy: Policy, manifest: Manifest, *, allow_uncalibrated: bool = False) -> None:
    """Refuse to decide where probabilities would mean nothing.

    Args:
        policy: Of any kind.
        manifest: Of the model that is served.
        allow_uncalibrated: Whether a policy that was not fitted will do.

    Raises:
        ContractError: it was fitted with other weights.
        PolicyError: it was not fitted, or not all of its labels were.
    """
    if policy.fingerprint is not None and policy.fingerprint != manifest.fingerprint:
        raise ContractError(
            f"the policy {policy.name!r} was fitted with {policy.model!r}, weights "
            f"{policy.fingerprint[:12]!r}, and the server has {manifest.model!r}, "
            f"{manifest.fingerprint[:12]!r}. Fit it on this model with clip-rt calibrate, or name "
            "the model it belongs to with model=; at a command line --model.",
            expected=policy.fingerprint,
            found=manifest.fingerprint,
        )
    if policy.is_calibrated or allow_uncalibrated:
        return
    which = ""
    if policy.fingerprint is not None:
        unfitted = [each.name for each in policy.labels if each.calibration is None]
        which = f" for {', '.join(map(repr, unfitted[:5]))}"
    raise PolicyError(
        f"the policy {policy.name!r:.80} is not calibrated{which}: its probabilities and "
        "thresholds are guesses, of which nothing was measured. Fit it on labelled images of your "
        f"own, clip-rt calibrate TABLE --policy {policy.name:.80} --out policy.json; or use it as "
        "it is with allow_uncalibrated=True, at a command line --allow-uncalibrated.",
        field="fingerprint" if policy.fingerprint is None else "labels",
    )


def list_texts(policy: Policy, score: Score) -> tuple[str, ...]:
    """Return what is put into the templates: all prompts in order, then background labels.

    Background labels stand for everything else where labels share out 1, and beside labels of a
    softmax model that are not calibrated.

    Args:
        policy: Of any kind.
        score: Of the model, `Manifest.score`.
    """
    prompts = [prompt for label in policy.labels for prompt in label.prompts]
    if policy.kind == "softmax":
        needs_background = policy.none_of_these
    else:
        is_fitted = all(each.calibration is not None for each in policy.labels)
        needs_background = score == "softmax" and not is_fitted
    if not needs_background:
        return tuple(prompts)
    names = [label.name for label in policy.labels]
    return (*prompts, *open_set.background_of("softmax", [*prompts, *names]))


def compare(
    policy: Policy,
    image_embeddings: NDArray[np.floating[Any]],
    text_embeddings: NDArray[np.floating[Any]],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the cosines of images with labels and with background labels.

    Args:
        policy: Of C labels.
        image_embeddings: (N, D), rows of length 1.
        text_embeddings: (P, D), rows of length 1: of `list_texts`.

    Returns:
        float32 (N, C) and (N, B); the embedding of a label is the normalised mean of its prompts'.
    """
    ends = np.cumsum([len(label.prompts) for label in policy.labels])
    own, background = text_embeddings[: ends[-1]], text_embeddings[ends[-1] :]
    classes = [zero_shot.pool(rows[None])[0] for rows in np.split(own, ends[:-1])]
    images = image_embeddings.astype(np.float32)
    similarities: NDArray[np.float32] = images @ np.stack(classes).T
    return similarities, images @ background.astype(np.float32).T


def find_probabilities(
    policy: Policy,
    manifest: Manifest,
    similarities: NDArray[np.floating[Any]],
    background: NDArray[np.floating[Any]],
) -> NDArray[np.float64]:
    """Return how probable it is that each label fits each image.

    A label that is not calibrated has what the model's own score says: its sigmoid; or its share of
    a softmax over it and the background labels.

    Args:
        policy: Of C labels.
        manifest: Of the model.
        similarities: (N, C) cosines.
        background: (N, B) cosines with background labels; B = 0 where `list_texts` has none.

    Returns:
        float64 (N, C). Rows of a softmax sum to 1, less what background labels have.
    """
    cosines = similarities.astype(np.float64)
    logits, others = (manifest.logit_scale * each for each in (cosines, background))
    if policy.kind == "softmax":
        biases = np.array([label.bias for label in policy.labels])
        temperature = policy.temperature or 1.0
        scaled = np.hstack([logits / temperature + biases, others / temperature + policy.none_bias])
        weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        shares: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
        return shares[:, : cosines.shape[1]]
    if manifest.score == "sigmoid":
        logits = logits + manifest.logit_bias
    elif others.shape[1]:
        logits = logits - np.logaddexp.reduce(others.astype(np.float64), axis=1, keepdims=True)
    for index, label in enumerate(policy.labels):
        if label.calibration is not None:
            slope, intercept = label.calibration.slope, label.calibration.intercept
            logits[:, index] = slope * cosines[:, index] + intercept
    # sigmoid(x); unlike 1 / (1 + exp(-x)) it cannot overflow.
    probabilities: NDArray[np.float64] = (1 + np.tanh(logits / 2)) / 2
    return probabilities


def decide(
    policy: Policy,
    manifest: Manifest,
    image_embeddings: NDArray[np.floating[Any]],
    text_embeddings: NDArray[np.floating[Any]],
) -> Moderation:
    """Decide on images.

    Args:
        policy: See `check_policy`.
        manifest: Of the model.
        image_embeddings: (N, D), rows of length 1; N = 0 gives no decision.
        text_embeddings: (P, D), rows of length 1: of `list_texts`.
    """
    similarities, background = compare(policy, image_embeddings, text_embeddings)
    probabilities = find_probabilities(policy, manifest, similarities, background)
    return Moderation(
        labels=tuple(label.name for label in policy.labels),
        decisions=tuple(_decide_one(policy, row) for row in probabilities.tolist()),
        probabilities=probabilities.astype(np.float32),
        similarities=similarities,
    )


def _decide_one(policy: Policy, probabilities: list[float]) -> Decision:
    reasons = []
    for label, probability in zip(policy.labels, probabilities, strict=True):
        action, threshold = label.decide(probability)
        if threshold is not None:
            reasons.append(Reason(label.name, action, probability, threshold))
    reasons.sort(key=lambda each: (-SEVERITY[each.action], -each.probability))
    return Decision(reasons[0].action if reasons else "allow", tuple(reasons))
