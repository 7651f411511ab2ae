"""`open_clip:NAME`, `open_clip:FOLDER`, `hf:owner/name` or `hf:FOLDER` in, a dual encoder out."""

from __future__ import annotations

from pathlib import Path

from clip_rt.errors import CheckpointError
from training.encoders import of_open_clip, of_transformers
from training.encoders.encoder import ExternalEncoder
from training.weights import hub

_NO_WEIGHTS = "openai"
"""What an export takes for granted of our own architectures, and means nothing here."""


def is_external(model: str) -> bool:
    """Return whether a model is another library's."""
    return model.startswith((of_open_clip.PREFIX, of_transformers.PREFIX))


def name_model(model: str) -> str:
    """Return the name that a model is served under unless the user chooses one."""
    if not is_external(model):
        return model
    return Path(model.partition(":")[2]).name.partition("@")[0]


def load_encoder(
    model: str, *, weights: str | None, tokenizer: Path | None = None
) -> ExternalEncoder:
    """Load a dual encoder of open_clip or transformers, float32, in eval mode.

    Args:
        model: See the first line of this module.
        weights: For a named configuration of open_clip: a file, or `hf:owner/name[@revision]`, a
            repository that open_clip wrote. None leaves them random. A folder has its own.
        tokenizer: See `of_open_clip.load_open_clip`.

    Raises:
        UnknownModelError: there is no such configuration.
        CheckpointError: something cannot be had or read.
    """
    if model.startswith(of_transformers.PREFIX):
        place = model.removeprefix(of_transformers.PREFIX)
        folder = Path(place) if Path(place).is_dir() else hub.fetch(model).folder
        name = folder.name if Path(place).is_dir() else place
        return of_transformers.load_transformers(folder, name=name, random=weights is None)
    name = model.removeprefix(of_open_clip.PREFIX)
    if weights == _NO_WEIGHTS and not Path(name).is_dir():
        raise CheckpointError(
            f"{model} needs --weights: a file, hf:owner/name of a repository that open_clip wrote, "
            "or random."
        )
    if weights is not None and weights.startswith(hub.PREFIX):
        return of_open_clip.load_open_clip(
            str(hub.fetch(weights).folder), weights=None, tokenizer=tokenizer
        )
    file = None if weights in (None, _NO_WEIGHTS) else Path(weights)
    if file is not None and not file.is_file():
        raise CheckpointError(f"there is no file {file}; name the weights with --weights.")
    return of_open_clip.load_open_clip(name, weights=file, tokenizer=tokenizer)
