"""Two exported towers into a model repository that Triton loads, both or neither; and back.

    python -m export.repository                                  # what is there
    python -m export.repository --name shop-v3 --rollback        # serve the version before
    python -m export.repository --name shop-v3 --version 4
    python -m export.repository --name shop-v3 --ensembles       # take JPEGs and strings too
    python -m export.repository --name shop-v3 --ensembles --max-pixels 110000000
    python -m export.repository --name shop-v3 --backend onnxruntime --device gpu --num-instances 2
    python -m export.repository --name shop-v3 --runtime onnxruntime

A manifest and one file per tower go in; `<slug>_image/` and `<slug>_text/` come out, and
`<slug>_text_hidden/` where hidden states of texts are served too, each with its config.pbtxt,
rendered from the manifest, and a numbered folder for each version that is kept.
Nothing is written in place. A version's folder is complete when it gets its name, and it is served
from the moment its config.pbtxt replaces the one before. Whatever ends an export half-way, Ctrl-C
included, what was served stays; only a kill between the two towers leaves one of each version,
which a client refuses (`clip_rt.requests.connection`) and the next export puts right.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path

import tyro
from google.protobuf import text_format
from rich.table import Column, Table

from clip_rt.errors import InputError
from clip_rt.inputs.decoding import Limits
from clip_rt.specs import Tower
from clip_rt.wire.manifest import Manifest
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export.console import console
from export.ensembles import folder_names, read_limits, render_ensembles, stage_ensembles
from export.model_folders import (
    check_known,
    check_name,
    hidden_folder,
    tokenizer_folder,
    tower_folders,
)
from export.models import TITLES, list_models, list_versions, served_version
from export.staging import alone, staging_folder
from export.triton_config import (
    Backend,
    Device,
    ModelConfig,
    Runtime,
    Serving,
    read_config,
    read_hidden_width,
    read_manifest,
    read_serving,
    render_config,
    render_hidden_config,
    render_tokenizer_config,
)
from export.version_folder import (
    CONFIG,
    MODEL_FILE,
    copy_python_model,
    find_engines,
    name_files,
    write_tokenizer_version,
    write_version,
)

KEEP_VERSIONS = 2
"""Versions that stay in a repository: the one that is served and the one to go back to."""
RELOAD = (
    "Servers that run go on with what they have loaded, until they are told: `python -m clip_rt "
    "serve` by `python -m clip_rt reload --port PORT`, the server of a client's own by "
    "Client.reload(), any other Triton by its restart."
)
"""What is to be done after a repository has changed."""


def tell_published(repository: Path, name: str) -> None:
    """Print which version of a model is published, and how running servers come to it."""
    version = served_version(tower_folders(repository, name)[0])
    text = f"{name} is published in version {version}. {RELOAD}"
    console.print(text, markup=False, soft_wrap=True)


def publish(
    repository: str | Path,
    manifest: Manifest,
    *,
    image: Path | Mapping[str, Path],
    text: Path | Mapping[str, Path],
    serving: Serving | None = None,
    report: Mapping[str, object] | None = None,
    keep_versions: int = KEEP_VERSIONS,
    compute_capability: str | None = None,
    join: bool = False,
    tokenizer_file: bytes | None = None,
    hidden: Path | Mapping[str, Path] | None = None,
    hidden_width: int = 0,
) -> tuple[Path, Path]:
    """Put both towers into a repository as the next version of their model, and serve that one.

    Args:
        repository: Made when it does not exist.
        manifest: Its `model` names the two folders.
        image: ONNX file, with its weights where they lie beside it, or engine of the image tower;
            or all its files, by their names in a version's folder.
        text: The same of the text tower; both are copied.
        serving: Defaults to `Serving()`.
        report: The parity report, kept in the version's folder as parity.json.
        keep_versions: How many to keep, this one included.
        compute_capability: Of the GPUs that the engines are for, such as 8.9. Triton gives each GPU
            its own of a version's engines.
        join: Take the served version's engines for other GPUs along.
        tokenizer_file: The tokenizer.json that the manifest names, for clients that lack it.
        hidden: The same of the hidden states of texts, in ONNX; None serves none.
        hidden_width: Of the text tower, where there are some.

    Returns:
        The folders of the image and the text model.

    Raises:
        InputError: see `check_name` and `storage.external_files`; or the engines to join are of
            other weights or another TensorRT.
    """
    repository, serving = Path(repository), serving or Serving()
    check_name(manifest.model, repository)
    if keep_versions < 1:
        raise InputError(f"keep_versions is {keep_versions}; it must be at least 1.")
    if repository.exists() and not repository.is_dir():
        raise InputError(f"{repository} is no folder; name another --repository.")
    repository.mkdir(parents=True, exist_ok=True)
    targets = tower_folders(repository, manifest.model)
    towers: tuple[tuple[Tower, Path | Mapping[str, Path]], ...] = (("image", image), ("text", text))
    with alone(repository), staging_folder(repository) as staging:
        # Again, now that nobody else can take the folders.
        check_name(manifest.model, repository)
        served = [served_version(target) for target in targets if target.exists()]
        tokenizer = tokenizer_folder(repository, manifest.model)
        states = hidden_folder(repository, manifest.model)
        followers = tokenizer, states
        used = [each for target in (*targets, *followers) for each in list_versions(target)]
        version = 1 + max(used, default=0)
        for (tower, given), target in zip(towers, targets, strict=True):
            files = name_files(given, serving.backend, compute_capability)
            if join and target.exists():
                files = _engines_to_join(target, manifest) | files
            config = render_config(
                manifest, tower, serving, version=version, engines=find_engines(files)
            )
            write_version(staging / target.name, version, config, files, report)
        published: tuple[Path, ...] = targets
        if tokenizer_file is not None:
            published = (*published, tokenizer)
            config = render_tokenizer_config(manifest, version=version)
            write_tokenizer_version(staging / tokenizer.name, version, config, tokenizer_file)
        if hidden is not None:
            published = (*published, states)
            config = render_hidden_config(manifest, hidden_width, serving, version=version)
            files = name_files(hidden, serving.backend)
            write_version(staging / states.name, version, config, files, report)
        with ExitStack() as undo:
            for target in published:
                staged = staging / target.name
                if not target.exists():
                    undo.callback(shutil.rmtree, target, ignore_errors=True)
                    os.rename(staged, target)
                    continue
                undo.callback(_remove_version, target, version, staging)
                os.rename(staged / str(version), target / str(version))
            _serve(published, version, staging, undo)
            undo.pop_all()
        for target in targets:
            # The one before goes back to what was served, which need not be the newest.
            earlier = [each for each in list_versions(target) if each != version]
            earlier.sort(key=lambda each: (each in served, each), reverse=True)
            for each in earlier[keep_versions - 1 :]:
                _remove_version(target, each, staging)
        for follower in followers:
            _prune(follower, targets, staging)
    return targets


def switch_version(repository: str | Path, name: str, version: int | None = None) -> int:
    """Serve another version of a model that is still in the repository.

    Args:
        repository: The model repository.
        name: Served name.
        version: Which; None is the newest before the one that is served now.

    Returns:
        The version; a server that runs goes on with its own, see `RELOAD`.

    Raises:
        InputError: there is no such model or version; lists those there are.
    """
    repository = Path(repository)
    targets = tower_folders(repository, name)
    check_known(repository, name)
    with alone(repository), staging_folder(repository) as staging:
        kept = set.intersection(*(_switchable(target) for target in targets))
        now = served_version(targets[0])
        choice = version
        if choice is None:
            choice = max((each for each in kept if each < now), default=0)
        if choice not in kept:
            raise InputError(
                f"{name!r} has no version {f'before {now}' if version is None else version} to go "
                f"to in {repository}; it has {', '.join(map(str, sorted(kept))) or 'none'}, and "
                f"serves {now}."
            )
        beside = tokenizer_folder(repository, name), hidden_folder(repository, name)
        followers = tuple(each for each in beside if choice in _switchable(each))
        with ExitStack() as undo:
            _serve((*targets, *followers), choice, staging, undo)
            undo.pop_all()
    return choice


def configure(repository: str | Path, name: str, **settings: object) -> Serving:
    """Change how the version that is served of a model is served; nothing is exported anew.

    Args:
        repository: The model repository.
        name: Served name.
        settings: Fields of `Serving`; the others stay as they are.

    Returns:
        How a server serves it that starts or reloads from now on, see `RELOAD`.

    Raises:
        InputError: there is no such model, or the backend or the runtime cannot run its file.
    """
    repository = Path(repository)
    targets = tower_folders(repository, name)
    check_known(repository, name)
    with alone(repository), staging_folder(repository) as staging, ExitStack() as undo:
        serving = replace(read_serving(read_config(targets[0])), **settings)  # type: ignore[arg-type]
        version = served_version(targets[0])
        towers: tuple[Tower, Tower] = ("image", "text")
        for tower, target in zip(towers, targets, strict=True):
            inside = target / str(version)
            engines = find_engines(path.name for path in inside.iterdir())
            runnable = [*MODEL_FILE[serving.backend]]
            if serving.backend == "tensorrt":
                runnable += engines.values()
            if not any((inside / each).is_file() for each in runnable):
                raise InputError(
                    f"the {serving.backend} backend runs {' or '.join(MODEL_FILE[serving.backend])}"
                    f", and {inside} holds none. Export the model for that backend."
                )
            if serving.runtime == "onnxruntime" and not (inside / "model.onnx").is_file():
                raise InputError(
                    f"{inside} holds an INT8 model, which only OpenVINO runs: leave --runtime "
                    "auto, or export it in FP32."
                )
            if serving.backend == "python":
                copy_python_model(inside)
            config = render_config(
                read_manifest(target), tower, serving, version=version, engines=engines
            )
            _replace_config(inside, config, staging, undo)
        served: tuple[Path, ...] = targets
        states = hidden_folder(repository, name)
        if version in _switchable(states):
            inside = states / str(version)
            if serving.backend == "python":
                copy_python_model(inside)
            config = render_hidden_config(
                read_manifest(inside), read_hidden_width(inside), serving, version=version
            )
            _replace_config(inside, config, staging, undo)
            served = (*targets, states)
        _serve(served, version, staging, undo)
        undo.pop_all()
    return serving


def _replace_config(inside: Path, config: ModelConfig, staging: Path, undo: ExitStack) -> None:
    """Say otherwise how a version is served."""
    name = inside.parent.name
    before, after = staging / f"{name}-old", staging / f"{name}-new"
    shutil.copyfile(inside / CONFIG, before)
    after.write_text(text_format.MessageToString(config, as_utf8=True), "utf-8")
    undo.callback(os.replace, before, inside / CONFIG)
    os.replace(after, inside / CONFIG)


def add_ensembles(
    repository: str | Path,
    name: str,
    *,
    max_pixels: int | None = None,
    max_bytes: int | None = None,
) -> tuple[Path, ...]:
    """Put the ensembles of a model beside it, or renew them; see `export.ensembles`.

    They follow the model to other versions until their folders are removed.

    Args:
        repository: The model repository.
        name: Served name.
        max_pixels: Largest width x height of an image; None leaves it as it is.
        max_bytes: Largest encoded size of an image; the same.

    Returns:
        Their folders and those of their fronts.

    Raises:
        InputError: there is no such model, something else has one of their names, or a limit is
            none.
    """
    repository = Path(repository)
    targets = tower_folders(repository, name)
    check_name(name, repository)
    check_known(repository, name)
    folders = tuple(repository / each for each in folder_names(name))
    with alone(repository), staging_folder(repository) as staging, ExitStack() as undo:
        given = {"max_pixels": max_pixels, "max_bytes": max_bytes}
        limits = replace(
            _limits(targets[0], name),
            **{key: each for key, each in given.items() if each is not None},
        )
        stage_ensembles(staging, _render_ensembles(targets[0], limits))
        for folder in folders:
            if folder.exists():
                before = staging / f"{folder.name}-before"
                os.rename(folder, before)
                undo.callback(os.rename, before, folder)
            os.rename(staging / folder.name, folder)
            undo.callback(os.rename, folder, staging / f"{folder.name}-undone")
        undo.pop_all()
    return folders


def _limits(target: Path, name: str) -> Limits:
    """Return how large an image may be for the ensembles there are, or the defaults."""
    front = target.with_name(folder_names(name)[0])
    return read_limits(read_config(front)) if (front / CONFIG).is_file() else Limits()


def _render_ensembles(target: Path, limits: Limits) -> dict[str, ModelConfig]:
    size = read_config(target).max_batch_size
    return render_ensembles(read_manifest(target), max_batch_size=size, limits=limits)


def _switchable(folder: Path) -> set[int]:  # Versions that know how they are served.
    return {each for each in list_versions(folder) if (folder / str(each) / CONFIG).is_file()}


def _serve(targets: Sequence[Path], version: int, staging: Path, undo: ExitStack) -> None:
    """Let both towers, and what is beside them, serve a version by replacing their config.pbtxt.

    Their ensembles, where there are any, get theirs rendered anew.
    """
    for target in targets:
        before, after = staging / f"{target.name}-before", staging / f"{target.name}-after"
        shutil.copyfile(target / CONFIG, before)
        shutil.copyfile(target / str(version) / CONFIG, after)
        undo.callback(os.replace, before, target / CONFIG)
        os.replace(after, target / CONFIG)
    limits = _limits(targets[0], read_manifest(targets[0]).model)
    for name, config in _render_ensembles(targets[0], limits).items():
        path = targets[0].with_name(name) / CONFIG
        if path.exists():
            before, after = staging / f"{name}-before", staging / f"{name}-after"
            shutil.copyfile(path, before)
            after.write_text(text_format.MessageToString(config, as_utf8=True), "utf-8")
            undo.callback(os.replace, before, path)
            os.replace(after, path)


def _prune(follower: Path, targets: Sequence[Path], staging: Path) -> None:
    """Remove what was beside versions that are gone; with none left, the folder."""
    kept = {version for target in targets for version in list_versions(target)}
    versions = list_versions(follower)
    if versions and kept.isdisjoint(versions):
        os.rename(follower, staging / f"{follower.name}-removed")
        return
    for version in set(versions) - kept:
        _remove_version(follower, version, staging)


def _remove_version(target: Path, version: int, staging: Path) -> None:
    """Move a version that is not served out of the repository, as a whole; it ends with staging."""
    folder = target / str(version)
    if folder.exists() and served_version(target) != version:
        os.rename(folder, staging / f"{target.name}-{version}-removed")


def _engines_to_join(target: Path, manifest: Manifest) -> dict[str, Path]:
    """Return the served version's engines by name.

    Raises:
        InputError: they are not of the same model.
    """
    version, served = target / str(served_version(target)), read_manifest(target)
    if served != manifest:
        differing = [
            field.name
            for field in fields(Manifest)
            if field.compare and getattr(served, field.name) != getattr(manifest, field.name)
        ]
        raise InputError(
            f"the engines in {version} are of another model: {', '.join(differing)} differ. Export "
            "with the same weights, options and library versions, or without --join."
        )
    names = find_engines(path.name for path in version.iterdir())
    return {name: version / name for name in names.values()}


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
    ensembles: bool = False
    """Add ensembles that take encoded images and strings: <slug>_jpeg and <slug>_prompt."""
    max_pixels: int | None = None
    """For --ensembles: largest width x height of an image, 64,000,000 unless it was set before."""
    max_bytes: int | None = None
    """For --ensembles: largest encoded size of an image, 33,554,432 unless it was set before."""
    backend: Backend | None = None
    """Run it in another of Triton's backends; this and the following need no new export."""
    device: Device | None = None
    """Run it there."""
    runtime: Runtime | None = None
    """What runs it in the python backend on a processor; auto is what the server measures to be the
    faster."""
    num_instances: int | None = None
    """Copies of the model, per device."""
    max_batch_size: int | None = None
    """Largest request, and largest batch requests are joined into."""
    max_queue_delay_us: int | None = None
    """How long a request may wait for company when the model is idle."""
    max_queue_size: int | None = None
    """Waiting requests; the next one is refused at once. 0 is no bound."""
    queue_timeout_us: int | None = None
    """How long a request may wait before it is refused. 0 is for ever."""
    cuda_graph_batch_sizes: tuple[int, ...] | None = None
    """For tensorrt: batches that are launched as one CUDA graph."""

    @property
    def settings(self) -> dict[str, object]:
        """Fields of `Serving` to change."""
        given = {field.name: getattr(self, field.name, None) for field in fields(Serving)}
        return {name: value for name, value in given.items() if value is not None}


