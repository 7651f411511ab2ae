"""`hf:owner/name[@revision]`, or a folder in the hub's layout, goes in; verified files come out.

A revision is pinned to its commit before anything is downloaded, and every file is compared with
the checksum the hub states for it. Without a network the local cache answers, or an error says what
to copy from a machine that has one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_rt.errors import CheckpointError
from training.weights.claims import (
    HUGGING_FACE_CONFIG,
    HUGGING_FACE_PREPROCESSOR,
    HUGGING_FACE_PROCESSOR,
    HUGGING_FACE_TOKENIZER,
    OPEN_CLIP_CONFIG,
    read_json,
)

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_log = logging.getLogger(__name__)

PREFIX = "hf:"
INDEX = "model.safetensors.index.json"
WEIGHTS = (
    *("open_clip_model.safetensors", "model.safetensors", INDEX),
    *("open_clip_pytorch_model.bin", "pytorch_model.bin"),
)
"""Files that hold weights, the preferred first."""
BY_TRANSFORMERS = ("model.safetensors", INDEX)
"""Those that transformers wrote, of a repository that may have both."""
CONFIGS = (
    *(OPEN_CLIP_CONFIG, HUGGING_FACE_CONFIG, HUGGING_FACE_PREPROCESSOR, HUGGING_FACE_PROCESSOR),
    HUGGING_FACE_TOKENIZER,
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    "tokenizer.model",
)
"""Files that say what the weights are, how they are fed, and with which tokens."""

OPENAI = {
    "RN50": "timm/resnet50_clip.openai",
    "RN101": "timm/resnet101_clip.openai",
    "RN50x4": "timm/resnet50x4_clip.openai",
    "RN50x16": "timm/resnet50x16_clip.openai",
    "RN50x64": "timm/resnet50x64_clip.openai",
    "ViT-B/32": "timm/vit_base_patch32_clip_224.openai",
    "ViT-B/16": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L/14": "timm/vit_large_patch14_clip_224.openai",
    "ViT-L/14@336px": "timm/vit_large_patch14_clip_336.openai",
}
"""Repository of OpenAI's weights by architecture.

Source: mlfoundations/open_clip `src/open_clip/pretrained.py`, tag `openai`.
"""

TIMEOUT_S = 20.0
_NAME = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_IDENTIFIER = re.compile(rf"hf:({_NAME}/{_NAME})(?:@(\w[\w./-]{{0,199}}))?", re.ASCII)
_NEVER_IN_A_NAME = re.compile(r"--|\.git$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)


@dataclass(frozen=True)
class HubFolder:
    """Weights on this machine, in the hub's layout."""

    folder: Path
    files: tuple[Path, ...]
    """One file, or the shards of one model."""
    commit: str | None = None
    """Of the repository they were fetched from."""

    @property
    def by_open_clip(self) -> bool:
        """Whether open_clip wrote the weights."""
        return self.files[0].name.startswith("open_clip")


