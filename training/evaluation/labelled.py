"""Folders and shards on disk in, images with their class and captions out.

A folder holds one folder of images for each class, as ImageNet, its V2, Sketch and R do. A shard is
a tar in WebDataset's layout. Nothing is decoded here but JSON and text.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset

from clip_rt.decoding import ImageInput
from clip_rt.errors import InputError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
"""Files that are taken for images; the same as `clip_rt` decodes."""
LABEL_KEYS = ("label", "name")
"""Where the JSON of a shard's sample has its class, unless a `cls` member gives its number."""
CAPTION_KEYS = ("captions", "caption")
"""Where the JSON has its captions, unless a `txt` member has them, one a line."""


@dataclass(frozen=True)
class Sample:
    """One image with what is known about it."""

    key: str
    """Where it came from, for messages."""
    image: ImageInput
    label: str | None = None
    """Folder, number or name of its class, as the data have it."""
    captions: tuple[str, ...] = ()


def read_samples(data: Sequence[Path]) -> Iterator[Sample]:
    """Yield the samples of one folder, or of one shard after the other.

    Raises:
        InputError: a path is neither a folder nor a tar, or holds nothing to evaluate on.
    """
    count = 0
    for path in data:
        if path.is_dir():
            samples = read_folder(path)
        elif path.suffix == ".tar" and path.is_file():
            samples = read_shard(path)
        else:
            raise InputError(f"{str(path)!r} is neither a folder nor a .tar shard.")
        for sample in samples:
            count += 1
            yield sample
    if count == 0:
        raise InputError(
            f"no image was found in {', '.join(map(str, data))}. A folder of images for each "
            f"class is needed ({', '.join(IMAGE_SUFFIXES)}), or shards with such members."
        )


def read_folder(folder: Path) -> Iterator[Sample]:
    """Yield the images of a tree, each under the folder of its class; loose images have none.

    A folder whose only content is one folder of folders is stepped into, as archives of data sets
    are often packed.
    """
    root = folder
    while True:
        children = [path for path in sorted(root.iterdir()) if not path.name.startswith(".")]
        only = children[0] if len(children) == 1 and children[0].is_dir() else None
        if only is None or not any(path.is_dir() for path in only.iterdir()):
            break
        root = only
    for child in children:
        if _is_image(child):
            yield Sample(child.name, child)
        elif child.is_dir():
            for path in sorted(child.rglob("*")):
                if _is_image(path):
                    yield Sample(str(path.relative_to(root)), path, label=child.name)


def read_shard(path: Path) -> Iterator[Sample]:
    """Yield the samples of one tar that have an image.

    Raises:
        InputError: the tar is damaged, or a sample's text or JSON cannot be read.
    """
    # An absolute path cannot be taken for an address or a command to pipe from.
    urls = [str(path.resolve())]
    raw = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    try:
        for item in raw:
            image = next((item[suffix] for suffix in IMAGE_SUFFIXES if suffix in item), None)
            if image is not None:
                yield _sample(f"{path.name}:{item['__key__']}", image, item)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"the shard {str(path)!r} is damaged: {error}.") from error


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a CSV or JSON-lines file with the columns `image` and `caption`.

    An image may stand in several rows, or have a list of captions in JSON.

    Returns:
        The captions of each image, by its path below the folder of images.

    Raises:
        InputError: a row lacks a column, or the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"the captions {str(path)!r} cannot be read: {error}.") from error
    captions: dict[str, list[str]] = defaultdict(list)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not row.get("image") or not row.get("caption"):
            raise InputError(f"row {number} of {str(path)!r} has no image or no caption.")
        captions[str(row["image"])].extend(_texts(row["caption"]))
    return {image: tuple(texts) for image, texts in captions.items()}


def _is_image(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES and path.is_file()


def _sample(key: str, image: bytes, item: dict[str, Any]) -> Sample:
    try:
        facts = json.loads(item["json"]) if "json" in item else {}
        facts = facts if isinstance(facts, dict) else {}
        label = next((str(facts[name]) for name in LABEL_KEYS if name in facts), None)
        if "cls" in item:
            label = str(int(item["cls"]))
        captions = next((_texts(facts[name]) for name in CAPTION_KEYS if name in facts), ())
        if "txt" in item:
            captions = _texts(item["txt"].decode("utf-8").splitlines())
    except ValueError as error:
        raise InputError(f"the sample {key!r} has text that cannot be read: {error}.") from error
    return Sample(key, image, label, captions)


def _texts(value: object) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    return tuple(str(text).strip() for text in texts if str(text).strip())
