"""NAME, NAME:VERSION or grpc://host:port/NAME in, a client of just that out."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format

from clip_rt.client import Client
from clip_rt.errors import InputError
from clip_rt.inputs.decoding import DEFAULT_LIMITS, Limits
from clip_rt.specs import slug
from export.model_folders import tokenizer_folder, tower_folders
from export.models import list_versions, served_version
from export.version_folder import CONFIG

_TIMEOUT_S = 300.0
"""For a chunk, and for a server to start: large models on few cores."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Something served: a model at `url`, or a version of one in `repository`."""

    name: str | None
    url: str | None = None
    repository: Path | None = None
    version: int | None = None

    def __str__(self) -> str:
        if self.url is not None:
            return f"{self.url}/{self.name}" if self.name else self.url
        return f"{self.name}:{self.version}"

    @contextmanager
    def connect(self, limits: Limits = DEFAULT_LIMITS) -> Iterator[Client]:
        """Yield a client of it; a version in a repository gets a server that has nothing else."""
        max_pixels, max_bytes = limits.max_pixels, limits.max_bytes
        if self.repository is None:
            with Client(
                self.url,
                model=self.name,
                timeout_s=_TIMEOUT_S,
                max_pixels=max_pixels,
                max_bytes=max_bytes,
            ) as client:
                yield client
            return
        with tempfile.TemporaryDirectory(prefix="clip_rt-compare-") as folder:
            version = int(self.version or 0)
            for source in tower_folders(self.repository, str(self.name)):
                _link_version(source, version, Path(folder, source.name))
            tokenizer = tokenizer_folder(self.repository, str(self.name))
            if (tokenizer / str(version)).is_dir():
                _link_version(tokenizer, version, Path(folder, tokenizer.name))
            with Client(
                repository=folder,
                model=self.name,
                timeout_s=_TIMEOUT_S,
                start_timeout_s=_TIMEOUT_S,
                max_pixels=max_pixels,
                max_bytes=max_bytes,
            ) as client:
                yield client


def find_reference(text: str, repository: Path) -> Reference:
    """Read NAME, NAME:VERSION or grpc://host:port/NAME.

    Raises:
        InputError: the repository has no such model or version; lists those there are.
    """
    if match := re.fullmatch(r"(grpcs?://[^/]+)(?:/(.+))?", text):
        return Reference(url=match[1], name=match[2])
    name, _, number = text.partition(":")
    repository = repository.resolve()
    if not repository.is_dir():
        raise InputError(f"there is no folder {repository}; name one with --repository.")
    names = [path.name.removesuffix("_image") for path in sorted(repository.glob("*_image"))]
    known = [each for each in names if tower_folders(repository, each)[1].is_dir()]
    if not name or slug(name) not in known:
        raise InputError(
            f"{repository} holds no model {name[:80]!r}; it holds {', '.join(known) or 'none'}. A "
            "running server's is named grpc://host:port/NAME."
        )
    towers = tower_folders(repository, name)
    try:
        served = {served_version(folder) for folder in towers}
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise InputError(f"{name!r} in {repository} cannot be read: {error}.") from error
    kept = set.intersection(*(_loadable(folder) for folder in towers))
    if not number and len(served) > 1:
        raise InputError(
            f"{name!r} in {repository} serves an image and a text encoder of two versions, "
            f"{min(served)} and {max(served)}. Export it again, or name a version."
        )
    version = int(number) if number.isdecimal() else min(served)
    if (number and not number.isdecimal()) or version not in kept:
        raise InputError(
            f"{name!r} has no version {(number or version)!r} in {repository}; it has "
            f"{', '.join(map(str, sorted(kept))) or 'none'}."
        )
    return Reference(name=name, repository=repository, version=version)


def _config_of(folder: Path, version: int) -> Path:
    """Return the config.pbtxt a version is served by; exports of old kept none but the served."""
    own = folder / str(version) / CONFIG
    return own if own.is_file() or version != served_version(folder) else folder / CONFIG


def _loadable(folder: Path) -> set[int]:
    return {each for each in list_versions(folder) if _config_of(folder, each).is_file()}


def _link_version(source: Path, version: int, target: Path) -> None:
    """Make a model's folder of links with one version in it; folders themselves are no links."""
    inside = source / str(version)
    for path in inside.rglob("*"):
        if path.is_file():
            link = target / str(version) / path.relative_to(inside)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    (target / CONFIG).symlink_to(_config_of(source, version))
