"""`clip-rt cache`: embeddings of labels that earlier commands and clients left on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from clip_rt.commands.connect import find_cache_dir
from clip_rt.commands.output import OutputOptions
from clip_rt.errors import InputError

COLUMNS = ("folder", "embeddings", "files", "bytes", "max_bytes")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Which cache, and what about it."""

    cache_dir: Path | None = None
    """Its folder. Without it: $CLIP_RT_CACHE_DIR, else ~/.cache/clip_rt/labels."""
    clear: tyro.conf.FlagCreatePairsOff[bool] = False
    """Remove what is in it, and show what is left."""
    output: Annotated[OutputOptions, tyro.conf.arg(name="")]


def cache(config: Annotated[CacheConfig, tyro.conf.arg(name="")]) -> int:
    """Show the cache of label embeddings, or clear it.

    Returns:
        The exit code.

    Raises:
        InputError: there is no home to have one in.
        OSError: it cannot be read, or not be cleared.
    """
    from clip_rt.cache.disk import DiskCache
    from clip_rt.cache.memory import MAX_DISK_BYTES

    folder = find_cache_dir(config.cache_dir)
    if folder is None:
        raise InputError("the user has no home folder; name the cache with --cache-dir.")
    disk = DiskCache(folder, MAX_DISK_BYTES)
    if config.clear:
        disk.clear()
    contents = disk.count()
    if config.clear and contents.num_segments:
        raise OSError(f"{contents.num_segments} files in {folder} could not be removed.")
    row = {
        "folder": str(disk.folder),
        "embeddings": contents.num_embeddings,
        "files": contents.num_segments,
        "bytes": contents.num_bytes,
        "max_bytes": disk.max_bytes,
    }
    config.output.write([row], COLUMNS)
    return 0
