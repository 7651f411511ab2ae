"""Precision and recall of one label, at every threshold of its similarity that matters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from clip_rt.errors import InputError
from clip_rt.gateway.application import Endpoint
from clip_rt.gateway.problems import ProblemError, find_problem
from clip_rt.gateway.reading import answer_json, off_the_loop, read_json
from clip_rt.gateway.service import Service
from clip_rt.moderation.curve import precision_recall, wilson

MAX_IMAGES = 100_000


class ThresholdsRequest(msgspec.Struct):
    """Similarities of one label with images, and whether it fits them."""

    similarities: list[float]
    is_positive: list[bool]
    """Of each image, whether the label fits."""


class ThresholdsAnswer(msgspec.Struct):
    """What each threshold would do, by row.

    At thresholds above `thresholds[i - 1]` up to `thresholds[i]`, row i holds: the images at or
    above are those found. One row more than thresholds: above the last, none is.
    """

    thresholds: list[float]
    """The distinct similarities, ascending."""
    true_positives: list[int]
    false_positives: list[int]
    false_negatives: list[int]
    true_negatives: list[int]
    precision: list[float | None]
    """Of what is found, how much is right; null where nothing is."""
    precision_interval: list[tuple[float, float]]
    """Ends of the 95 % interval."""
    recall: list[float]
    """Of what is right, how much is found."""
    recall_interval: list[tuple[float, float]]
    f1: list[float]
    best_f1: float
    """The threshold of the largest F1: halfway between its row and the one before."""


_decoder = msgspec.json.Decoder(ThresholdsRequest)


def list_threshold_endpoints() -> tuple[Endpoint, ...]:
    """Return the path."""
    return (
        Endpoint(
            method="POST",
            path="/ui/thresholds",
            handler=show_thresholds,
            summary="Precision and recall at every threshold",
            is_inference=True,
        ),
    )


async def show_thresholds(service: Service, request: Request) -> Response:
    """Return what every threshold would do."""
    asked = await read_json(request, _decoder)
    check_examples(asked.similarities, asked.is_positive)
    work = partial(measure, asked.similarities, asked.is_positive)
    try:
        table = await off_the_loop(work, num_bytes=32 * len(asked.similarities))
    except InputError as error:
        raise find_problem(error, "similarities") from error
    return answer_json(table)


def check_examples(similarities: Sequence[float], is_positive: Sequence[bool]) -> None:
    """Refuse a set from which no threshold can be chosen.

    Raises:
        ProblemError: it is too large, its parts do not fit, or one kind of images is missing.
    """
    number = len(similarities)
    if number > MAX_IMAGES:
        raise ProblemError(
            f"similarities has {number:,} entries; {MAX_IMAGES:,} are the most.",
            param="similarities",
        )
    if len(is_positive) != number:
        raise ProblemError(
            f"is_positive has {len(is_positive):,} entries, and similarities {number:,}; "
            "give one each for every image.",
            param="is_positive",
        )
    if not any(is_positive) or all(is_positive):
        is_none = not any(is_positive)
        raise ProblemError(
            f"The label fits {'none' if is_none else 'all'} of the {number:,} images. Add images "
            f"that it {'fits' if is_none else 'does not fit'}.",
            param="is_positive",
        )


def measure(similarities: Sequence[float], is_positive: Sequence[bool]) -> ThresholdsAnswer:
    """Return what every threshold would do.

    Args:
        similarities: Of N images with the label.
        is_positive: Whether the label fits each of them; at least one is, and one is not.

    Raises:
        InputError: a similarity is not finite.
    """
    curve = precision_recall(similarities, is_positive)
    num_right, num_found = np.append(curve.num_right, 0), np.append(curve.num_flagged, 0)
    num_true, num_false = curve.num_true, curve.num_images - curve.num_true
    f1 = 2 * num_right / (num_found + num_true)
    best = int(f1.argmax())
    below = curve.thresholds[max(best - 1, 0)]
    precision_ends, recall_ends = (
        np.stack(wilson(num_right, trials), axis=1).tolist()
        for trials in (num_found, np.full_like(num_right, num_true))
    )
    return ThresholdsAnswer(
        thresholds=curve.thresholds.tolist(),
        true_positives=num_right.tolist(),
        false_positives=(num_found - num_right).tolist(),
        false_negatives=(num_true - num_right).tolist(),
        true_negatives=(num_false - num_found + num_right).tolist(),
        precision=[*curve.precision.tolist(), None],
        precision_interval=precision_ends,
        recall=[*curve.recall.tolist(), 0.0],
        recall_interval=recall_ends,
        f1=f1.tolist(),
        best_f1=float((below + curve.thresholds[best]) / 2),
    )
