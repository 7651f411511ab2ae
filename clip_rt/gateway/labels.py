"""Zero-shot classification: `POST /v1/classify`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from clip_rt.gateway.problems import ProblemError
from clip_rt.gateway.reading import answer_json, read_json
from clip_rt.gateway.service import Item, Service
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


class Label(msgspec.Struct):
    """How well a label fits."""

    label: str
    probability: float


class Classified(msgspec.Struct):
    """The best labels of an image."""

    index: int
    labels: list[Label]


class ClassifyAnswer(msgspec.Struct):
    """The best labels of each image."""

    data: list[Classified]
    model: str
    score: Score
    """softmax: all probabilities of an image sum to 1; sigmoid: each stands for itself."""
    object: str = "list"


_decoder = msgspec.json.Decoder(ClassifyRequest)


async def classify(service: Service, request: Request) -> Response:
    """Say which labels fit images best."""
    asked = await read_json(request, _decoder)
    if asked.top_k < 1:
        raise ProblemError(f"top_k is {asked.top_k}; at least 1 is ranked.", param="top_k")
    images = [Item(f"images[{index}]", image=image) for index, image in enumerate(asked.images)]
    model, scores = await service.classify(asked.model, images, asked.labels, asked.templates)
    ranked = scores.top(asked.top_k)
    return answer_json(
        ClassifyAnswer(
            data=[
                Classified(index, [Label(*pair) for pair in best])
                for index, best in enumerate(ranked)
            ],
            model=asked.model or model,
            score=scores.score,
        )
    )
