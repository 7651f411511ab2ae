"""`clip-rt gateway`: models over HTTP."""

from __future__ import annotations

import logging
from typing import Annotated

import tyro

from clip_rt.errors import InputError
from clip_rt.gateway.config import GatewayConfig


def gateway(config: Annotated[GatewayConfig, tyro.conf.arg(name="")]) -> int:
    """Serve models over HTTP: OpenAI's embeddings, labels, Immich, Weaviate."""
    try:
        from clip_rt.gateway.server import serve
    except ModuleNotFoundError as error:
        raise InputError(
            f"the gateway needs {error.name}: pip install 'clip-rt[gateway]'."
        ) from error

    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    serve(config)
    return 0
