"""OpenAI's embeddings, with images beside texts: `POST /v1/embeddings`, `GET /v1/models`.

Source: OpenAI's API reference, "Create embeddings" and "List models"; images as infinity, NVIDIA's
NIM, SGLang, Jina, OpenRouter and vLLM take them, each of which has a form of its own.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from clip_rt.gateway.problems import ProblemError
from clip_rt.gateway.reading import answer_json, off_the_loop, read_json
from clip_rt.gateway.service import Item, Service, read_item


class ImageURL(msgspec.Struct):
    """The image of a part, as chat completions have it."""

    url: str


class Part(msgspec.Struct):
    """A text or an image."""

    type: Literal["text", "image", "image_url", "input_text", "input_image"] | None = None
    text: str | None = None
    image: str | None = None
    image_url: ImageURL | str | None = None


class Message(msgspec.Struct):
    """What vLLM takes instead of `input`."""

    content: str | list[Part]
    role: str = "user"


class EmbeddingsRequest(msgspec.Struct):
    """What is to be embedded, and how the vectors come back."""

    input: str | Part | list[str | Part | int | list[int]] | None = None
    """Texts, images as `data:image/...;base64,...`, and parts, in any mixture."""
    messages: list[Message] | None = None
    """One message with one text or image, instead of `input`."""
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    """base64 is of little-endian float32."""
    dimensions: int | None = None
    modality: Literal["text", "image"] = "text"
    """With "image" every string of `input` is one: base64, a data URI or a URL."""
    truncate: bool = False
    """Cut texts that are too long instead of refusing them."""
    user: str | None = None


class Embedding(msgspec.Struct):
    """The vector of an item."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class Usage(msgspec.Struct):
    """Tokens of texts, begin and end among them; images have none."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(msgspec.Struct):
    """Vectors of length 1, in the order of the items."""

    data: list[Embedding]
    model: str
    usage: Usage
    object: str = "list"


class ModelCard(msgspec.Struct):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "clip-rt"


class ModelList(msgspec.Struct):
    """The models that are served."""

    data: list[ModelCard]
    object: str = "list"


class ProblemDetails(msgspec.Struct):
    """What went wrong, and with which part of the request."""

    message: str
    type: str
    param: str | None
    code: str


class Problem(msgspec.Struct):
    """An error, as OpenAI's libraries read it."""

    error: ProblemDetails


LANGCHAIN_OPTION = "check_embedding_ctx_length"
_decoder = msgspec.json.Decoder(EmbeddingsRequest)


async def embeddings(service: Service, request: Request) -> Response:
    """Embed texts and images."""
    asked = await read_json(request, _decoder)
    model, rows, num_tokens = await service.embed(
        service.route(asked.model, request),
        _list_items(asked),
        truncate=asked.truncate,
        dimensions=asked.dimensions,
    )

    def answer() -> Response:
        vectors: list[Any]
        if asked.encoding_format == "base64":
            vectors = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows]
        else:
            vectors = rows.tolist()
        return answer_json(
            EmbeddingsAnswer(
                data=[Embedding(index, vector) for index, vector in enumerate(vectors)],
                model=service.answers_as(asked.model, model),
                usage=Usage(num_tokens, num_tokens),
            )
        )

    return await off_the_loop(answer, num_bytes=rows.nbytes)


async def list_models(service: Service, request: Request) -> Response:
    """Return the models that are served."""
    return answer_json(ModelList(data=[ModelCard(name) for name in service.names]))


def answer_problem(problem: ProblemError) -> Response:
    """Return an error as OpenAI's libraries read it."""
    kind = "invalid_request_error" if problem.status < 500 else "server_error"
    details = ProblemDetails(problem.message, kind, problem.param, problem.code)
    return answer_json(Problem(details), status=problem.status, headers=problem.headers)


def _list_items(asked: EmbeddingsRequest) -> list[Item]:
    if (asked.input is None) == (asked.messages is None):
        raise ProblemError("Name what is to be embedded, in input or in messages.", param="input")
    if asked.messages is not None:
        return [_read_messages(asked.messages)]
    is_image = asked.modality == "image"
    if isinstance(asked.input, str):
        return [read_item(asked.input, "input", is_image=is_image)]
    if isinstance(asked.input, Part):
        return [_read_part(asked.input, "input")]
    items = []
    for index, given in enumerate(asked.input or ()):
        param = f"input[{index}]"
        if isinstance(given, str):
            items.append(read_item(given, param, is_image=is_image))
        elif isinstance(given, Part):
            items.append(_read_part(given, param))
        else:
            raise ProblemError(
                f"input holds token ids of another model's tokenizer. Send texts; with LangChain, "
                f"OpenAIEmbeddings({LANGCHAIN_OPTION}=False).",
                code="tokens_not_supported",
                param=param,
            )
    return items


def _read_messages(messages: list[Message]) -> Item:
    parts: list[tuple[str, str | Part]] = []
    for number, message in enumerate(messages):
        param = f"messages[{number}].content"
        if isinstance(message.content, str):
            parts.append((param, message.content))
        else:
            parts += [(f"{param}[{index}]", part) for index, part in enumerate(message.content)]
    if len(parts) != 1:
        raise ProblemError(
            f"messages hold {len(parts)} parts; a model of this kind embeds one text or one image "
            "at a time. Send the others in input.",
            param="messages",
        )
    ((param, part),) = parts
    return read_item(part, param) if isinstance(part, str) else _read_part(part, param)


def _read_part(part: Part, param: str) -> Item:
    url = part.image_url.url if isinstance(part.image_url, ImageURL) else part.image_url
    given = [("text", part.text), ("image", part.image), ("image_url", url)]
    said = [(name, value) for name, value in given if value is not None]
    if len(said) != 1:
        raise ProblemError(
            f"{param} has {' and '.join(name for name, _ in said) or 'nothing'}; it must have "
            "exactly one of text, image and image_url.",
            param=param,
        )
    ((name, value),) = said
    return Item(param, text=value) if name == "text" else Item(param, image=value)
