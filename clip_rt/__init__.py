"""clip_rt: CLIP from weights to production. The client of a Triton that serves CLIP encoders.

Names are imported when they are first used, so that `import clip_rt` costs next to nothing.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from clip_rt import errors
from clip_rt._version import __version__ as __version__

# A library does not print: the application says who listens.
logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from clip_rt import telemetry as telemetry
    from clip_rt import testing as testing
    from clip_rt.async_client import AsyncClient as AsyncClient
    from clip_rt.classification.probe import Probe as Probe
    from clip_rt.classification.zero_shot import Scores as Scores
    from clip_rt.client import Client as Client
    from clip_rt.embedded.foreground import serve as serve
    from clip_rt.embedded.server import EmbeddedServer as EmbeddedServer
    from clip_rt.errors import CheckpointError as CheckpointError
    from clip_rt.errors import ClientClosedError as ClientClosedError
    from clip_rt.errors import ClipRTError as ClipRTError
    from clip_rt.errors import ContractError as ContractError
    from clip_rt.errors import ExportError as ExportError
    from clip_rt.errors import ImageError as ImageError
    from clip_rt.errors import InferenceError as InferenceError
    from clip_rt.errors import InputError as InputError
    from clip_rt.errors import JobMismatchError as JobMismatchError
    from clip_rt.errors import JobRunningError as JobRunningError
    from clip_rt.errors import MessageTooLongError as MessageTooLongError
    from clip_rt.errors import ModelReplacedError as ModelReplacedError
    from clip_rt.errors import NonFiniteEmbeddingError as NonFiniteEmbeddingError
    from clip_rt.errors import ParityError as ParityError
    from clip_rt.errors import PolicyError as PolicyError
    from clip_rt.errors import ProtocolError as ProtocolError
    from clip_rt.errors import SearchIndexError as SearchIndexError
    from clip_rt.errors import SearchIndexLockedError as SearchIndexLockedError
    from clip_rt.errors import ServerError as ServerError
    from clip_rt.errors import ServerOverloadedError as ServerOverloadedError
    from clip_rt.errors import ServerStartError as ServerStartError
    from clip_rt.errors import ServerTimeoutError as ServerTimeoutError
    from clip_rt.errors import ServerUnavailableError as ServerUnavailableError
    from clip_rt.errors import TemplateError as TemplateError
    from clip_rt.errors import TextError as TextError
    from clip_rt.errors import TextTooLongError as TextTooLongError
    from clip_rt.errors import TrainingError as TrainingError
    from clip_rt.errors import UnknownModelError as UnknownModelError
    from clip_rt.inputs.images import preprocess as preprocess
    from clip_rt.inputs.tokenizer import tokenize as tokenize
    from clip_rt.localization import Detection as Detection
    from clip_rt.localization import locate as locate
    from clip_rt.moderation.decisions import Moderation as Moderation
    from clip_rt.moderation.policy import Policy as Policy
    from clip_rt.requests.results import Encoded as Encoded
    from clip_rt.requests.results import HiddenStates as HiddenStates
    from clip_rt.scoring import ClipScores as ClipScores
    from clip_rt.scoring import clip_score as clip_score
    from clip_rt.specs import MODELS as MODELS
    from clip_rt.specs import ModelSpec as ModelSpec
    from clip_rt.telemetry import Timings as Timings
    from clip_rt.telemetry import measure as measure
    from clip_rt.wire.channel import TLS as TLS
    from clip_rt.wire.manifest import Manifest as Manifest

_MODULES = ("telemetry", "testing")
_MODULE_BY_NAME = {
    "AsyncClient": "async_client",
    "Client": "client",
    "ClipScores": "scoring",
    "Detection": "localization",
    "EmbeddedServer": "embedded.server",
    "Encoded": "requests.results",
    "HiddenStates": "requests.results",
    "MODELS": "specs",
    "Manifest": "wire.manifest",
    "ModelSpec": "specs",
    "Moderation": "moderation.decisions",
    "Policy": "moderation.policy",
    "Probe": "classification.probe",
    "Scores": "classification.zero_shot",
    "TLS": "wire.channel",
    "Timings": "telemetry",
    "clip_score": "scoring",
    "locate": "localization",
    "measure": "telemetry",
    "preprocess": "inputs.images",
    "serve": "embedded.foreground",
    "tokenize": "inputs.tokenizer",
} | {name: "errors" for name in vars(errors) if name.endswith("Error")}
"""Where a name comes from."""

__all__ = [
    "__version__",
    *sorted([*_MODULES, *_MODULE_BY_NAME], key=lambda name: (not name.isupper(), name)),
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_BY_NAME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
