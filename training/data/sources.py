"""What a user calls their data goes in, sources of image-text pairs come out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from clip_rt.errors import InputError
from clip_rt.inputs.decoding import MAX_BYTES
from training.data.folders import CaptionFolder, ClassFolder
from training.data.pairs import Source
from training.data.shards import PipedShards, TarShards
from training.data.tables import TABLE_SUFFIXES, Table, is_table
from training.data.tree import FolderKind, read_tree


def open_sources(
    names: Sequence[str],
    *,
    templates: str | None = None,
    allow_commands: bool = False,
    allow_outside: bool = False,
    folder_kind: FolderKind = "auto",
    max_bytes: int = MAX_BYTES,
) -> list[Source] | PipedShards:
    """Open each name as what it looks like.

    Args:
        names: Local tar shards (braces expand), one table, or one folder each; or nothing but
            URLs of shards, which are streamed together. A folder of which at least 80 % of the
            images have a .txt of the same name beside them is read as pairs, one of which none has
            one as a folder of images for each class; of what is between, `folder_kind` must say it.
        templates: Captions of what has a class only; a name of `clip_rt.inputs.prompts`.
        allow_commands: Whether `pipe:` shards may run their commands.
        allow_outside: Whether paths of tables, and links in folders, may lead out of them.
        folder_kind: What folders are.
        max_bytes: Largest encoded size of an image in a shard.

    Raises:
        InputError: a name is none of these, or nothing usable is in it.
    """
    if any(_is_url(name) for name in names):
        if not all(_is_url(name) for name in names):
            raise InputError("streamed shards cannot be mixed with local data; copy them first.")
        return PipedShards(list(names), allow_commands=allow_commands, max_bytes=max_bytes)
    return [_open(name, templates, allow_outside, folder_kind, max_bytes) for name in names]


def _is_url(name: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]+:", name, re.IGNORECASE) is not None


def _open(
    name: str,
    templates: str | None,
    allow_outside: bool,
    folder_kind: FolderKind,
    max_bytes: int,
) -> Source:
    path = Path(name)
    if path.suffix.lower() == ".tar":
        return TarShards(name, max_bytes=max_bytes)
    if is_table(path):
        return Table(path, templates=templates, allow_outside=allow_outside)
    if path.is_dir():
        return _open_folder(path, templates, allow_outside, folder_kind)
    missing = "" if path.exists() else "does not exist: it "
    raise InputError(
        f"{name!r} {missing}is no tar shard, no table ({', '.join(TABLE_SUFFIXES)}) and no folder "
        "of images."
    )


def _open_folder(
    path: Path, templates: str | None, allow_outside: bool, folder_kind: FolderKind
) -> Source:
    tree = read_tree(path)
    holds_captions = tree.holds_captions if folder_kind == "auto" else folder_kind == "captions"
    if holds_captions is None:
        raise InputError(
            f"{len(tree.captioned)} of the {len(tree.images)} images of {path} have a .txt beside "
            f"them, such as {min(tree.captioned)!r}. Say what the folder is: --folder-kind classes "
            "reads a folder of images for each class and no .txt; --folder-kind captions reads a "
            ".txt as the caption of its image, and leaves out images that have none."
        )
    if holds_captions:
        return CaptionFolder(tree, allow_outside=allow_outside)
    return ClassFolder(tree, templates=templates, allow_outside=allow_outside)
