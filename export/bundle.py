"""An exported model as one file, to carry to a machine without a network and check there.

    python -m export.bundle pack --name shop-v3 --repository models --file shop-v3.tar
    python -m export.bundle verify --file shop-v3.tar
    python -m export.bundle unpack --file shop-v3.tar --repository models

An uncompressed tar: bundle.json with the size and sha256 of every other file, then each tower's
config.pbtxt and weights, those of hidden states of texts and its own tokenizer.json if it has them,
the parity report, and the vocabulary and prompt templates that the client at the other end must
share. The same model gives
the same bytes. No code travels: `unpack` publishes with that of the clip_rt installed there.
Whatever does not match is refused before the repository is touched. Checksums find damage; against
forgery compare `sha256sum` of the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import tyro
from google.protobuf import text_format
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

import clip_rt
from clip_rt.errors import ContractError, InputError
from clip_rt.specs import TOKENIZER_FILE, Tower
from clip_rt.wire.manifest import Manifest
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export.console import console, mib, print_next
from export.model_folders import check_known, hidden_folder, tokenizer_folder, tower_folders
from export.models import served_version
from export.repository import RELOAD, publish
from export.triton_config import (
    Serving,
    read_config,
    read_hidden_width,
    read_manifest,
    read_serving,
)
from export.version_folder import CONFIG, REPORT, list_weights

INDEX = "bundle.json"
FORMAT, HIDDEN_FORMAT = 1, 2
"""Raised when an older clip_rt could not read what this one writes, as hidden states of texts."""
TOWERS: tuple[Tower, Tower] = ("image", "text")
HIDDEN = "text_hidden"
VOCABULARY, TEMPLATES = "bpe_simple_vocab_16e6.txt.gz", "prompt_templates.json"
DATA = Path(clip_rt.__file__).with_name("inputs") / "data"
MAX_INDEX_BYTES = 2**20
_MEMBER = re.compile(
    r"(image|text|text_hidden)/"
    r"(config\.pbtxt|model\.(onnx|onnx\.data|xml|bin|plan)|model-\d+\.\d+\.plan)"
    rf"|{re.escape(TOKENIZER_FILE)}|{re.escape(REPORT)}|{re.escape(VOCABULARY)}|{re.escape(TEMPLATES)}"
)
"""Every name a bundle may hold; nothing else is written anywhere."""
_COPY_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What a verified bundle holds."""

    manifest: Manifest
    serving: Serving
    report: dict[str, Any] | None
    """The parity report of the export."""
    files: dict[Tower, dict[str, Path]]
    """Weights of each tower by their names in a version's folder."""
    packed_by: str
    """clip_rt's version there."""
    tokenizer_file: bytes | None = None
    """The tokenizer.json that the manifest names; None where it is OpenAI's."""
    hidden: dict[str, Path] | None = None
    """Weights of the hidden states of texts; None where none are served."""
    hidden_width: int = 0
    warnings: tuple[str, ...] = ()


