"""Answers for images that none of the labels fits: recognition of what is not in an open set.

CLIP compares an image with the labels it is given, and its softmax shares out all of the
probability among them, whatever the image shows. Two ways out:

* background labels, which compete with the caller's and stand for everything else, as the negative
  labels of Jiang et al. 2024 do ("Negative Label Guided OOD Detection with Pretrained
  Vision-Language Models");
* thresholds on the probability or the cosine of the best label, `Scores.above`, as in Hendrycks
  and Gimpel 2017 ("A Baseline for Detecting Misclassified and Out-of-Distribution Examples in
  Neural Networks") and Hendrycks et al. 2022 ("Scaling Out-of-Distribution Detection for Real-World
  Settings", maximum logit).

How often each is right was measured on the bundled model by `benchmarks.studies.open_set`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_rt.classification import zero_shot
from clip_rt.classification.zero_shot import Scores
from clip_rt.errors import InputError
from clip_rt.specs import Score
from clip_rt.wire.manifest import Manifest

NONE_OF_THESE = "none of these"
"""The label of images that none of the others fits."""

BACKGROUND = (
    *("thing", "object", "picture", "background", "pattern", "text", "symbol", "scene"),
    *("person", "face", "animal", "bird", "fish", "insect", "plant", "flower"),
    *("food", "drink", "vehicle", "building", "room", "landscape", "furniture", "clothing"),
    *("tool", "machine", "device", "container", "toy", "musical instrument", "sport", "sign"),
)
"""What stands for everything else. Words for any picture at all; and, since an image is nearer to
the kind of thing it shows than to those, kinds that share out what people photograph and draw. They
are few, so that they cost little, and broad, so that a label is nearer to its image than its kind
is: "rose" than "flower"."""


def background_of(score: Score, labels: Sequence[str]) -> tuple[str, ...]:
    """Return the background labels to embed beside the caller's.

    Those that are a label of the caller's, whatever its case, are left out. There are none for a
    sigmoid: each of its probabilities says by itself whether a label fits.
    """
    if score == "sigmoid":
        return ()
    asked = {label.strip().casefold() for label in labels}
    return tuple(each for each in BACKGROUND if each not in asked)


def check_labels(labels: Sequence[str]) -> None:
    """Refuse labels that could not be told from the answer `NONE_OF_THESE`.

    Raises:
        InputError: one has its name; carries its index.
    """
    if NONE_OF_THESE in labels:
        index = labels.index(NONE_OF_THESE)
        raise InputError(
            f"label {index} is {NONE_OF_THESE!r}, which none_of_these=True adds. Leave it out.",
            index=index,
        )


def score_images(
    manifest: Manifest,
    image_embeddings: NDArray[np.floating[Any]],
    class_embeddings: NDArray[np.floating[Any]],
    labels: Sequence[str],
    *,
    none_of_these: bool = False,
) -> Scores:
    """Compare images with classes, as a model was trained to.

    Args:
        manifest: Of the model.
        image_embeddings: (N, D), rows of length 1.
        class_embeddings: (C, D), rows of length 1; with `none_of_these` those of `background_of`
            come after them.
        labels: C names.
        none_of_these: Add this answer, see `answer_none`.

    Raises:
        InputError: the shapes do not fit each other, or there is no label.
    """
    background = background_of(manifest.score, labels) if none_of_these else ()
    scores = zero_shot.classify(
        image_embeddings,
        class_embeddings,
        (*labels, *background),
        logit_scale=manifest.logit_scale,
        logit_bias=manifest.logit_bias,
        score=manifest.score,
    )
    cosines = (scores.logits[:, : len(labels)] - manifest.logit_bias) / manifest.logit_scale
    scores = replace(scores, similarities=cosines.astype(np.float32))
    return answer_none(scores, len(labels)) if none_of_these else scores


def answer_none(scores: Scores, num_labels: int) -> Scores:
    """Add the answer that none of the labels fits, as a last label.

    With softmax it has the probability of all background labels together. With sigmoid it has what
    the most probable label leaves to 1: it is the best answer where that is below 0.5.

    Args:
        scores: (N, C + B): of the labels, and with softmax of B background labels after them.
        num_labels: C.

    Returns:
        (N, C + 1). A softmax or sigmoid of its logits is its probabilities.
    """
    logits = scores.logits[:, :num_labels]
    if scores.score == "sigmoid":
        # 1 - sigmoid(x) = sigmoid(-x).
        none_logits = -logits.max(axis=1, keepdims=True)
        none_probabilities = 1 - scores.probabilities.max(axis=1, keepdims=True)
    else:
        none_logits = np.logaddexp.reduce(scores.logits[:, num_labels:], axis=1, keepdims=True)
        none_probabilities = scores.probabilities[:, num_labels:].sum(axis=1, keepdims=True)
    return replace(
        scores,
        labels=(*scores.labels[:num_labels], NONE_OF_THESE),
        logits=np.hstack([logits, none_logits]),
        probabilities=np.hstack([scores.probabilities[:, :num_labels], none_probabilities]),
    )
