"""The paths of the gateway, and what happens to every request: admission, errors, metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message

from clip_rt.gateway import immich, labels, openai, openapi, weaviate
from clip_rt.gateway.admission import Admission
from clip_rt.gateway.candidates import MODEL_HEADER, routed_model
from clip_rt.gateway.metrics import Metrics
from clip_rt.gateway.problems import ProblemError, find_problem
from clip_rt.gateway.reading import answer_json
from clip_rt.gateway.service import Service
from clip_rt.gateway.tracing import request_span

GRACE_S = 0.5
"""For a call of a client, whose own time may be over, to say what took so long."""
CLIENT_CLOSED_REQUEST = 499
"""Nobody is there to read the answer; nginx's number for it."""

Handler = Callable[[Service, Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A path, and how it is answered."""

    method: str
    path: str
    handler: Handler
    summary: str
    reads: Any = None
    """Structure of the body."""
    answers: Any = None
    """Structure of the answer."""
    status: HTTPStatus = HTTPStatus.OK
    problem: Any = openai.Problem
    """Structure of an error."""
    is_inference: bool = False
    """Whether a model is asked, so that only so many are let in."""
    is_public: bool = False
    """Whether it needs no token: health checks have none."""
    answer_problem: Callable[[ProblemError], Response] = openai.answer_problem


async def _live(service: Service, request: Request) -> Response:
    return answer_json({"status": "ok"})


async def _ready(service: Service, request: Request) -> Response:
    problems = await service.check()
    models = {name: problems.get(name, "ok") for name in service.names}
    is_available = service.is_available(problems)
    return answer_json(
        {"status": "ok" if is_available else "unavailable", "models": models},
        status=HTTPStatus.OK if is_available else HTTPStatus.SERVICE_UNAVAILABLE,
    )


async def _is_live(service: Service, request: Request) -> Response:
    return Response(status_code=HTTPStatus.NO_CONTENT)


async def _is_ready(service: Service, request: Request) -> Response:
    is_available = service.is_available(await service.check())
    return Response(
        status_code=HTTPStatus.NO_CONTENT if is_available else HTTPStatus.SERVICE_UNAVAILABLE
    )


ENDPOINTS: Sequence[Endpoint] = (
    Endpoint(
        method="POST",
        path="/v1/embeddings",
        handler=openai.embeddings,
        summary="Embed texts and images, as OpenAI's API does",
        reads=openai.EmbeddingsRequest,
        answers=openai.EmbeddingsAnswer,
        is_inference=True,
    ),
    Endpoint(
        method="GET",
        path="/v1/models",
        handler=openai.list_models,
        summary="List the models",
        answers=openai.ModelList,
    ),
    Endpoint(
        method="POST",
        path="/v1/classify",
        handler=labels.classify,
        summary="Say which labels fit images best",
        reads=labels.ClassifyRequest,
        answers=labels.ClassifyAnswer,
        is_inference=True,
    ),
    Endpoint(
        method="GET",
        path="/health/live",
        handler=_live,
        summary="The process runs",
        is_public=True,
    ),
    Endpoint(
        method="GET",
        path="/health/ready",
        handler=_ready,
        summary="Every model embeds what its answer is known of; 503 if not",
        is_public=True,
    ),
    Endpoint(
        method="GET",
        path="/ping",
        handler=immich.ping,
        summary="Immich: somebody is here",
        is_public=True,
    ),
    Endpoint(
        method="POST",
        path="/predict",
        handler=immich.predict,
        summary="Immich: embed one image or text",
        is_inference=True,
    ),
    Endpoint(
        method="GET",
        path="/.well-known/live",
        handler=_is_live,
        status=HTTPStatus.NO_CONTENT,
        summary="Weaviate: the process runs",
        is_public=True,
    ),
    Endpoint(
        method="GET",
        path="/.well-known/ready",
        handler=_is_ready,
        status=HTTPStatus.NO_CONTENT,
        summary="Weaviate: the models answer",
        is_public=True,
    ),
    Endpoint(
        method="GET",
        path="/meta",
        handler=weaviate.meta,
        summary="Weaviate: which model it is",
    ),
    Endpoint(
        method="POST",
        path="/vectorize",
        handler=weaviate.vectorize,
        summary="Weaviate: embed texts and images",
        reads=weaviate.VectorizeRequest,
        answers=weaviate.VectorizeAnswer,
        is_inference=True,
        problem=weaviate.Refusal,
        answer_problem=weaviate.answer_problem,
    ),
)


def make_application(service: Service, more: Sequence[Endpoint] = ()) -> Starlette:
    """Return the ASGI application.

    Args:
        service: The models.
        more: Paths beside those of the protocols, which `/openapi.json` leaves out.

    Raises:
        InputError: the tokens cannot be read.
    """
    admission = Admission(service.config)
    metrics = Metrics(admission, service)

    async def show_metrics(service: Service, request: Request) -> Response:
        # In a thread: collecting takes milliseconds.
        text = await asyncio.to_thread(generate_latest, metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    endpoints = (
        *ENDPOINTS,
        Endpoint(
            method="GET",
            path="/metrics",
            handler=show_metrics,
            summary="Metrics in Prometheus's format",
        ),
    )
    description = openapi.describe(endpoints, has_tokens=admission.has_tokens)

    async def show_description(service: Service, request: Request) -> Response:
        return answer_json(description)

    endpoints += (
        Endpoint(
            method="GET",
            path="/openapi.json",
            handler=show_description,
            summary="This description",
            is_public=True,
        ),
    )
    application = Starlette(
        routes=[
            Route(each.path, _make_route(each, service, admission, metrics), methods=[each.method])
            for each in (*endpoints, *more)
        ],
        exception_handlers={HTTPException: _answer_unknown},
    )
    # To a host that the caller names in a header.
    application.router.redirect_slashes = False
    return application


async def _answer_unknown(request: Request, error: Exception) -> Response:
    """Answer a path or method there is not."""
    assert isinstance(error, HTTPException)
    response = openai.answer_problem(
        ProblemError(
            f"{request.method[:20]} {request.url.path[:80]}: {error.detail}; /openapi.json lists "
            "what there is.",
            status=error.status_code,
            code=HTTPStatus(error.status_code).name.lower(),
        )
    )
    response.headers.update(error.headers or {})
    return response


def _make_route(
    endpoint: Endpoint, service: Service, admission: Admission, metrics: Metrics
) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        if not endpoint.is_public:
            admission.authorize(request)
        if not endpoint.is_inference:
            return await endpoint.handler(service, request)
        try:
            with admission.admitted():
                body = await admission.read_body(request)
                with admission.timed():
                    response = await _while_connected(endpoint.handler, service, request, body)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if model := routed_model(request):
            response.headers[MODEL_HEADER] = model
        return response

    async def answer_or_refuse(request: Request) -> Response:
        try:
            return await answer(request)
        except Exception as error:
            problem = find_problem(error)
            if problem.code == "rate_limit_exceeded":
                metrics.rejected.inc()
            return endpoint.answer_problem(problem)

    async def route(request: Request) -> Response:
        start_s = time.perf_counter()
        if endpoint.is_inference:
            with request_span(request, endpoint.path) as span:
                response = await answer_or_refuse(request)
                span.end_with(response)
        else:
            response = await answer_or_refuse(request)
        metrics.seconds.labels(endpoint.path, response.status_code).observe(
            time.perf_counter() - start_s
        )
        return response

    return route


async def _while_connected(
    handler: Handler, service: Service, request: Request, body: bytes
) -> Response:
    """Answer a request whose body was read, and stop when its caller goes away.

    Raises:
        ClientDisconnect: it did.
    """
    is_read = False

    async def receive() -> Message:
        nonlocal is_read
        if is_read:
            return await request.receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    work = asyncio.ensure_future(handler(service, Request(request.scope, receive)))
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait(
            (work, gone),
            timeout=service.config.timeout_s + GRACE_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if work.done():
            return work.result()
        if gone.done():
            raise ClientDisconnect
        raise ProblemError(
            f"The request was not done after {service.config.timeout_s:g} s. Send less at a time.",
            status=HTTPStatus.GATEWAY_TIMEOUT,
            code="timeout",
        )
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
