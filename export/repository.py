"""Two exported towers into a model repository that Triton loads, both or neither; and back.

    python -m export.repository                                  # what is there
    python -m export.repository --name shop-v3 --rollback        # serve the version before
    python -m export.repository --name shop-v3 --version 4

A manifest and one file per tower go in; `<slug>_image/` and `<slug>_text/` come out, each with its
config.pbtxt, rendered from the manifest, and a numbered folder for each version that is kept.
Nothing is written in place: a server that starts meanwhile sees the old model or the new one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro
from google.protobuf import text_format
from rich.table import Table

from clip_rt.errors import ContractError, InputError
from clip_rt.manifest import Manifest
from clip_rt.specs import image_model, text_model
from export.console import command, console
from export.storage import external_files
from export.triton_config import (
    Backend,
    ModelConfig,
    Serving,
    Tower,
    read_config,
    read_manifest,
    render_config,
)

CONFIG, REPORT = "config.pbtxt", "parity.json"
MODEL_FILE: dict[Backend, tuple[str, ...]] = {
    "python": ("model.onnx", "model.xml"),
    "onnxruntime": ("model.onnx",),
    "tensorrt": ("model.plan",),
}
"""What each backend can run, by its file's name."""
PYTHON_MODEL = Path(__file__).with_name("python_model.py")
"""What the python backend runs; copied verbatim into the version folder."""
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@/ -]{0,63}")
KEEP_VERSIONS = 2
"""Versions that stay in a repository: the one that is served and the one to go back to."""


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
    for served in (image_model(name), text_model(name)):
        folder = repository / served
        if not os.path.lexists(folder):
            continue
        owner = _owner(folder)
        if owner != name:
            holds = "no clip_rt model" if owner is None else f"the model {owner!r}"
            raise InputError(
                f"{str(folder)!r} holds {holds}, and {name!r} would be served as {served} too. "
                "Choose another --name, or remove that folder."
            )


def publish(
    repository: str | Path,
    manifest: Manifest,
    *,
    image: Path,
    text: Path,
    serving: Serving | None = None,
    report: Mapping[str, object] | None = None,
    keep_versions: int = KEEP_VERSIONS,
) -> tuple[Path, Path]:
    """Put both towers into a repository as the next version of their model, and serve that one.

    Both folders are complete before either is moved into place, and when the second move fails the
    first is undone.

    Args:
        repository: Made when it does not exist.
        manifest: Its `model` names the two folders.
        image: ONNX file, with its weights where they lie beside it, or engine of the image tower.
        text: The same of the text tower; both are copied.
        serving: Defaults to `Serving()`.
        report: The parity report, kept in the version's folder as parity.json.
        keep_versions: How many to keep, this one included.

    Returns:
        The folders of the image and the text model.

    Raises:
        InputError: see `check_name` and `storage.external_files`.
    """
    repository, serving = Path(repository), serving or Serving()
    check_name(manifest.model, repository)
    if keep_versions < 1:
        raise InputError(f"keep_versions is {keep_versions}; it must be at least 1.")
    repository.mkdir(parents=True, exist_ok=True)
    targets = _folders(repository, manifest.model)
    version = 1 + max((each for target in targets for each in list_versions(target)), default=0)
    towers: tuple[tuple[Tower, Path], ...] = (("image", image), ("text", text))
    with tempfile.TemporaryDirectory(prefix=".clip_rt-", dir=_staging(repository)) as staging:
        moves = []
        for (tower, file), target in zip(towers, targets, strict=True):
            staged = Path(staging) / target.name
            config = render_config(manifest, tower, serving, version=version)
            _stage(staged, version, config, file, report)
            for earlier in list_versions(target)[: keep_versions - 1]:
                shutil.copytree(target / str(earlier), staged / str(earlier), copy_function=_link)
            moves.append((staged, target))
        _move(moves, aside=Path(staging) / "replaced")
    return targets


def switch_version(repository: str | Path, name: str, version: int | None = None) -> int:
    """Serve another version of a model that is still in the repository.

    Args:
        repository: The model repository.
        name: Served name.
        version: Which; None is the newest before the one that is served now.

    Returns:
        The version that is served now; a running server notices when it reloads the model.

    Raises:
        InputError: there is no such model or version; lists those there are.
    """
    repository = Path(repository)
    targets = _folders(repository, name)
    for target in targets:
        if _owner(target) != name:
            raise InputError(f"{repository} holds no model {name[:80]!r} in {target.name}.")
    kept = set.intersection(*(set(list_versions(target)) for target in targets))
    now = served_version(targets[0])
    choice = version or max((each for each in kept if each < now), default=0)
    configs = [target / str(choice) / CONFIG for target in targets]
    if choice not in kept or not all(config.is_file() for config in configs):
        raise InputError(
            f"{name!r} has no version {version or f'before {now}'} to go back to in {repository}; "
            f"it has {', '.join(map(str, sorted(kept)))}, and serves {now}."
        )
    with tempfile.TemporaryDirectory(prefix=".clip_rt-", dir=_staging(repository)) as staging:
        moves = []
        for target, config in zip(targets, configs, strict=True):
            staged = Path(staging) / target.name
            shutil.copytree(target, staged, copy_function=_link)
            (staged / CONFIG).unlink()
            shutil.copyfile(config, staged / CONFIG)
            moves.append((staged, target))
        _move(moves, aside=Path(staging) / "replaced")
    return choice


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


