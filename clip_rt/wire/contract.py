"""What a server says about two towers in; refused unless they are one model, and of one kind.

The tensor contract that exports obey is `ARCHITECTURE.md`'s; what they say is `manifest`.
"""

from __future__ import annotations

from typing import TypeAlias

from clip_rt.errors import ContractError
from clip_rt.specs import PIXELS, TOKENS, image_model, slug
from clip_rt.wire.messages import ServedModel

Towers: TypeAlias = tuple[ServedModel, ServedModel]
"""Image and text."""

_MUST_AGREE = (
    *("model", "architecture", "fingerprint", "embedding_dim", "side_px", "context_length"),
    *("text_buckets", "logit_scale", "logit_bias", "resizing", "tokenization", "score"),
)
_MUST_AGREE_AMONG_REPLICAS = (*_MUST_AGREE, "activation", "mean", "std", "precision")


def check_towers(towers: Towers) -> None:
    """Refuse two towers that are not of one model, or do not read what this client sends.

    Raises:
        ContractError: with what was expected and what was found.
    """
    image, text = towers
    promised, other = image.manifest, text.manifest
    differing = [name for name in _MUST_AGREE if getattr(promised, name) != getattr(other, name)]
    expected = {f"{image.name} {name}": getattr(promised, name) for name in differing}
    found = {f"{text.name} {name}": getattr(other, name) for name in differing}
    if image_model(promised.model) != image.name:
        expected["model"], found["model"] = image.name, slug(promised.model)
    square = (promised.side_px, promised.side_px, 3)
    lengths = ((-1,), *((length,) for length in other.text_buckets))
    for served, *wanted in (image, PIXELS, "UINT8", (square,)), (text, TOKENS, "INT32", lengths):
        name, kind, possible_dims = wanted
        actual = (served.input_name, served.input_type, served.input_dims)
        if actual[:2] != (name, kind) or served.input_dims not in possible_dims:
            expected[f"input of {served.name}"] = (name, kind, possible_dims[0])
            found[f"input of {served.name}"] = actual
    if expected:
        raise ContractError(
            f"{image.name} and {text.name} are not one model that this client reads: expected "
            f"{expected}, found {found}. Export both towers together.",
            expected=expected,
            found=found,
        )


def find_differences(towers: Towers, others: Towers) -> dict[str, tuple[object, object]]:
    """Return what replicas of a model must share and these do not, with both sides."""
    mine, theirs = towers[0].manifest, others[0].manifest
    pairs = {
        name: (getattr(mine, name), getattr(theirs, name)) for name in _MUST_AGREE_AMONG_REPLICAS
    }
    for tower, other in zip(towers, others, strict=True):
        pairs[f"largest batch of {tower.name}"] = tower.max_batch_size, other.max_batch_size
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_hidden(hidden: ServedModel, text: ServedModel, url: str) -> None:
    """Refuse hidden states of another model than the text tower is of.

    Raises:
        ContractError: with what was expected and what was found.
    """
    mine, other = text.manifest, hidden.manifest
    differing = [name for name in _MUST_AGREE if getattr(mine, name) != getattr(other, name)]
    if differing:
        raise ContractError(
            f"{hidden.name} at {url} is of another model than {text.name}: {', '.join(differing)} "
            "differ. Export both together: python -m export.onnx --text-output hidden.",
            expected={name: getattr(mine, name) for name in differing},
            found={name: getattr(other, name) for name in differing},
        )
