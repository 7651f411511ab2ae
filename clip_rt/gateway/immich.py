"""Immich's machine-learning protocol: `GET /ping` and `POST /predict`.

Source: facts of immich-app/immich, `machine-learning/immich_ml/main.py` and
`server/src/repositories/machine-learning.repository.ts`.
"""

from __future__ import annotations

import io
import warnings
from http import HTTPStatus

import httpx
import msgspec
from PIL import Image
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from clip_rt.gateway.problems import ProblemError
from clip_rt.gateway.reading import answer_json
from clip_rt.gateway.service import Item, Service


class Task(msgspec.Struct, rename="camel"):
    """Which model does it."""

    model_name: str


class CLIPTasks(msgspec.Struct):
    """One of the two towers."""

    visual: Task | None = None
    textual: Task | None = None


class Entries(msgspec.Struct):
    """What a request asks for."""

    clip: CLIPTasks | None = None


_decoder = msgspec.json.Decoder(Entries)


async def ping(service: Service, request: Request) -> Response:
    """Say that somebody is here."""
    return PlainTextResponse("pong")


async def predict(service: Service, request: Request) -> Response:
    """Embed one image or one text; other tasks are passed on."""
    # Kept, for whoever it may be passed on to.
    content = await request.body()
    try:
        form = await _read_form(request, len(content))
        try:
            return await _predict(service, request, form, content)
        finally:
            await form.close()
    except (MultiPartException, KeyError) as error:
        raise ProblemError(
            "The request is no form of multipart/form-data that can be read.", code="invalid_form"
        ) from error


async def _read_form(request: Request, num_bytes: int) -> FormData:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await request.form()
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=1, max_fields=8, max_part_size=num_bytes + 1
    )
    # All of it is in memory already, and there may be no disk.
    parser.spool_max_size = num_bytes + 1
    return await parser.parse()


async def _predict(service: Service, request: Request, form: FormData, content: bytes) -> Response:
    entries = form.get("entries")
    if not isinstance(entries, str):
        raise ProblemError("The form has no field entries.", param="entries")
    try:
        tasks = _decoder.decode(entries).clip
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise ProblemError(f"entries cannot be read: {error}.", param="entries") from error
    if tasks is not None and tasks.visual is not None:
        file = form.get("image")
        if not isinstance(file, UploadFile):
            raise ProblemError("The form has no file image.", param="image")
        image = await file.read()
        vector = await _embed(service, tasks.visual, Item("image", image=image))
        width, height = _find_size(image)
        return answer_json({"clip": vector, "imageHeight": height, "imageWidth": width})
    if tasks is not None and tasks.textual is not None:
        text = form.get("text")
        if not isinstance(text, str):
            raise ProblemError("The form has no field text.", param="text")
        return answer_json({"clip": await _embed(service, tasks.textual, Item("text", text=text))})
    return await _pass_on(service, request, content)


async def _embed(service: Service, task: Task, item: Item) -> str:
    """Return an embedding as Immich keeps it: JSON in a string."""
    # Search texts are cut, as Immich's own server cuts them.
    _, rows, _ = await service.embed(task.model_name, [item], truncate=True)
    return msgspec.json.encode(rows[0].tolist()).decode()


def _find_size(image: bytes) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(image)) as opened:
            width, height = opened.size
            return width, height


async def _pass_on(service: Service, request: Request, content: bytes) -> Response:
    url = service.config.immich_url
    if url is None:
        raise ProblemError(
            "Only tasks of CLIP are done here, and nobody is named for others: --immich-url.",
            status=HTTPStatus.NOT_IMPLEMENTED,
            code="task_not_supported",
            param="entries",
        )
    try:
        answer = await service.http.post(
            f"{url.rstrip('/')}/predict",
            content=content,
            headers={"Content-Type": request.headers.get("content-type", "")},
        )
    except httpx.HTTPError as error:
        raise ProblemError(
            f"The server for other tasks does not answer: {type(error).__name__}.",
            status=HTTPStatus.BAD_GATEWAY,
            code="unavailable",
        ) from error
    return Response(
        answer.content, answer.status_code, media_type=answer.headers.get("content-type")
    )
