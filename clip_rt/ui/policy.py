"""A policy from the threshold that was chosen on the page: one label, which asks for a review."""

from __future__ import annotations

import asyncio
import datetime
import math
from functools import partial
from http import HTTPStatus

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from clip_rt.errors import InputError
from clip_rt.gateway.application import Endpoint
from clip_rt.gateway.problems import ProblemError, find_problem
from clip_rt.gateway.reading import read_json
from clip_rt.gateway.service import Service
from clip_rt.inputs.prompts import find_templates
from clip_rt.moderation.curve import measure_share
from clip_rt.moderation.policy import Calibration, Label, Measured, Policy
from clip_rt.ui.thresholds import check_examples
from clip_rt.wire.manifest import Manifest

BY_HAND = "its threshold was chosen by hand, on the images that it is measured on"


class PolicyRequest(msgspec.Struct):
    """A threshold, and what it was chosen on."""

    label: str
    threshold: float
    """Similarity from which on the label is taken to fit."""
    similarities: list[float]
    is_positive: list[bool]
    """Of each image, whether the label fits."""
    templates: str | list[str] | None = None
    model: str | None = None


_decoder = msgspec.json.Decoder(PolicyRequest)


def list_policy_endpoints() -> tuple[Endpoint, ...]:
    """Return the path."""
    return (
        Endpoint(
            method="POST",
            path="/ui/policy",
            handler=write_policy,
            summary="A policy that decides by a threshold",
            is_inference=True,
        ),
    )


async def write_policy(service: Service, request: Request) -> Response:
    """Return the file of a policy that decides by a threshold."""
    asked = await read_json(request, _decoder)
    check_examples(asked.similarities, asked.is_positive)
    manifest = await service.manifest(asked.model)
    try:
        policy = await asyncio.to_thread(partial(make_policy, asked, manifest))
    except ModuleNotFoundError as error:
        raise ProblemError(
            f"Saving a policy needs {error.name}: pip install 'clip-rt[calibrate]'.",
            status=HTTPStatus.NOT_IMPLEMENTED,
            code="not_installed",
        ) from error
    except InputError as error:
        raise find_problem(error, "label") from error
    return Response(policy.to_json(), media_type="application/json")


def make_policy(asked: PolicyRequest, manifest: Manifest) -> Policy:
    """Return a policy of one label that flags what a threshold of its similarity does.

    Raises:
        InputError: images that the label fits are no more similar to it than others.
        PolicyError: the label cannot be one of a policy.
        ModuleNotFoundError: what fits probabilities is not installed.
    """
    # Only here: the page does without.
    from clip_rt.calibration.fitting import fit_logistic

    similarities, is_true = np.array(asked.similarities), np.array(asked.is_positive, bool)
    calibration = fit_logistic(similarities, is_true)
    if calibration.slope <= 0:
        raise InputError(
            f"images that {asked.label[:80]!r} fits are no more similar to it than others; a "
            "policy needs another label or template."
        )
    is_flagged = similarities >= asked.threshold
    num_right, num_flagged = int((is_flagged & is_true).sum()), int(is_flagged.sum())
    label = Label(
        name=asked.label,
        action="review",
        review_threshold=find_probability(calibration, asked.threshold),
        calibration=calibration,
        measured=Measured(
            num_images=len(similarities),
            num_true=int(is_true.sum()),
            num_flagged=num_flagged,
            precision=measure_share(num_right, num_flagged),
            recall=measure_share(num_right, int(is_true.sum())),
            shortfall=BY_HAND,
        ),
    )
    return Policy(
        name=asked.label,
        labels=(label,),
        templates=find_templates(asked.templates),
        model=manifest.model,
        fingerprint=manifest.fingerprint,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


def find_probability(calibration: Calibration, similarity: float) -> float:
    """Return how probable it is that a label fits an image of that similarity."""
    # sigmoid(x); unlike 1 / (1 + exp(-x)) it cannot overflow.
    return (1 + math.tanh((calibration.slope * similarity + calibration.intercept) / 2)) / 2
