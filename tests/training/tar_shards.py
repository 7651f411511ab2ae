"""Shards and pictures that the tests make."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Members = Mapping[str, bytes] | Sequence[tuple[str | tarfile.TarInfo, bytes]]


def encode(colour: tuple[int, int, int], *, size: tuple[int, int] = (40, 30), kind: str = "JPEG"):
    """Encode a picture of one colour with a little texture."""
    noise = np.random.default_rng(0).integers(0, 8, (size[1], size[0], 1))
    pixels = (np.array(colour)[None, None] + noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Members, *, mode: str = "w") -> Path:
    """Write members, given by name or by header, in order."""
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in pairs:
            header = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if header.isreg():
                header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def write_pairs(path: Path, captions: Sequence[str], *, first: int = 0) -> Path:
    """Write a shard of good pairs; picture i is grey of level 20 + i."""
    members = []
    for number, caption in enumerate(captions, start=first):
        members.append((f"{number:06}.jpg", encode((20 + number,) * 3)))
        members.append((f"{number:06}.txt", caption.encode()))
    return write_tar(path, members)