def pack(repository: str | Path, name: str, file: str | Path) -> Bundle:
    """Write the version that is served of a model into one file, and read it back.

    Raises:
        InputError: there is no such model, its towers differ, or `file` exists.
        OSError: the disk is full, for example; there is no `file` then.
    """
    repository, file = Path(repository), Path(file)
    if os.path.lexists(file):
        raise InputError(f"{file} exists. Choose another --file, or remove it.")
    if not file.absolute().parent.is_dir():
        raise InputError(f"there is no folder {file.parent} to write {file.name} into.")
    check_known(repository, name)
    members = {VOCABULARY: DATA / VOCABULARY, TEMPLATES: DATA / TEMPLATES}
    for tower, folder in zip(TOWERS, tower_folders(repository, name), strict=True):
        version = folder / str(served_version(folder))
        members[f"{tower}/{CONFIG}"] = folder / CONFIG
        members |= {f"{tower}/{path.name}": path for path in list_weights(version)}
        if (version / REPORT).is_file():
            members[REPORT] = version / REPORT
    tokenizer = tokenizer_folder(repository, name)
    if read_manifest(tower_folders(repository, name)[1]).tokenization.kind == TOKENIZER_FILE:
        members[TOKENIZER_FILE] = tokenizer / str(served_version(tokenizer)) / TOKENIZER_FILE
    states = hidden_folder(repository, name)
    text = tower_folders(repository, name)[1]
    # Those of an earlier version are refused by clients, and stay here.
    has_hidden = (states / CONFIG).is_file() and read_manifest(states) == read_manifest(text)
    if has_hidden:
        members[f"{HIDDEN}/{CONFIG}"] = states / CONFIG
        for path in list_weights(states / str(served_version(states))):
            members[f"{HIDDEN}/{path.name}"] = path
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with _progress("hash", members.values()) as progress:
            facts: dict[str, dict[str, Any]] = {}
            for member, path in sorted(members.items()):
                with progress.open(path, "rb", task_id=progress.task_ids[0]) as source:
                    facts[member] = {"size": path.stat().st_size, "sha256": _copy(source)}
        written = HIDDEN_FORMAT if has_hidden else FORMAT
        index = {"format": written, "clip_rt": clip_rt.__version__, "files": facts}
        with (
            _progress("write", members.values()) as progress,
            partial.open("xb") as raw,
        ):
            with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                body = json.dumps(index, indent=2).encode()
                tar.addfile(_header(INDEX, len(body)), io.BytesIO(body))
                for member, path in sorted(members.items()):
                    with progress.open(path, "rb", task_id=progress.task_ids[0]) as source:
                        tar.addfile(_header(member, facts[member]["size"]), source)
            raw.flush()
            os.fsync(raw.fileno())
        # What arrives is what was seen to be whole, and of one model, here.
        bundle = verify(partial)
        os.link(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return bundle


def verify(file: str | Path) -> Bundle:
    """Check everything in a bundle, against itself and against the clip_rt installed here.

    Returns:
        What it holds; the weights are gone again.

    Raises:
        InputError: damaged, changed, or of another clip_rt's format or vocabulary; says where.
    """
    with tempfile.TemporaryDirectory(prefix="clip_rt-bundle-") as folder:
        return _extract(Path(file), Path(folder))


def unpack(file: str | Path, repository: str | Path) -> tuple[Bundle, tuple[Path, Path]]:
    """Verify a bundle and publish its model as the next version in a repository.

    Returns:
        What it held, and the folders of the image and the text model.

    Raises:
        InputError: see `verify` and `repository.publish`; the repository is as it was.
    """
    repository = Path(repository)
    parent = next(each for each in repository.resolve().parents if each.is_dir())
    # Weights are large, and /tmp is often memory.
    beside = parent if os.access(parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".clip_rt-unpack-", dir=beside) as folder:
        bundle = _extract(Path(file), Path(folder))
        folders = publish(
            repository,
            bundle.manifest,
            image=bundle.files["image"],
            text=bundle.files["text"],
            serving=bundle.serving,
            report=bundle.report,
            tokenizer_file=bundle.tokenizer_file,
            hidden=bundle.hidden,
            hidden_width=bundle.hidden_width,
        )
    return bundle, folders


def _extract(file: Path, folder: Path) -> Bundle:
    """Copy what the index lists into a folder, and check all of it."""
    if not file.is_file():
        raise InputError(f"there is no file {file}.")
    try:
        with _progress("verify", [file]) as progress, file.open("rb") as raw:
            tracked = progress.wrap_file(raw, task_id=progress.task_ids[0])
            with tarfile.open(fileobj=tracked, mode="r|") as tar:
                index = _read_index(tar, file)
                found = dict(_copy_members(tar, index["files"], folder, file))
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{file} is damaged or no bundle: {error}.") from error
    missing = sorted(set(index["files"]) - set(found))
    if missing:
        raise InputError(f"{file} was cut off: {missing[0]} is missing. Carry it over again.")
    return _check_contents(found, str(index["clip_rt"])[:40], file)


def _read_index(tar: tarfile.TarFile, file: Path) -> dict[str, Any]:
    first = tar.next()
    if first is None or first.name != INDEX or first.type != tarfile.REGTYPE:
        raise InputError(f"{file} is no bundle: it does not begin with {INDEX}.")
    if first.size > MAX_INDEX_BYTES:
        raise InputError(
            f"{file}: {INDEX} has {first.size} bytes; at most {MAX_INDEX_BYTES} do, so this is "
            "no bundle of clip_rt."
        )
    source = tar.extractfile(first)
    assert source is not None
    try:
        index = json.loads(source.read())
        names = sorted(index["files"])
        for each in names:
            facts = index["files"][each]
            if type(facts["size"]) is not int or type(facts["sha256"]) is not str:
                raise TypeError(each)
        given, packed_by = index["format"], str(index["clip_rt"])[:40]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: {INDEX} is not what clip_rt writes: {error!r}.") from error
    if given not in (FORMAT, HIDDEN_FORMAT):
        raise InputError(
            f"{file} has format {given!r:.40}, written by clip_rt {packed_by!r}; this is "
            f"{clip_rt.__version__}, which reads {FORMAT} and {HIDDEN_FORMAT}. Install that "
            "clip_rt here."
        )
    for each in names:
        if not _MEMBER.fullmatch(each):
            raise InputError(f"{file}: {INDEX} lists {each[:80]!r}, which no bundle has.")
    return dict(index)


def _copy_members(
    tar: tarfile.TarFile, files: dict[str, dict[str, Any]], folder: Path, file: Path
) -> Iterator[tuple[str, Path]]:
    """Yield each listed file by its name, copied and found to be what the index says."""
    seen: set[str] = set()
    while (member := tar.next()) is not None:
        name = member.name
        if member.type != tarfile.REGTYPE or name not in files or name in seen:
            raise InputError(
                f"{file} holds {name[:80]!r} which {INDEX} does not list, lists once, or lists as "
                "a regular file. It was changed; take the one that was packed."
            )
        seen.add(name)
        if member.size != files[name]["size"]:
            raise InputError(
                f"{file}: {name} has {member.size} bytes, and {INDEX} says {files[name]['size']}."
            )
        source = tar.extractfile(member)
        assert source is not None
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        with target.open("xb") as copy:
            digest = _copy(source, copy)
        if digest != files[name]["sha256"]:
            raise InputError(
                f"{file}: {name} has sha256 {digest}, and {INDEX} says "
                f"{files[name]['sha256'][:64]!r}. It was damaged or changed; carry it over again."
            )
        yield name, target


def _check_contents(found: dict[str, Path], packed_by: str, file: Path) -> Bundle:
    """Hold files that are whole against each other, and against this clip_rt."""
    for name in (VOCABULARY, TEMPLATES, *(f"{tower}/{CONFIG}" for tower in TOWERS)):
        if name not in found:
            raise InputError(f"{file} has no {name}. Pack the model again.")
    folders = {tower: found[f"{tower}/{CONFIG}"].parent for tower in TOWERS}
    files: dict[Tower, dict[str, Path]] = {}
    manifests: dict[Tower, Manifest] = {}
    servings: dict[Tower, Serving] = {}
    for tower, inside in folders.items():
        try:
            manifests[tower] = read_manifest(inside)
            servings[tower] = read_serving(read_config(inside))
            files[tower] = {path.name: path for path in list_weights(inside)}
        except (ContractError, text_format.ParseError, ValueError, RecursionError) as error:
            raise InputError(f"{file}: {tower}/{CONFIG}: {str(error)[:500]}") from error
    try:
        report = json.loads(found[REPORT].read_bytes()) if REPORT in found else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: {REPORT} is no JSON: {error}.") from error
    if manifests["image"] != manifests["text"] or servings["image"] != servings["text"]:
        raise InputError(f"{file}: its two towers are of two models. Export and pack again.")
    if not isinstance(report, dict | None):
        raise InputError(f"{file}: {REPORT} holds no object.")
    if found[VOCABULARY].read_bytes() != (DATA / VOCABULARY).read_bytes():
        raise InputError(
            f"{file}: its vocabulary is not that of clip_rt {clip_rt.__version__} here, so texts "
            f"would become other tokens. Install clip_rt {packed_by!r} here."
        )
    tokenization = manifests["text"].tokenization
    content = found[TOKENIZER_FILE].read_bytes() if TOKENIZER_FILE in found else None
    named = tokenization.sha256 if tokenization.kind == TOKENIZER_FILE else None
    if (None if content is None else hashlib.sha256(content).hexdigest()) != named:
        raise InputError(
            f"{file}: its {TOKENIZER_FILE} is not what the manifest names. Pack again."
        )
    hidden, hidden_width = _check_hidden(found, manifests["text"], file)
    warnings: list[str] = []
    if found[TEMPLATES].read_bytes() != (DATA / TEMPLATES).read_bytes():
        warnings.append(
            f"the prompt templates of clip_rt {packed_by!r} are not those of "
            f"{clip_rt.__version__} here: named template sets may answer differently"
        )
    return Bundle(
        manifest=manifests["image"],
        serving=servings["image"],
        report=report,
        files=files,
        packed_by=packed_by,
        tokenizer_file=content,
        hidden=hidden,
        hidden_width=hidden_width,
        warnings=tuple(warnings),
    )


def _check_hidden(
    found: dict[str, Path], manifest: Manifest, file: Path
) -> tuple[dict[str, Path] | None, int]:
    """Return the weights of hidden states and their width; None and 0 where there are none."""
    config = found.get(f"{HIDDEN}/{CONFIG}")
    if config is None:
        return None, 0
    try:
        own, width = read_manifest(config.parent), read_hidden_width(config.parent)
        files = {path.name: path for path in list_weights(config.parent)}
    except (ContractError, text_format.ParseError, ValueError, IndexError, RecursionError) as error:
        raise InputError(f"{file}: {HIDDEN}/{CONFIG}: {str(error)[:500]}") from error
    if own != manifest or width < 1:
        raise InputError(f"{file}: its hidden states are of another model. Export and pack again.")
    return files, width


def _header(name: str, size_bytes: int) -> tarfile.TarInfo:
    # Mode, owner and time are what TarInfo begins with: the same everywhere.
    header = tarfile.TarInfo(name)
    header.size = size_bytes
    return header


def _copy(source: IO[bytes], target: IO[bytes] | None = None) -> str:
    """Read to the end, into a file where there is one, and return the sha256."""
    digest = hashlib.sha256()
    while block := source.read(_COPY_BYTES):
        digest.update(block)
        if target is not None:
            target.write(block)
    return digest.hexdigest()


@contextmanager
def _progress(title: str, paths: Iterable[Path]) -> Iterator[Progress]:
    """Show one bar over all bytes of some files."""
    with Progress(
        *(TextColumn("{task.description}"), BarColumn(), DownloadColumn()),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        progress.add_task(title, total=sum(path.stat().st_size for path in paths))
        yield progress


def _show(bundle: Bundle, what: str) -> None:
    manifest = bundle.manifest
    console.print(
        f"{what}: {manifest.model}, {manifest.architecture}, {manifest.precision}, weights "
        f"{manifest.fingerprint[:12]}, packed by clip_rt {bundle.packed_by!r}",
        markup=False,
        soft_wrap=True,
    )
    for warning in bundle.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def main_pack(*, name: str, file: Path, repository: Path = Path("model_repository")) -> None:
    """Write the version that is served of a model into one file.

    Args:
        name: Served name of the model.
        file: The bundle to write.
        repository: Triton model repository.
    """
    _show(pack(repository, name, file), f"packed {file}, {mib(file)}")
    there = f"python -m export.bundle unpack --file {shlex.quote(file.name)} --repository models"
    print_next("where it is carried to", there)


def main_verify(*, file: Path) -> None:
    """Check everything in a bundle.

    Args:
        file: The bundle.
    """
    _show(verify(file), f"{file} is whole")


def main_unpack(*, file: Path, repository: Path = Path("model_repository")) -> None:
    """Verify a bundle and publish its model.

    Args:
        file: The bundle.
        repository: Triton model repository; made when it does not exist.
    """
    bundle, folders = unpack(file, repository)
    _show(bundle, f"published {folders[0]} and {folders[1]}. {RELOAD}")
    where = shlex.quote(str(repository))
    print_next("serve it", f"python -m clip_rt serve --repository {where}")


if __name__ == "__main__":
    with command():
        tyro.extras.subcommand_cli_from_dict(
            {"pack": main_pack, "verify": main_verify, "unpack": main_unpack},
            prog=program("export.bundle"),
            description=__doc__,
        )
