"""What an exported model says about itself, carried as `parameters` in its config.pbtxt.

Export writes a manifest, Triton hands it out as model configuration, the client reads it at
connect and refuses a server whose manifest is not the one it was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from clip_rt.errors import ContractError
from clip_rt.specs import Activation

CONTRACT_VERSION = 1
"""Raised when the tensor contract changes in a way an older client cannot read."""


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

    def to_parameters(self) -> dict[str, str]:
        """Return the manifest as config.pbtxt parameters."""
        return {key: json.dumps(value, sort_keys=True) for key, value in asdict(self).items()}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], *, served: str) -> Manifest:
        """Read a manifest back from config.pbtxt parameters of the Triton model `served`.

        Raises:
            ContractError: a parameter is missing, is no JSON, or comes from another contract.
        """
        values: dict[str, object] = {}
        missing = [field.name for field in fields(cls) if field.name not in parameters]
        if missing:
            raise ContractError(
                f"Triton model {served!r} carries no clip_rt manifest (missing: "
                f"{', '.join(missing)}). Export it with python -m export.onnx or export.trt.",
                expected=[field.name for field in fields(cls)],
                found=sorted(parameters),
            )
        for field in fields(cls):
            try:
                value = json.loads(parameters[field.name])
            except json.JSONDecodeError as error:
                raise ContractError(
                    f"parameter {field.name!r} of Triton model {served!r} is not JSON: "
                    f"{parameters[field.name][:80]!r}. Export the model again.",
                    expected="JSON",
                    found=parameters[field.name],
                ) from error
            values[field.name] = tuple(value) if isinstance(value, list) else value
        if values["contract_version"] != CONTRACT_VERSION:
            raise ContractError(
                f"Triton model {served!r} obeys contract {values['contract_version']}, this client "
                f"reads contract {CONTRACT_VERSION}. Export the model again or change the client.",
                expected=CONTRACT_VERSION,
                found=values["contract_version"],
            )
        return cls(**values)  # type: ignore[arg-type]
