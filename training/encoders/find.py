"""`open_clip:NAME`, `open_clip:FOLDER`, `hf:owner/name` or `hf:FOLDER` in, a dual encoder out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from clip_rt.errors import CheckpointError, InputError
from clip_rt.specs import EncoderFacts
from training.checkpoint import describe_preparation
from training.encoders import of_open_clip, of_transformers
from training.encoders.encoder import ExternalEncoder, measure_any_length
from training.weights import hub
from training.weights.tensor_files import read_tensors

OWN_WEIGHTS = "openai"
"""Those that a model brings along, where an option names none; of our own architectures it is
OpenAI's."""
RANDOM_WEIGHTS = "random"
_TEXTS = (
    "a photo of a cat.",
    "a diagram",
    "two people riding bicycles through heavy rain past a row of parked cars",
    "the word “naïve” written in neon, 東京 ☔ 2024",
)
"""Of several lengths: whether a text may be cut at its end is measured on these."""


def is_external(model: str) -> bool:
    """Return whether a model is another library's."""
    return model.startswith((of_open_clip.PREFIX, of_transformers.PREFIX))


def has_own_weights(model: str) -> bool:
    """Return whether a model of another library brings weights along: a folder, or of a hub."""
    is_folder = Path(model.partition(":")[2]).is_dir()
    return is_external(model) and (model.startswith(of_transformers.PREFIX) or is_folder)


def has_own_tokenizer(model: str) -> bool:
    """Return whether a model of another library always brings its tokenizer along."""
    return model.startswith(of_transformers.PREFIX)


def name_model(model: str) -> str:
    """Return the name that a model is served under unless the user chooses one."""
    if not is_external(model):
        return model
    place = model.partition(":")[2]
    if model.startswith(of_transformers.PREFIX) and not Path(place).is_dir():
        place = place.partition("@")[0]
    return Path(place).name


def load_encoder(
    model: str, *, weights: str | None, tokenizer: Path | None = None
) -> ExternalEncoder:
    """Load a dual encoder of open_clip or transformers, float32, in eval mode.

    Args:
        model: See the first line of this module.
        weights: A file that `training.run` wrote for this model. For a named configuration of
            open_clip also a file of its own, or `hf:owner/name[@revision]`, a repository that it
            wrote. A folder and a repository of the hub have their own, which `OWN_WEIGHTS` stands
            for. None leaves them random.
        tokenizer: See `of_open_clip.load_open_clip`.

    Raises:
        UnknownModelError: there is no such configuration.
        InputError: an option means nothing for this model.
        CheckpointError: something cannot be had or read.
    """
    tuned = None if weights is None else _read_tuned(weights)
    encoder = _build(model, weights=None if tuned else weights, tokenizer=tokenizer)
    if tuned is not None:
        tensors, metadata = tuned
        _check_same(metadata, encoder.facts)
        encoder.load_file(tensors)
    if not measure_any_length(encoder, _TEXTS):
        encoder.facts = replace(encoder.facts, is_any_length_exact=False)
    return encoder


def _read_tuned(weights: str) -> tuple[Mapping[str, Tensor], Mapping[str, str]] | None:
    """Return tensors and metadata of what `training.run` wrote of an external model, else None."""
    path = Path(weights)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    tensors, metadata = read_tensors(path)
    return (tensors, metadata) if is_external(metadata.get("architecture", "")) else None


def _check_same(metadata: Mapping[str, str], facts: EncoderFacts) -> None:
    """Make sure that weights are used as the model they were trained as, and fed the same.

    Raises:
        CheckpointError: they are not.
    """
    name, activation = metadata.get("architecture"), metadata.get("activation")
    # By both: the same folder may have another name, and a library may describe itself anew.
    if name != facts.name and activation != facts.activation:
        raise CheckpointError(
            f"the weights were trained as {name}, and {facts.name} is configured otherwise. Name "
            "the model that they were trained as with --model."
        )
    mine = describe_preparation(facts)
    for what, theirs in json.loads(metadata.get("preparation", "{}")).items():
        if mine.get(what) != theirs:
            raise CheckpointError(
                f"the weights were trained with {what} {theirs!s:.200}, and {facts.name} has "
                f"{mine.get(what)!s:.200}. Name the folder that the training began with, whose "
                "files say how images and texts are prepared: --model open_clip:FOLDER."
            )


def _build(model: str, *, weights: str | None, tokenizer: Path | None) -> ExternalEncoder:
    place = model.partition(":")[2]
    has_own = has_own_weights(model)
    if has_own and weights not in (None, OWN_WEIGHTS):
        raise InputError(
            f"{model} has weights of its own, and {weights[:80]!r} is no file that training.run "
            "wrote of it. Leave the weights out, or name random."
        )
    if model.startswith(of_transformers.PREFIX):
        if tokenizer is not None:
            raise InputError(f"{model} has a tokenizer of its own; leave --tokenizer out.")
        folder = Path(place)
        if not folder.is_dir():
            folder = hub.fetch(model, prefer=hub.BY_TRANSFORMERS).folder
        return of_transformers.load_transformers(
            folder, name=name_of_source(place), random=weights is None
        )
    if has_own:
        if weights is not None:
            hub.open_folder(Path(place))
        return of_open_clip.load_open_clip(
            place, folder=Path(place), has_weights=weights is not None, tokenizer=tokenizer
        )
    if weights == OWN_WEIGHTS:
        tags = of_open_clip.list_tags(place)
        known = f" open_clip knows {', '.join(list(tags.values())[:4])}." if tags else ""
        raise CheckpointError(
            f"{model} is a configuration and has no weights of its own. Name a file, hf:owner/name "
            f"of a repository that open_clip wrote, or random.{known}"
        )
    if weights is not None and weights.startswith(hub.PREFIX):
        return of_open_clip.load_open_clip(
            place, folder=hub.fetch(weights).folder, has_weights=True, tokenizer=tokenizer
        )
    file = None if weights is None else Path(weights)
    if file is not None and not file.is_file():
        known = of_open_clip.list_tags(place).get(str(weights), "hf:owner/name")
        raise CheckpointError(f"there is no file {file}; name one, {known}, or random.")
    return of_open_clip.load_open_clip(place, file=file, tokenizer=tokenizer)


def name_of_source(place: str) -> str:
    """Return what a model of the hub, or a folder, is called in messages and manifests."""
    return Path(place).name if Path(place).is_dir() else place
