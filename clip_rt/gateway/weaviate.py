"""Weaviate's multi2vec-clip: `POST /vectorize`, `GET /meta`, `GET /.well-known/ready` and `live`.

Source: facts of weaviate/multi2vec-clip-inference, `app.py`.
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from clip_rt.gateway.problems import ProblemError
from clip_rt.gateway.reading import answer_json, off_the_loop, read_json
from clip_rt.gateway.service import Item, Service


class VectorizeRequest(msgspec.Struct):
    """Texts, and images in base64."""

    texts: list[str] | None = None
    images: list[str] | None = None


class VectorizeAnswer(msgspec.Struct, rename="camel"):
    """A vector each."""

    text_vectors: list[list[float]]
    image_vectors: list[list[float]]


class Refusal(msgspec.Struct):
    """An error, as Weaviate reads it."""

    error: str


_decoder = msgspec.json.Decoder(VectorizeRequest)


async def vectorize(service: Service, request: Request) -> Response:
    """Embed texts and images."""
    asked = await read_json(request, _decoder)
    texts, images = asked.texts or [], asked.images or []
    items = [
        *(Item(f"texts[{index}]", text=text) for index, text in enumerate(texts)),
        *(Item(f"images[{index}]", image=image) for index, image in enumerate(images)),
    ]
    if not items:
        return answer_json(VectorizeAnswer([], []))
    # Texts are cut, as Weaviate's own server cuts them.
    _, rows, _ = await service.embed(None, items, truncate=True)

    def answer() -> Response:
        vectors = rows.tolist()
        return answer_json(VectorizeAnswer(vectors[: len(texts)], vectors[len(texts) :]))

    return await off_the_loop(answer, num_bytes=rows.nbytes)


async def meta(service: Service, request: Request) -> Response:
    """Say which model it is."""
    return answer_json({"model": service.names[0], "models": service.names})


def answer_problem(problem: ProblemError) -> Response:
    """Return an error as Weaviate reads it."""
    return answer_json(Refusal(problem.message), status=problem.status, headers=problem.headers)