def main(config: RepositoryConfig) -> None:
    """Do what `config` says, and show what is there."""
    if (config.ensembles or config.settings) and config.name is None:
        raise InputError("pass --name too: which model is to change?")
    if not config.ensembles and (config.max_pixels, config.max_bytes) != (None, None):
        raise InputError("--max-pixels and --max-bytes are for --ensembles: pass that too.")
    is_switched = config.rollback or config.version is not None
    if is_switched and (config.name is None or (config.rollback and config.version is not None)):
        raise InputError("pass --name with one of --rollback and --version.")
    if config.settings:
        console.print(configure(config.repository, str(config.name), **config.settings))
        tell_published(config.repository, str(config.name))
    if config.ensembles:
        assert config.name is not None
        added = add_ensembles(
            config.repository,
            config.name,
            max_pixels=config.max_pixels,
            max_bytes=config.max_bytes,
        )
        said = f"added {', '.join(each.name for each in added)}. {RELOAD}"
        console.print(said, markup=False, soft_wrap=True)
    if is_switched:
        assert config.name is not None
        switch_version(config.repository, config.name, config.version)
        tell_published(config.repository, config.name)
    table = Table(*(Column(title, overflow="fold") for title in TITLES))
    for model in list_models(config.repository):
        table.add_row(*model.cells)
    console.print(table)


if __name__ == "__main__":
    with command():
        main(tyro.cli(RepositoryConfig, prog=program("export.repository"), description=__doc__))
