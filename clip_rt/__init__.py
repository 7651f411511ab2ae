"""clip_rt: CLIP from weights to production. The client of a Triton that serves CLIP encoders.

Names are imported when they are first used, so that `import clip_rt` costs next to nothing.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from clip_rt._version import __version__

# A library does not print: the application says who listens.
logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from clip_rt import telemetry, testing
    from clip_rt.async_client import AsyncClient
    from clip_rt.classification.probe import Probe
    from clip_rt.classification.zero_shot import Scores
    from clip_rt.client import Client
    from clip_rt.embedded.foreground import serve
    from clip_rt.embedded.server import EmbeddedServer
    from clip_rt.errors import (
        CheckpointError,
        ClientClosedError,
        ClipRTError,
        ContractError,
        ExportError,
        ImageError,
        InferenceError,
        InputError,
        MessageTooLongError,
        ModelReplacedError,
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
    from clip_rt.inputs.images import preprocess
    from clip_rt.inputs.tokenizer import tokenize
    from clip_rt.requests.results import Encoded
    from clip_rt.specs import MODELS, ModelSpec
    from clip_rt.telemetry import Timings, measure
    from clip_rt.wire.channel import TLS
    from clip_rt.wire.manifest import Manifest

__all__ = [
    "MODELS",
    "TLS",
    "AsyncClient",
    "CheckpointError",
    "Client",
    "ClientClosedError",
    "ClipRTError",
    "ContractError",
    "EmbeddedServer",
    "Encoded",
    "ExportError",
    "ImageError",
    "InferenceError",
    "InputError",
    "Manifest",
    "MessageTooLongError",
    "ModelReplacedError",
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
    "Timings",
    "TrainingError",
    "UnknownModelError",
    "__version__",
    "measure",
    "preprocess",
    "serve",
    "telemetry",
    "testing",
    "tokenize",
]

_MODULE_BY_NAME = {
    "AsyncClient": "async_client",
    "Client": "client",
    "EmbeddedServer": "embedded.server",
    "Encoded": "requests.results",
    "MODELS": "specs",
    "Manifest": "wire.manifest",
    "ModelSpec": "specs",
    "Probe": "classification.probe",
    "Scores": "classification.zero_shot",
    "TLS": "wire.channel",
    "Timings": "telemetry",
    "measure": "telemetry",
    "preprocess": "inputs.images",
    "serve": "embedded.foreground",
    "tokenize": "inputs.tokenizer",
}
"""Where a name comes from; those that are not listed are errors."""


_MODULES = ("telemetry", "testing")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    module = importlib.import_module(f"{__name__}.{_MODULE_BY_NAME.get(name, 'errors')}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
