"""What there is, for programs: a description by OpenAPI 3.1, made of the structures themselves."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Protocol

import msgspec

from clip_rt._version import __version__


class Described(Protocol):
    """A path of the gateway."""

    @property
    def method(self) -> str:
        """GET or POST."""

    @property
    def path(self) -> str:
        """Where it is."""

    @property
    def summary(self) -> str:
        """What it does."""

    @property
    def reads(self) -> Any:
        """Structure of its body, or None."""

    @property
    def answers(self) -> Any:
        """Structure of its answer, or None."""

    @property
    def status(self) -> HTTPStatus:
        """Of an answer that is no error."""

    @property
    def problem(self) -> Any:
        """Structure of an error."""

    @property
    def is_public(self) -> bool:
        """Whether it needs no token."""


def describe(endpoints: Iterable[Described], *, has_tokens: bool) -> dict[str, Any]:
    """Return the description.

    Args:
        endpoints: All paths.
        has_tokens: Whether those that are not open need a bearer token.
    """
    listed = tuple(endpoints)
    types = [
        each
        for endpoint in listed
        for each in (endpoint.reads, endpoint.answers, endpoint.problem)
        if each
    ]
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    schema_by_type = dict(zip(types, schemas, strict=True))
    paths: dict[str, Any] = {}
    for endpoint in listed:
        operation: dict[str, Any] = {"summary": endpoint.summary}
        if endpoint.reads:
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": schema_by_type[endpoint.reads]}},
            }
        answer: dict[str, Any] = {"description": endpoint.status.phrase}
        if endpoint.answers:
            answer["content"] = {"application/json": {"schema": schema_by_type[endpoint.answers]}}
        operation["responses"] = {
            str(int(endpoint.status)): answer,
            "default": {
                "description": "An error",
                "content": {"application/json": {"schema": schema_by_type[endpoint.problem]}},
            },
        }
        if has_tokens and not endpoint.is_public:
            operation["security"] = [{"token": []}]
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "clip_rt", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if has_tokens:
        described["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return described
