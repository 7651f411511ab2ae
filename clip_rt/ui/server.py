"""Runs the page: the gateway's application with its limits and tokens, and what the page needs."""

from __future__ import annotations

import contextlib

from starlette.types import ASGIApp

from clip_rt.errors import InputError
from clip_rt.gateway import server
from clip_rt.gateway.admission import read_tokens
from clip_rt.gateway.application import make_application
from clip_rt.gateway.config import TOKENS_VARIABLE
from clip_rt.gateway.service import Service
from clip_rt.ui.access import SameOrigin
from clip_rt.ui.config import UiConfig
from clip_rt.ui.gallery import Gallery
from clip_rt.ui.policy import list_policy_endpoints
from clip_rt.ui.search import SearchView
from clip_rt.ui.settings import list_settings_endpoints
from clip_rt.ui.static_files import list_static_endpoints
from clip_rt.ui.thresholds import list_threshold_endpoints


def serve(config: UiConfig) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is under way; the second time end at once.

    Raises:
        InputError: it would be open to a network without a token.
        ClipRTError, OSError: see `clip_rt.gateway.server.serve`.
    """
    if not config.is_local and not read_tokens(config):
        raise InputError(
            f"--host {config.host[:80]} opens the page, and the index behind it, to a network; "
            f"name tokens that are let in with --token-file or ${TOKENS_VARIABLE}, or leave --host "
            "out."
        )
    with contextlib.closing(Gallery(config.index)) as gallery:

        def make(service: Service) -> ASGIApp:
            endpoints = (
                *list_static_endpoints(),
                *list_settings_endpoints(),
                *SearchView(gallery).list_endpoints(),
                *list_threshold_endpoints(),
                *list_policy_endpoints(),
            )
            return SameOrigin(make_application(service, endpoints), is_local=config.is_local)

        server.serve(config, make)
