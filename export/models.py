"""Which models a repository holds, in which versions; needs nothing that the client does not.

python -m export.models                          # $CLIP_RT_REPOSITORY, or the bundled model
python -m export.models --repository models
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from google.protobuf import text_format

from clip_rt.embedded.bundled import choose_repository
from clip_rt.errors import ContractError, InputError
from clip_rt.wire.manifest import Manifest
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export.triton_config import read_config, read_manifest

TITLES = ("model", "architecture", "precision", "backend", "served", "kept", "weights")


@dataclass(frozen=True, kw_only=True)
class HeldModel:
    """A model of a repository."""

    manifest: Manifest
    backend: str
    """Triton's, which runs it."""
    served: int
    """Version that Triton loads."""
    kept: tuple[int, ...]
    """Versions that can be served, the oldest first."""

    @property
    def cells(self) -> tuple[str, ...]:
        """What a table shows of it, under `TITLES`."""
        manifest = self.manifest
        return (
            manifest.model,
            manifest.architecture,
            manifest.precision,
            self.backend,
            str(self.served),
            ", ".join(map(str, self.kept)),
            manifest.fingerprint[:12],
        )


def list_models(repository: Path) -> Iterator[HeldModel]:
    """Yield the models of a repository, in the order of their folders' names.

    Raises:
        InputError: there is no such folder.
    """
    if not repository.is_dir():
        raise InputError(f"there is no folder {repository}; name one with --repository.")
    for folder in sorted(repository.glob("*_image")):
        manifest = find_manifest(folder)
        if manifest is not None:
            yield HeldModel(
                manifest=manifest,
                backend=read_config(folder).backend,
                served=served_version(folder),
                kept=tuple(sorted(list_versions(folder))),
            )


def find_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a model's folder; None where no model of ours lies there."""
    try:
        return read_manifest(folder)
    except (OSError, UnicodeDecodeError, text_format.ParseError, ContractError):
        return None


def list_versions(folder: Path) -> list[int]:
    """Return the versions in a model's folder, the newest first; none where there is no folder."""
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def served_version(folder: Path) -> int:
    """Return the version that Triton loads of a model's folder."""
    versions = read_config(folder).version_policy.specific.versions
    return int(versions[0]) if versions else max(list_versions(folder), default=0)


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """Where to look."""

    repository: Path | None = None
    """Triton model repository; without it $CLIP_RT_REPOSITORY, else the bundled model's."""


def main(config: ModelsConfig) -> None:
    """Print a line for each model."""
    repository = choose_repository(config.repository)
    rows = [model.cells for model in list_models(repository)]
    if not rows:
        raise InputError(
            f"{repository} holds no model; export one into it, or name another --repository."
        )
    _print_table((TITLES, *rows))


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns as wide as what is in them, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


if __name__ == "__main__":
    with command():
        main(tyro.cli(ModelsConfig, prog=program("export.models"), description=__doc__))
