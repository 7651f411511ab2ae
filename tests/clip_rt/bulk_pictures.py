"""Pictures for the tests of bulk embedding: real drawings, each another crop, and broken files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from clip_rt_drawings import EXAMPLES
from PIL import Image

import clip_rt

DRAWINGS = sorted(EXAMPLES.glob("*.png"))
BROKEN = {
    "broken/cut.jpg": "cannot be decoded: image file is truncated",
    "broken/empty.jpg": "is empty",
    "broken/text.jpg": "is no readable",
}
"""Names of files that cannot be embedded, and what is said of each."""


def jpeg(number: int) -> bytes:
    """Encode a drawing as a JPEG; every number has another."""
    with Image.open(DRAWINGS[number % len(DRAWINGS)]) as drawing:
        image = drawing.convert("RGB").resize(size_of(number))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def size_of(number: int) -> tuple[int, int]:
    """Return width and height of a JPEG, which tell it from all others of its drawing."""
    number //= len(DRAWINGS)
    return 64 + number % 64, 64 + number // 64


def write_pictures(folder: Path, num: int) -> list[Path]:
    """Write JPEGs into subfolders of 16, and return their paths in the order of their names."""
    paths = []
    for number in range(num):
        path = folder / f"{number // 16:03d}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
        paths.append(path)
    return paths


def write_broken(folder: Path) -> list[Path]:
    """Write the files of `BROKEN`."""
    content = {
        "broken/cut.jpg": jpeg(0)[:-400],
        "broken/empty.jpg": b"",
        "broken/text.jpg": b"no image at all",
    }
    (folder / "broken").mkdir(parents=True)
    for name in BROKEN:
        (folder / name).write_bytes(content[name])
    return [folder / name for name in BROKEN]


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    """Write a tar file."""
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            shard.addfile(header, io.BytesIO(content))
    return path


def assert_same(client: clip_rt.Client, names: list[str], rows: np.ndarray) -> None:
    """Compare embeddings of files with what the client answers."""
    expected = client.encode_images(names)
    np.testing.assert_allclose(rows.astype(np.float32), expected, atol=2e-3)
    assert (np.einsum("nd,nd->n", rows.astype(np.float32), expected) > 0.9999).all()
