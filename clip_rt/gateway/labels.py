"""Zero-shot classification: `POST /v1/classify`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from clip_rt.gateway.problems import ProblemError
from clip_rt.gateway.reading import answer_json, read_json
from clip_rt.gateway.service import Item, Service
from clip_rt.inputs.items import OnError
from clip_rt.specs import Score


class ClassifyRequest(msgspec.Struct):
    """Images, and the labels that may fit them."""

    images: list[str]
    """Each base64, a data URI, or a URL of a host that is allowed."""
    labels: list[str]
    model: str | None = None
    templates: str | list[str] | None = None
    """Name of a template set, or templates with one `{}` each."""
    top_k: int = 5
    """How many labels come back of each image, the most probable first."""
    none_of_these: bool = False
    """Add the answer "none of these"."""
    on_error: OnError = "raise"
    """With "skip" images that cannot be used are named in `errors`, and the others answered."""


class Label(msgspec.Struct):
    """How well a label fits."""

    label: str
    probability: float
    similarity: float | None
    """Cosine of image and label; null of the answer "none of these"."""


class Classified(msgspec.Struct):
    """The best labels of an image."""

    index: int
    labels: list[Label]


class ImageProblem(msgspec.Struct):
    """Why an image has no labels."""

    index: int
    message: str
    code: str


class ClassifyAnswer(msgspec.Struct):
    """The best labels of each image."""

    data: list[Classified]
    model: str
    score: Score
    """softmax: all probabilities of an image sum to 1; sigmoid: each stands for itself."""
    errors: list[ImageProblem]
    """Of images that were skipped."""
    object: str = "list"


_decoder = msgspec.json.Decoder(ClassifyRequest)


async def classify(service: Service, request: Request) -> Response:
    """Say which labels fit images best."""
    asked = await read_json(request, _decoder)
    if asked.top_k < 1:
        raise ProblemError(f"top_k is {asked.top_k}; at least 1 is ranked.", param="top_k")
    found = await service.classify(
        service.route(asked.model, request),
        [Item(f"images[{index}]", image=image) for index, image in enumerate(asked.images)],
        asked.labels,
        asked.templates,
        none_of_these=asked.none_of_these,
        on_error=asked.on_error,
    )
    scores = found.scores
    cosines = scores.similarities
    assert cosines is not None  # They are no probe's.
    order = (-scores.probabilities).argsort(axis=1, kind="stable")[:, : asked.top_k]
    data = [
        Classified(
            index,
            [
                Label(
                    scores.labels[each],
                    float(scores.probabilities[row, each]),
                    float(cosines[row, each]) if each < cosines.shape[1] else None,
                )
                for each in ranked
            ],
        )
        for row, (index, ranked) in enumerate(zip(found.indices, order.tolist(), strict=True))
    ]
    errors = [
        ImageProblem(index, problem.message, problem.code)
        for index, problem in sorted(found.problems.items())
    ]
    return answer_json(
        ClassifyAnswer(
            data=data,
            model=service.answers_as(asked.model, found.model),
            score=scores.score,
            errors=errors,
        )
    )