def _folders(repository: Path, name: str) -> tuple[Path, Path]:
    return repository / image_model(name), repository / text_model(name)


def _link(source: str, target: str) -> None:
    """Let a file be in two folders at once where the file system can; copy it elsewhere."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _owner(folder: Path) -> str | None:
    try:
        return read_manifest(folder).model
    except (OSError, UnicodeDecodeError, text_format.ParseError, ContractError):
        return None


def _staging(repository: Path) -> Path:
    """Choose a folder on the file system of the repository, and outside it where possible.

    A server that starts while a staging folder is in its repository fails to load it as a model.
    """
    parent = repository.resolve().parent
    same = parent.stat().st_dev == repository.stat().st_dev and os.access(parent, os.W_OK)
    return parent if same else repository


def _stage(
    folder: Path,
    version: int,
    config: ModelConfig,
    file: Path,
    report: Mapping[str, object] | None,
) -> None:
    """Write a model's folder with one version in it."""
    inside = folder / str(version)
    inside.mkdir(parents=True)
    text = text_format.MessageToString(config, as_utf8=True)
    # The version has one of its own, to go back to.
    for path in (folder / CONFIG, inside / CONFIG):
        path.write_text(text, "utf-8")
    if report is not None:
        (inside / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    backend: Backend = config.backend
    first, *others = MODEL_FILE[backend]
    target = inside / next((name for name in others if Path(name).suffix == file.suffix), first)
    weights: list[Path] = []
    if target.suffix == ".onnx":
        weights = external_files(file)
    elif target.suffix == ".xml":
        weights = [file.with_suffix(".bin")]
    if weights and file.name != target.name:
        raise InputError(f"{file} keeps its weights beside it, so it must be called {target.name}.")
    shutil.copyfile(file, target)
    for each in weights:
        shutil.copyfile(each, inside / each.name)
    if config.backend == "python":
        shutil.copyfile(PYTHON_MODEL, inside / "model.py")


def _move(moves: list[tuple[Path, Path]], *, aside: Path) -> None:
    """Move staged folders into place, all or none; what they replace goes to `aside`."""
    aside.mkdir()
    done: list[tuple[Path, Path | None]] = []
    try:
        for staged, target in moves:
            replaced = None
            if target.exists():
                replaced = aside / target.name
                os.rename(target, replaced)
            done.append((target, replaced))
            os.rename(staged, target)
    except OSError:
        for target, replaced in reversed(done):
            if target.exists():
                os.rename(target, aside / f"{target.name}-undone")
            if replaced is not None:
                os.rename(replaced, target)
        raise


@dataclass(frozen=True, kw_only=True)
class RepositoryConfig:
    """What to look at or change."""

    repository: Path = Path("model_repository")
    """Triton model repository."""
    name: str | None = None
    """Served name of the model to change."""
    rollback: bool = False
    """Serve the version before the one that is served now."""
    version: int | None = None
    """Serve this version."""


def main(config: RepositoryConfig) -> None:
    """Do what `config` says, and show what is there."""
    if config.rollback or config.version is not None:
        if config.name is None or (config.rollback and config.version is not None):
            raise InputError("pass --name with one of --rollback and --version.")
        now = switch_version(config.repository, config.name, config.version)
        console.print(f"{config.name} is served in version {now}", markup=False)
    if not config.repository.is_dir():
        raise InputError(f"there is no folder {config.repository}.")
    table = Table("model", "architecture", "precision", "backend", "served", "kept", "weights")
    for folder in sorted(config.repository.glob("*_image")):
        if _owner(folder) is None:
            continue
        manifest = read_manifest(folder)
        table.add_row(
            manifest.model,
            manifest.architecture,
            manifest.precision,
            read_config(folder).backend,
            str(served_version(folder)),
            ", ".join(map(str, sorted(list_versions(folder)))),
            manifest.fingerprint[:12],
        )
    console.print(table)


if __name__ == "__main__":
    with command():
        main(tyro.cli(RepositoryConfig, description=__doc__))
