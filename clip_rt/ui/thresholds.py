"""Precision and recall of one label, at every threshold of its similarity that matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from clip_rt.gateway.application import Endpoint
from clip_rt.gateway.problems import ProblemError
from clip_rt.gateway.reading import answer_json, off_the_loop, read_json
from clip_rt.gateway.service import Service

MAX_IMAGES = 100_000


class ThresholdsRequest(msgspec.Struct):
    """Similarities of one label with images, and whether it fits them."""

    similarities: list[float]
    is_positive: list[bool]
    """Of each image, whether the label fits."""


class ThresholdsAnswer(msgspec.Struct):
    """What each threshold would do, by row.

    At thresholds above `thresholds[i - 1]` up to `thresholds[i]`, row i holds: the images at or
    above are those predicted. One row more than thresholds: above the last, none is.
    """

    thresholds: list[float]
    """The distinct similarities, ascending."""
    true_positives: list[int]
    false_positives: list[int]
    false_negatives: list[int]
    true_negatives: list[int]
    precision: list[float | None]
    """Of what is predicted, how much is right; null where nothing is."""
    recall: list[float]
    """Of what is right, how much is predicted."""
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
    number = len(asked.similarities)
    if number > MAX_IMAGES:
        raise ProblemError(
            f"similarities has {number:,} entries; {MAX_IMAGES:,} are the most.",
            param="similarities",
        )
    if len(asked.is_positive) != number:
        raise ProblemError(
            f"is_positive has {len(asked.is_positive):,} entries, and similarities {number:,}; "
            "give one each for every image.",
            param="is_positive",
        )
    if not any(asked.is_positive) or all(asked.is_positive):
        missing = "fits none" if not any(asked.is_positive) else "fits all"
        raise ProblemError(
            f"The label {missing} of the {number:,} images. Add images that it "
            f"{'fits' if missing == 'fits none' else 'does not fit'}.",
            param="is_positive",
        )
    if not all(map(math.isfinite, asked.similarities)):
        raise ProblemError("A similarity is not finite.", param="similarities")
    work = partial(measure, asked.similarities, asked.is_positive)
    return answer_json(await off_the_loop(work, num_bytes=32 * number))


def measure(similarities: Sequence[float], is_positive: Sequence[bool]) -> ThresholdsAnswer:
    """Return what every threshold would do.

    Args:
        similarities: Of N images with the label.
        is_positive: Whether the label fits each of them; at least one is, and one is not.
    """
    values, positions = np.unique(np.array(similarities, np.float64), return_inverse=True)
    is_true = np.array(is_positive, bool)
    true, false = (
        np.bincount(positions[each], minlength=len(values)) for each in (is_true, ~is_true)
    )
    # Predicted at each threshold is what lies at it or above; above all of them nothing does.
    true_positives, false_positives = (
        np.append(np.cumsum(each[::-1])[::-1], 0) for each in (true, false)
    )
    false_negatives = is_true.sum() - true_positives
    num_predicted = true_positives + false_positives
    f1 = 2 * true_positives / (num_predicted + is_true.sum())
    best = int(f1.argmax())
    below = values[best - 1] if best else values[best]
    return ThresholdsAnswer(
        thresholds=values.tolist(),
        true_positives=true_positives.tolist(),
        false_positives=false_positives.tolist(),
        false_negatives=false_negatives.tolist(),
        true_negatives=((~is_true).sum() - false_positives).tolist(),
        precision=[
            num_true / number if number else None
            for num_true, number in zip(
                true_positives.tolist(), num_predicted.tolist(), strict=True
            )
        ],
        recall=(true_positives / is_true.sum()).tolist(),
        f1=f1.tolist(),
        best_f1=float((below + values[best]) / 2),
    )
