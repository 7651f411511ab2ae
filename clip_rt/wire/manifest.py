"""What an exported model says about itself, carried as `parameters` in its config.pbtxt.

Export writes a manifest, Triton hands it out as model configuration, the client reads it at
connect and refuses a server whose manifest is not the one it was asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, get_args

from clip_rt.errors import ContractError, InputError
from clip_rt.specs import (
    CLIP_RESIZING,
    CLIP_TOKENIZATION,
    Resizing,
    Score,
    Tokenization,
)

CONTRACT_VERSIONS = (1, 2)
"""Those this client reads. A manifest obeys the first that can say what it says, so that older
clients go on reading exports of CLIP's own models: 1 has no field with a default but `canary`."""
CANARY = "canary"
CONTRACT_VERSION = "contract_version"
"""The parameter that says which contract the others obey."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The facts a client needs to use a served model, and to know that it is the right one.

    In config.pbtxt each field is one parameter of the same name whose string value is JSON.
    """

    model: str
    """Name it is served under, as the user gave it; its slug names the two Triton models."""
    architecture: str
    """Key of `specs.MODELS`, or library and name: open_clip:ViT-B-16-SigLIP2."""
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
    activation: str
    """Of the MLP blocks, quick_gelu or gelu; configured:<digest> is another library's."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: str
    """Of the served graph: fp32, fp16, int8, or fp16_weights (stored in FP16, computed in FP32)."""
    libraries: dict[str, str]
    """Version of each library that made the export."""
    resizing: Resizing = CLIP_RESIZING
    """How an image becomes the square of `side_px`."""
    tokenization: Tokenization = CLIP_TOKENIZATION
    """How a text becomes at most `context_length` ids."""
    score: Score = "softmax"
    """What makes probabilities of scaled cosines: softmax over the labels; or sigmoid, of each
    label alone, for models trained so."""
    matryoshka_dimensions: tuple[int, ...] = ()
    """Lengths that embeddings may be cut to and normalised again, ascending, as the model was
    trained to be (Kusupati et al. 2022); the whole is not among them."""
    # Two exports of the same weights need not give the same one, and it says nothing more.
    canary: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    """What the FP32 reference answers to `clip_rt.wire.canary`; None in exports that lack it."""

    @property
    def contract_version(self) -> int:
        """The first contract that can say this."""
        return 1 if all(getattr(self, name) == value for name, value in _SINCE_2.items()) else 2

    def to_parameters(self) -> dict[str, str]:
        """Return the manifest as config.pbtxt parameters."""
        values = asdict(self)
        if self.canary is None:
            del values[CANARY]
        if self.contract_version == 1:
            for name in _SINCE_2:
                del values[name]
        values[CONTRACT_VERSION] = self.contract_version
        return {key: json.dumps(value, sort_keys=True) for key, value in values.items()}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], *, served: str) -> Manifest:
        """Read a manifest back from config.pbtxt parameters of the Triton model `served`.

        Raises:
            ContractError: a parameter is missing, is no JSON, or comes from a later contract.
        """
        known = {each.name: each.default for each in fields(cls)}
        required = [CONTRACT_VERSION, *(name for name in known if known[name] is MISSING)]
        if parameters.get(CONTRACT_VERSION) == "2":
            required += _SINCE_2
        missing = [name for name in required if name not in parameters]
        if missing:
            raise ContractError(
                f"Triton model {served!r} carries no clip_rt manifest (missing: "
                f"{', '.join(missing)}). Export it with python -m export.onnx or export.trt.",
                expected=required,
                found=sorted(parameters),
            )
        version = _read_json(CONTRACT_VERSION, parameters, served)
        if version not in CONTRACT_VERSIONS or type(version) is not int:
            raise ContractError(
                f"Triton model {served!r} obeys contract {version!r:.80}, this client reads "
                f"{' and '.join(map(str, CONTRACT_VERSIONS))}. Export the model again or change "
                "the client.",
                expected=CONTRACT_VERSIONS,
                found=version,
            )
        values: dict[str, Any] = {
            name: _read_json(name, parameters, served)
            for name in known
            if name in parameters and not (version == 1 and name in _SINCE_2)
        }
        for name, kind in (("resizing", Resizing), ("tokenization", Tokenization)):
            if name in values:
                values[name] = _read_settings(name, kind, values[name], served)
        for name, (rule, is_met) in _RULES.items():
            if name in values and not is_met(values[name]):
                raise ContractError(
                    f"parameter {name!r} of Triton model {served!r} is {values[name]!r:.80}; it "
                    f"must be {rule}. Export the model again.",
                    expected=rule,
                    found=values[name],
                )
        manifest = cls(**values)
        if manifest.text_buckets and max(manifest.text_buckets) != manifest.context_length:
            raise ContractError(
                f"Triton model {served!r} reads texts of {manifest.text_buckets} tokens and has "
                f"a context of {manifest.context_length}; the longest must be that. Export it "
                "again.",
                expected=manifest.context_length,
                found=manifest.text_buckets,
            )
        if max(manifest.matryoshka_dimensions, default=0) >= manifest.embedding_dim:
            raise ContractError(
                f"Triton model {served!r} says that its embeddings may be cut to "
                f"{manifest.matryoshka_dimensions} numbers, and they have "
                f"{manifest.embedding_dim}. Export it again.",
                expected=manifest.embedding_dim,
                found=manifest.matryoshka_dimensions,
            )
        if (manifest.resizing.resize_px or manifest.side_px) < manifest.side_px:
            raise ContractError(
                f"Triton model {served!r} resizes images to {manifest.resizing.resize_px} px and "
                f"crops {manifest.side_px} px of them. Export it again.",
                expected=manifest.side_px,
                found=manifest.resizing.resize_px,
            )
        return manifest


_SINCE_2 = {
    each.name: each.default
    for each in fields(Manifest)
    if each.default is not MISSING and each.name != CANARY
}
"""Fields that contract 1 does not have, with what it takes for granted."""


def _read_json(name: str, parameters: Mapping[str, str], served: str) -> Any:
    try:
        value = json.loads(parameters[name])
    # Beyond bad syntax: a number too long to convert, brackets nested too deep.
    except (ValueError, RecursionError) as error:
        raise ContractError(
            f"parameter {name!r} of Triton model {served!r} is not JSON: "
            f"{parameters[name][:80]!r}. Export the model again.",
            expected="JSON",
            found=parameters[name][:80],
        ) from error
    return tuple(value) if isinstance(value, list) else value


def _read_settings(
    name: str, kind: type[Resizing] | type[Tokenization], value: Any, served: str
) -> Resizing | Tokenization:
    """Make settings of a JSON object; one that this client does not know may matter."""
    known = [each.name for each in fields(kind)]
    try:
        if not isinstance(value, dict) or not set(value) <= set(known):
            raise InputError(f"it must be an object of {', '.join(known)}.")
        settings: dict[str, Any] = {
            key: tuple(each) if isinstance(each, list) else each for key, each in value.items()
        }
        return kind(**settings)
    except InputError as error:
        raise ContractError(
            f"parameter {name!r} of Triton model {served!r} is {value!r:.80}: {error} Export the "
            "model again or change the client.",
            expected=known,
            found=value,
        ) from error


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
    "matryoshka_dimensions": (
        "a list of whole numbers above 0, ascending",
        lambda value: (
            isinstance(value, tuple)
            and all(map(_is_count, value))
            and list(value) == sorted(set(value))
        ),
    ),
    "logit_scale": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "logit_bias": ("a number", _is_number),
    "mean": _CHANNELS,
    "std": _CHANNELS,
    "libraries": ("an object", lambda value: isinstance(value, dict)),
    "score": (" or ".join(get_args(Score)), lambda value: value in get_args(Score)),
    CANARY: ("an object or null", lambda value: value is None or isinstance(value, dict)),
}
"""What each parameter must be: a server may be anybody's, and the client relies on all of it."""
