"""Real pictures for the tests of search: drawings of a style that the bundled model never saw."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

from PIL import Image

import clip_rt
from clip_rt.search import Index

ROOT = Path(__file__).resolve().parents[2]
SHARD = ROOT / "training/sample/styles/openmoji.tar"


def read_drawings(num: int, *, every: int = 30) -> list[tuple[str, bytes]]:
    """Return names and WebP files of some drawings, spread over all kinds."""
    found = []
    with tarfile.open(SHARD) as shard:
        for number in range(0, num * every, every):
            picture = shard.extractfile(f"{number:06d}.webp")
            record = shard.extractfile(f"{number:06d}.json")
            assert picture is not None
            assert record is not None
            found.append((json.load(record)["name"], picture.read()))
    return found


def make_index(folder: Path, client: clip_rt.Client, *, num: int) -> Path:
    """Make an index of some drawings and of a copy of one; return the folder of the drawings."""
    photos = folder.with_name(f"{folder.name} photos")
    write_drawings(photos, num)
    shutil.copy(photos / "0/000.png", photos / "copy.png")
    with Index.open(folder, create=True) as index:
        index.update(client, [photos])
    return photos


def write_drawings(folder: Path, num: int, *, every: int = 30) -> dict[str, Path]:
    """Write drawings as PNG files in folders of ten; return their paths by name."""
    paths = {}
    for number, (name, data) in enumerate(read_drawings(num, every=every)):
        path = folder / f"{number // 10}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.open(io.BytesIO(data)).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        white.convert("RGB").save(path)
        paths[name] = path
    return paths