def fetch(identifier: str, *, prefer: Sequence[str] = WEIGHTS) -> HubFolder:
    """Bring the weights of a repository into the local cache, or find them there.

    `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to
    `huggingface_hub`. A connection that breaks is taken up where it stopped; a file that is
    complete is not downloaded again.

    Args:
        identifier: `hf:owner/name` or `hf:owner/name@revision`; a branch, a tag or a commit.
        prefer: Files of weights to look for, in this order.

    Raises:
        CheckpointError: no such repository or revision, no weights in it, a checksum that does not
            match, or no network and no copy in the cache.
    """
    repository, revision = _parse(identifier)
    try:
        from huggingface_hub import HfApi
        from huggingface_hub import errors as hub_errors
    except ImportError as error:
        raise CheckpointError(
            f"{identifier} needs huggingface_hub: pip install huggingface_hub. Or download the "
            "files elsewhere, and pass their folder."
        ) from error
    if _COMMIT.fullmatch(revision) and (cached := _find_cached(repository, revision, prefer)):
        return cached
    try:
        info = HfApi().model_info(
            repository, revision=revision, files_metadata=True, timeout=TIMEOUT_S
        )
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError) as error:
        raise CheckpointError(
            f"the hub has no {identifier}, or it is private or gated: {error}. Check the name; for "
            "a private or gated one accept its terms and run hf auth login."
        ) from error
    except (hub_errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        if cached := _find_cached(repository, revision, prefer):
            _log.warning(
                "the hub cannot be reached (%s); %s is read from the cache, commit %s",
                *(error, identifier, cached.commit),
            )
            return cached
        raise _unreachable(identifier, repository, revision, error) from error
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise CheckpointError(f"the hub names no commit for {identifier}; try again later.")
    entries = {entry.rfilename: entry for entry in info.siblings or ()}
    commit = info.sha
    _log.info("%s is commit %s", identifier, commit)

    def get(name: str) -> Path:
        return _download(repository, commit, entries[name])

    # Before the weights: one that breaks off must not leave weights whose activation nobody knows.
    for name in CONFIGS:
        if name in entries:
            get(name)
    files = _collect(_choose(entries, identifier, prefer), entries, get)
    if revision != commit:
        # Without a network, the cache must know what this name stood for.
        reference = files[0].parents[2] / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
    return HubFolder(files[0].parent, files, commit)


def _parse(identifier: str) -> tuple[str, str]:
    """Return the repository and the revision."""
    match = _IDENTIFIER.fullmatch(identifier)
    if match is None or _NEVER_IN_A_NAME.search(match[1]) or ".." in identifier:
        raise CheckpointError(
            f"{identifier[:200]!r} is no identifier of the hub; write hf:owner/name or "
            "hf:owner/name@revision."
        )
    return match[1], match[2] or "main"


def open_folder(folder: Path) -> HubFolder:
    """Find the weights in a local folder.

    Args:
        folder: A repository's files, as `hf download --local-dir` or `save_pretrained` leave them,
            or one repository of the hub's cache (`models--owner--name`), whose `main` is taken.

    Raises:
        CheckpointError: no weights in it, or an index that names other files than there are.
    """
    commit = None
    if (folder / "snapshots").is_dir():
        main = folder / "refs" / "main"
        commit = main.read_text().strip() if main.is_file() else ""
        if not (_COMMIT.fullmatch(commit) and (folder / "snapshots" / commit).is_dir()):
            known = sorted(path.name for path in (folder / "snapshots").iterdir())
            raise CheckpointError(
                f"{str(folder)!r} has no snapshot of main. Pass one of its snapshots: {known[:8]}."
            )
        folder = folder / "snapshots" / commit
    names = {path.name for path in folder.iterdir() if path.is_file()}
    return HubFolder(folder, _collect(_choose(names, str(folder)), names, folder.joinpath), commit)


def _choose(names: Collection[str], where: str, prefer: Sequence[str] = WEIGHTS) -> str:
    for name in prefer:
        if name in names:
            return name
    raise CheckpointError(
        f"{where} holds no weights that can be read; looked for {', '.join(prefer)}. Pass a file "
        "with a state dict instead."
    )


def _collect(name: str, names: Collection[str], get: Callable[[str], Path]) -> tuple[Path, ...]:
    """Return the file `name`, or the shards it is the index of."""
    path = get(name)
    if name != INDEX:
        return (path,)
    by_tensor = read_json(path).get("weight_map")
    shards = sorted(set(map(str, by_tensor.values()))) if isinstance(by_tensor, dict) else []
    strange = [shard for shard in shards if not _SHARD.fullmatch(shard) or shard not in names]
    if strange or not shards:
        raise CheckpointError(
            f"{str(path)!r} names {strange[:8] or 'no shards'}; each must be a .safetensors file "
            "beside it. Download the repository again."
        )
    return tuple(get(shard) for shard in shards)


def _download(repository: str, commit: str, entry: RepoSibling) -> Path:
    from huggingface_hub import errors, hf_hub_download

    name = entry.rfilename
    try:
        path = Path(hf_hub_download(repository, name, revision=commit))
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise CheckpointError(
            f"the download of {name} from {repository} broke off: {error}. Run the same again; "
            "files that are complete are kept."
        ) from error
    if entry.lfs is not None:
        _verify(path, entry.lfs.sha256)
    elif entry.blob_id is not None:
        _verify(path, entry.blob_id)
    return path


def _find_cached(repository: str, revision: str, prefer: Sequence[str]) -> HubFolder | None:
    from huggingface_hub import try_to_load_from_cache

    for name in prefer:
        path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            folder = Path(path).parent
            configs = (folder / OPEN_CLIP_CONFIG, folder / HUGGING_FACE_CONFIG)
            if not any(config.is_file() for config in configs):
                return None  # Another program's, and it says nothing of the activation.
            try:
                found = open_folder(folder)
            except CheckpointError:
                return None  # Shards are missing: a download that broke off.
            for file in found.files:
                # The cache names a blob by its checksum.
                _verify(file, file.resolve().name)
            return HubFolder(found.folder, found.files, found.folder.name)
    return None


def _verify(path: Path, checksum: str) -> None:
    """Compare a file with its SHA-256 (large files) or the id git has for it (small ones)."""
    if _SHA256.fullmatch(checksum):
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        found = digest.hexdigest()
    elif _COMMIT.fullmatch(checksum):
        content = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    else:  # A cache without links keeps no checksums.
        return
    if found != checksum:
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path.name} has the checksum {found}, and the hub states {checksum}: the copy is "
            "damaged and was removed. Run the same again."
        )


def _unreachable(
    identifier: str, repository: str, revision: str, error: Exception
) -> CheckpointError:
    from huggingface_hub import constants

    folder = repository.partition("/")[2]
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else str(error)
    return CheckpointError(
        f"{identifier} is not in the cache {os.fspath(constants.HF_HUB_CACHE)!r}, and the hub "
        f"cannot be reached: {reason}. On a machine with a network run: hf download {repository} "
        f"--revision {revision} --include '*.safetensors' --include '*.json' --local-dir {folder}. "
        f"Then copy the folder {folder} here and pass its path instead of {identifier}."
    )
