"""Images as an index knows them: by absolute path, with what tells whether they changed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clip_rt.bulk.sources import ImageFile, find_images
from clip_rt.search.scan import Found


def find_files(names: Iterable[str]) -> Iterator[Found]:
    """Yield the images of files, folders and .tar shards, given by absolute paths.

    Raises:
        InputError: a name means nothing that is there.
    """
    shard, status = None, None
    for image in find_images(names):
        if image.problem:
            yield Found(image.name, -1, 0, str(image.path), problem=image.problem)
            continue
        if status is None or shard != image.path:
            try:
                status = image.path.stat()
            except OSError:  # It went away.
                shard = status = None
                continue
            shard = image.path if image.member else None
        yield Found(
            image.name,
            image.size_bytes if image.member else status.st_size,
            status.st_mtime_ns,
            str(image.path),
            image.member,
            image.offset_bytes,
        )


def to_image(file: Found) -> ImageFile:
    """Return what reads a file."""
    path = Path(file.file)
    if not file.member:
        return ImageFile(path)
    return ImageFile(path, file.member, file.offset_bytes, file.size_bytes, file.mtime_ns)


@dataclass
class FilesByPath:
    """Finds files again by what they are called in an index; quick for one shard after another."""

    _members: dict[str, Found] = field(default_factory=dict)

    def find(self, path: str) -> Found | None:
        """Return the file as it is now; None where it is gone."""
        try:
            status = os.stat(path)
        except OSError:
            if path not in self._members:
                shard = next((str(each) for each in Path(path).parents if each.is_file()), None)
                found = () if shard is None else find_files([shard])
                self._members = {each.path: each for each in found}
            return self._members.get(path)
        return Found(path, status.st_size, status.st_mtime_ns, path)


def read_file(path: str, files: FilesByPath | None = None) -> Path | bytes:
    """Return what is read of a file that is called so in an index.

    Args:
        path: Of a file, or `shard.tar/member`.
        files: Finds members of shards; quick for one shard after another.

    Returns:
        Its path, or the content of a member of a shard.

    Raises:
        OSError: it is gone, or cannot be read.
    """
    if os.path.isfile(path):
        return Path(path)
    found = (files or FilesByPath()).find(path)
    if found is None:
        raise FileNotFoundError(path)
    return to_image(found).read()
