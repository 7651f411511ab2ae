"""What the page is told when it opens: models, template sets, limits, how to ask from Python."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from clip_rt._version import __version__
from clip_rt.gateway.application import Endpoint
from clip_rt.gateway.reading import answer_json
from clip_rt.gateway.service import Service
from clip_rt.inputs.prompts import DEFAULT_TEMPLATE, template_names
from clip_rt.specs import Score
from clip_rt.ui.search import MAX_HITS


class ModelSettings(msgspec.Struct):
    """A model that is served."""

    name: str
    architecture: str
    precision: str
    score: Score
    fingerprint: str


class SettingsAnswer(msgspec.Struct):
    """What the page depends on."""

    version: str
    models: list[ModelSettings]
    """The one that is used by default first."""
    template_sets: list[str]
    default_template: str
    max_items: int
    max_labels: int
    max_body_bytes: int
    max_hits: int
    client: dict[str, Any]
    """Arguments of a `clip_rt.Client` that asks what the page asks."""


def list_settings_endpoints() -> tuple[Endpoint, ...]:
    """Return the path."""
    return (
        Endpoint(
            method="GET", path="/ui/settings", handler=show_settings, summary="What is served"
        ),
    )


async def show_settings(service: Service, request: Request) -> Response:
    """Say what is served."""
    config = service.config
    manifests = await asyncio.gather(*map(service.manifest, service.names))
    client: dict[str, Any] = {}
    if config.url:
        client["url"] = list(config.url)
    if config.repository is not None:
        client["repository"] = str(config.repository.absolute())
    if config.server != "auto":
        client["server"] = config.server
    return answer_json(
        SettingsAnswer(
            version=__version__,
            models=[
                ModelSettings(
                    each.model, each.architecture, each.precision, each.score, each.fingerprint
                )
                for each in manifests
            ],
            template_sets=list(template_names()),
            default_template=DEFAULT_TEMPLATE,
            max_items=config.max_items,
            max_labels=config.max_labels,
            max_body_bytes=config.max_body_bytes,
            max_hits=MAX_HITS,
            client=client,
        )
    )
