"""The folders that a model has in a repository, and which models may have them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from clip_rt.errors import InputError
from clip_rt.specs import hidden_model, image_model, text_model, tokenizer_model
from export.ensembles import folder_names
from export.models import find_manifest

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@/ -]{0,63}")


def tower_folders(repository: Path, name: str) -> tuple[Path, Path]:
    """Return the folders of the image and the text tower."""
    return repository / image_model(name), repository / text_model(name)


def tokenizer_folder(repository: Path, name: str) -> Path:
    """Return the folder of the tokenizer's file, of models that have one of their own."""
    return repository / tokenizer_model(name)


def hidden_folder(repository: Path, name: str) -> Path:
    """Return the folder of the hidden states of texts, of models that are exported with them."""
    return repository / hidden_model(name)


def check_writable(repository: Path, name: str) -> None:
    """Refuse a repository that no version of a model can be written into, before any work.

    Raises:
        InputError: says what is in the way.
    """
    for folder in tower_folders(repository.absolute(), name):
        place = next(each for each in (folder, *folder.parents) if each.exists())
        if not place.is_dir():
            raise InputError(f"{place} is no folder; name another --repository.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise InputError(f"the folder {place} cannot be written; name another --repository.")


def check_known(repository: Path, name: str) -> None:
    """Refuse a name that a repository holds no model of.

    Raises:
        InputError: lists those it holds.
    """
    if not repository.is_dir():
        raise InputError(f"there is no folder {repository}; name one with --repository.")
    if all(find_owner(folder) == name for folder in tower_folders(repository, name)):
        return
    owners = {find_owner(folder) for folder in repository.glob("*_image")} - {None}
    known = ", ".join(sorted(map(str, owners))) or "none"
    raise InputError(
        f"{repository} holds no model {name[:80]!r}; it holds {known}. Name another --repository."
    )


def check_name(name: str, repository: Path) -> None:
    """Refuse a name that is unsafe, or whose folders belong to another model.

    Raises:
        InputError: says which rule, and what stands in the way.
    """
    if not SAFE_NAME.fullmatch(name) or ".." in name:
        raise InputError(
            f"model name {name[:80]!r} is not usable: 1 to 64 letters, digits, spaces or _ . @ / - "
            "are, beginning with a letter or digit and without '..'."
        )
    folders = (
        *tower_folders(repository, name),
        tokenizer_folder(repository, name),
        hidden_folder(repository, name),
        *(repository / each for each in folder_names(name)),
    )
    for folder in folders:
        if not os.path.lexists(folder):
            continue
        owner = find_owner(folder)
        if owner != name:
            holds = "no clip_rt model" if owner is None else f"the model {owner!r}"
            raise InputError(
                f"{str(folder)!r} holds {holds}, and {name!r} would be served as {folder.name} "
                "too. Choose another --name, or remove that folder."
            )


def find_owner(folder: Path) -> str | None:
    """Return the name of the model whose folder it is; None where it is none of ours."""
    return manifest.model if (manifest := find_manifest(folder)) else None
