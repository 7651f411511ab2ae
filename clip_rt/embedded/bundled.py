"""Where the bundled model and its drawings lie: in a checkout, or in clip-rt-drawings."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from clip_rt.errors import InputError, ServerStartError

REPOSITORY_VARIABLE = "CLIP_RT_REPOSITORY"
PACKAGE = "clip_rt_drawings"
CHECKOUT = Path(__file__).resolve().parents[2]


def choose_repository(given: Path | None = None) -> Path:
    """Return the folder of Triton models to use: the given, $CLIP_RT_REPOSITORY's, or the bundled.

    Raises:
        ServerStartError: none is named, and the bundled model is not installed.
    """
    return given or Path(os.environ.get(REPOSITORY_VARIABLE) or find_model_repository())


def find_model_repository() -> Path:
    """Return the folder of Triton models that is served where nothing else is named.

    Raises:
        ServerStartError: it is not installed.
    """
    folder = _find("model_repository", CHECKOUT / "model_repository")
    if folder is None:
        raise ServerStartError(
            "no server and no model repository is named, and the bundled model is not installed. "
            "Install it with pip install 'clip-rt[server]', or name a running server: "
            "clip_rt.Client(url=...)."
        )
    return folder


def find_sample() -> Path:
    """Return the folder of drawings, as shards, that `python -m training.run --sample` reads.

    Raises:
        InputError: it is not installed.
    """
    folder = _find("sample", CHECKOUT / "training/sample")
    if folder is None:
        raise InputError(
            "the sample of drawings is not installed: pip install clip-rt-drawings, or train on "
            "your own data."
        )
    return folder


def _find(name: str, in_checkout: Path) -> Path | None:
    if in_checkout.is_dir():
        return in_checkout
    # Not imported: only its files are wanted.
    spec = find_spec(PACKAGE)
    places = (spec.submodule_search_locations or ()) if spec else ()
    return next((folder for each in places if (folder := Path(each, name)).is_dir()), None)
