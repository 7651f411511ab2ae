"""`clip-rt ui`: a page to look at what a model says."""

from __future__ import annotations

import logging
from typing import Annotated

import tyro

from clip_rt.errors import InputError
from clip_rt.ui.config import UiConfig


def ui(config: Annotated[UiConfig, tyro.conf.arg(name="")]) -> int:
    """Serve a page: classify and search images, choose thresholds, compare models."""
    try:
        from clip_rt.ui.server import serve
    except ModuleNotFoundError as error:
        raise InputError(f"the page needs {error.name}: pip install 'clip-rt[gateway]'.") from error

    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    serve(config)
    return 0
