"""clip_rt: CLIP from weights to production. The client of a Triton that serves CLIP encoders.

Names are imported when they are first used, so that `import clip_rt` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from clip_rt.client import Client
    from clip_rt.errors import (
        CheckpointError,
        ClientClosedError,
        ClipRTError,
        ContractError,
        ExportError,
        ImageError,
        InferenceError,
        InputError,
        NonFiniteEmbeddingError,
        ParityError,
        ProtocolError,
        ServerError,
        ServerOverloadedError,
        ServerStartError,
        ServerTimeoutError,
        ServerUnavailableError,
        TemplateError,
        TextError,
        TextTooLongError,
        TrainingError,
        UnknownModelError,
    )
    from clip_rt.images import preprocess
    from clip_rt.manifest import Manifest
    from clip_rt.probe import Probe
    from clip_rt.server import EmbeddedServer
    from clip_rt.specs import MODELS, ModelSpec
    from clip_rt.tokenizer import tokenize
    from clip_rt.zero_shot import Scores

__all__ = [
    "MODELS",
    "CheckpointError",
    "Client",
    "ClientClosedError",
    "ClipRTError",
    "ContractError",
    "EmbeddedServer",
    "ExportError",
    "ImageError",
    "InferenceError",
    "InputError",
    "Manifest",
    "ModelSpec",
    "NonFiniteEmbeddingError",
    "ParityError",
    "Probe",
    "ProtocolError",
    "Scores",
    "ServerError",
    "ServerOverloadedError",
    "ServerStartError",
    "ServerTimeoutError",
    "ServerUnavailableError",
    "TemplateError",
    "TextError",
    "TextTooLongError",
    "TrainingError",
    "UnknownModelError",
    "__version__",
    "preprocess",
    "tokenize",
]

_MODULE_BY_NAME = {
    "Client": "client",
    "EmbeddedServer": "server",
    "MODELS": "specs",
    "Manifest": "manifest",
    "ModelSpec": "specs",
    "Probe": "probe",
    "Scores": "zero_shot",
    "preprocess": "images",
    "tokenize": "tokenizer",
}
"""Where a name comes from; those that are not listed are errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_BY_NAME.get(name, 'errors')}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
