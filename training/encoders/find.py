"""`open_clip:NAME`, `open_clip:FOLDER`, `hf:owner/name` or `hf:FOLDER` in, a dual encoder out."""

from __future__ import annotations

from pathlib import Path

from clip_rt.errors import CheckpointError, InputError
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
        weights: For a named configuration of open_clip: a file, or `hf:owner/name[@revision]`, a
            repository that open_clip wrote. A folder and a repository of the hub have their own,
            which "openai" stands for: nobody has named any. None leaves them random.
        tokenizer: See `of_open_clip.load_open_clip`.

    Raises:
        UnknownModelError: there is no such configuration.
        InputError: an option means nothing for this model.
        CheckpointError: something cannot be had or read.
    """
    place = model.partition(":")[2]
    has_own = model.startswith(of_transformers.PREFIX) or Path(place).is_dir()
    if has_own and weights not in (None, _NO_WEIGHTS):
        raise InputError(
            f"{model} has weights of its own, and --weights names {weights[:80]!r}. Leave it out, "
            "or name random."
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
    if weights == _NO_WEIGHTS:
        raise CheckpointError(
            f"{model} needs --weights: a file, hf:owner/name of a repository that open_clip wrote, "
            "or random."
        )
    if weights is not None and weights.startswith(hub.PREFIX):
        return of_open_clip.load_open_clip(
            place, folder=hub.fetch(weights).folder, has_weights=True, tokenizer=tokenizer
        )
    file = None if weights is None else Path(weights)
    if file is not None and not file.is_file():
        raise CheckpointError(f"there is no file {file}; name the weights with --weights.")
    return of_open_clip.load_open_clip(place, file=file, tokenizer=tokenizer)


def name_of_source(place: str) -> str:
    """Return what a model of the hub, or a folder, is called in messages and manifests."""
    return Path(place).name if Path(place).is_dir() else place
