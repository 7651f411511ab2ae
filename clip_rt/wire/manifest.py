"""What an exported model says about itself, carried as `parameters` in its config.pbtxt.

Export writes a manifest, Triton hands it out as model configuration, the client reads it at
connect and refuses a server whose manifest is not the one it was asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from clip_rt.errors import ContractError
from clip_rt.specs import Activation

CONTRACT_VERSION = 1
"""Raised when the tensor contract changes in a way an older client cannot read."""
CANARY = "canary"
"""The one parameter that may be missing."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The facts a client needs to use a served model, and to know that it is the right one.

    In config.pbtxt each field is one parameter of the same name whose string value is JSON.
    """

    model: str
    """Name it is served under, as the user gave it; its slug names the two Triton models."""
    architecture: str
    """Key of `specs.MODELS`."""
    fingerprint: str
    """sha256 over names, dtypes, shapes and bytes of all weight tensors, both towers, hex."""
    embedding_dim: int
    side_px: int
    context_length: int
    text_buckets: tuple[int, ...]
    """Text lengths the server accepts; an empty tuple means any up to the context length."""
    logit_scale: float
    """The factor itself (100 for OpenAI's models), not its logarithm."""
    logit_bias: float
    """Added to the scaled cosine; 0 for models trained with InfoNCE."""
    activation: Activation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: str
    """Of the served graph: fp32, fp16, int8, or fp16_weights (stored in FP16, computed in FP32)."""
    libraries: dict[str, str]
    """Version of each library that made the export."""
    contract_version: int = CONTRACT_VERSION
    # Two exports of the same weights need not give the same one, and it says nothing more.
    canary: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    """What the FP32 reference answers to `clip_rt.wire.canary`; None in exports that lack it."""

    def to_parameters(self) -> dict[str, str]:
        """Return the manifest as config.pbtxt parameters."""
        return {
            key: json.dumps(value, sort_keys=True)
            for key, value in asdict(self).items()
            if key != CANARY or value is not None
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], *, served: str) -> Manifest:
        """Read a manifest back from config.pbtxt parameters of the Triton model `served`.

        Raises:
            ContractError: a parameter is missing, is no JSON, or comes from another contract.
        """
        values: dict[str, object] = {}
        names = [each.name for each in fields(cls)]
        missing = [name for name in names if name not in parameters and name != CANARY]
        if missing:
            raise ContractError(
                f"Triton model {served!r} carries no clip_rt manifest (missing: "
                f"{', '.join(missing)}). Export it with python -m export.onnx or export.trt.",
                expected=names,
                found=sorted(parameters),
            )
        for name in names:
            try:
                value = json.loads(parameters.get(name, "null"))
            # Beyond bad syntax: a number too long to convert, brackets nested too deep.
            except (ValueError, RecursionError) as error:
                raise ContractError(
                    f"parameter {name!r} of Triton model {served!r} is not JSON: "
                    f"{parameters[name][:80]!r}. Export the model again.",
                    expected="JSON",
                    found=parameters[name][:80],
                ) from error
            values[name] = tuple(value) if isinstance(value, list) else value
        if values["contract_version"] != CONTRACT_VERSION:
            raise ContractError(
                f"Triton model {served!r} obeys contract {values['contract_version']}, this client "
                f"reads contract {CONTRACT_VERSION}. Export the model again or change the client.",
                expected=CONTRACT_VERSION,
                found=values["contract_version"],
            )
        for name, (rule, is_met) in _RULES.items():
            if not is_met(values[name]):
                raise ContractError(
                    f"parameter {name!r} of Triton model {served!r} is {values[name]!r:.80}; it "
                    f"must be {rule}. Export the model again.",
                    expected=rule,
                    found=values[name],
                )
        manifest = cls(**values)  # type: ignore[arg-type]
        if manifest.text_buckets and max(manifest.text_buckets) != manifest.context_length:
            raise ContractError(
                f"Triton model {served!r} reads texts of {manifest.text_buckets} tokens and has "
                f"a context of {manifest.context_length}; the longest must be that. Export it "
                "again.",
                expected=manifest.context_length,
                found=manifest.text_buckets,
            )
        return manifest


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(re.search(r"[A-Za-z0-9]", value))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_TEXT = ("a string with a letter or digit", _is_text)
_COUNT = ("a whole number above 0", _is_count)
_CHANNELS = (
    "three numbers",
    lambda value: isinstance(value, tuple) and len(value) == 3 and all(map(_is_number, value)),
)
_RULES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "model": _TEXT,
    "architecture": _TEXT,
    "fingerprint": _TEXT,
    "activation": _TEXT,
    "precision": _TEXT,
    "embedding_dim": _COUNT,
    "side_px": _COUNT,
    "context_length": ("at least 3", lambda value: _is_count(value) and value >= 3),
    "text_buckets": (
        "a list of whole numbers above 0",
        lambda value: isinstance(value, tuple) and all(map(_is_count, value)),
    ),
    "logit_scale": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "logit_bias": ("a number", _is_number),
    "mean": _CHANNELS,
    "std": _CHANNELS,
    "libraries": ("an object", lambda value: isinstance(value, dict)),
    CANARY: ("an object or null", lambda value: value is None or isinstance(value, dict)),
}
"""What each parameter must be: a server may be anybody's, and the client relies on all of it."""
