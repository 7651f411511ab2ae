"""What a user calls their data goes in, sources of image-text pairs come out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from clip_rt.errors import InputError
from training.data.folders import CaptionFolder, ClassFolder
from training.data.pairs import Source
from training.data.shards import PipedShards, TarShards
from training.data.tables import TABLE_SUFFIXES, Table


def open_sources(
    names: Sequence[str], *, templates: str | None = None, allow_commands: bool = False
) -> list[Source] | PipedShards:
    """Open each name as what it looks like.

    Args:
        names: Local tar shards (braces expand), one table, or one folder each; or nothing but
            URLs of shards, which are streamed together. A folder whose images have a .txt beside
            them is read as pairs, any other as one folder of images for each class.
        templates: Captions of what has a class only; a name of `clip_rt.prompts`.
        allow_commands: Whether `pipe:` shards may run their commands.

    Raises:
        InputError: a name is none of these, or nothing usable is in it.
    """
    if any(_is_url(name) for name in names):
        if not all(_is_url(name) for name in names):
            raise InputError("streamed shards cannot be mixed with local data; copy them first.")
        return PipedShards(list(names), allow_commands=allow_commands)
    return [_open(name, templates) for name in names]


def _is_url(name: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]+:", name, re.IGNORECASE) is not None


def _open(name: str, templates: str | None) -> Source:
    path = Path(name)
    if name.endswith(".tar"):
        return TarShards(name)
    if path.suffix in TABLE_SUFFIXES:
        return Table(path, templates=templates)
    if path.is_dir():
        has_texts = next(path.rglob("*.txt"), None) is not None
        return CaptionFolder(path) if has_texts else ClassFolder(path, templates=templates)
    raise InputError(
        f"{name!r} is no tar shard, no table ({', '.join(TABLE_SUFFIXES)}) and no folder of images."
    )
