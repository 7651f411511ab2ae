"""Folders, tables and shards on disk in, images with their class and captions out.

A folder holds one folder of images for each class, as ImageNet, its V2, Sketch and R do. A table is
a CSV or JSON lines. A shard is a tar in WebDataset's layout. Nothing is decoded here but JSON and
text. Unlike in training nothing is left out: what is damaged is an error, or figures would be of
other data than was named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clip_rt.decoding import ImageInput
from clip_rt.errors import InputError
from training.data.pairs import (
    IMAGE_EXTENSIONS,
    BadSampleError,
    Skips,
    check_captions,
    parse_object,
)
from training.data.tables import TABLE_SUFFIXES, Row, check_path, read_label, read_rows, resolve
from training.data.tar_samples import read_shard as read_members

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
    """Yield the samples of folders, tables and shards, one after the other.

    Raises:
        InputError: a path is none of these, is damaged, or holds nothing to evaluate on.
    """
    count = 0
    for path in data:
        if path.is_dir():
            samples = read_folder(path)
        elif path.suffix == ".tar" and path.is_file():
            samples = read_shard(path)
        elif path.suffix in TABLE_SUFFIXES:
            samples = read_table(path)
        else:
            raise InputError(
                f"{str(path)!r} is neither a folder, nor a table ({', '.join(TABLE_SUFFIXES)}), "
                "nor a .tar shard."
            )
        for sample in samples:
            count += 1
            yield sample
    if count == 0:
        raise InputError(
            f"no image was found in {', '.join(map(str, data))}. A folder of images for each "
            f"class is needed ({', '.join(IMAGE_EXTENSIONS)}), or shards with such members."
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


def read_table(path: Path) -> Iterator[Sample]:
    """Yield each image of a table once, with its `label` and all of its `caption`s.

    Paths are relative to the folder of the table and stay within it.

    Raises:
        InputError: the table is damaged, or an image has two labels.
    """
    samples: dict[str, Sample] = {}
    for place, image, row in _read_images(path):
        file = resolve(path.parent, image, allow_outside=False)
        label = read_label(row.get("label"), place)
        captions = _read_captions(row, place)
        known = samples.setdefault(image, Sample(image, file, label))
        label = label or known.label
        if known.label not in (None, label):
            raise InputError(f"{place}: the label is {label!r}, and was {known.label!r} before.")
        samples[image] = replace(known, label=label, captions=known.captions + captions)
    yield from samples.values()


def read_shard(path: Path) -> Iterator[Sample]:
    """Yield the samples of one tar that have an image.

    Raises:
        InputError: the tar is damaged or hostile, or a sample's text or JSON cannot be read.
    """
    for name, members in read_members(path):
        image = next((members[key] for key in IMAGE_EXTENSIONS if key in members), None)
        if image is not None:
            yield _sample(f"{path.name}:{name}", image, members)


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a table with the columns `image` and `caption`.

    An image may stand in several rows, or have a list of captions in JSON.

    Returns:
        The captions of each image, by its path below the folder of images.

    Raises:
        InputError: a row lacks a column, or the file cannot be read.
    """
    captions: dict[str, tuple[str, ...]] = defaultdict(tuple)
    for place, image, row in _read_images(path):
        captions[image] += check_captions(row.get("caption"), place)
    return dict(captions)


def _read_images(path: Path) -> Iterator[tuple[str, str, Row]]:
    """Yield place, path of the image and cells of each row; no row may be damaged."""
    skips = Skips()
    for place, row in read_rows(path, skips):
        yield place, check_path(row.get("image"), place), row
    if skips.total:
        raise InputError(f"the table {path} is damaged: {skips}.")


def _read_captions(facts: Row, place: str) -> tuple[str, ...]:
    """Return what is said in a row or in a sample's JSON; blank lines say nothing."""
    said = next((facts[name] for name in CAPTION_KEYS if facts.get(name)), [])
    listed = said if isinstance(said, list) else [said]
    listed = [text for text in listed if not isinstance(text, str) or text.strip()]
    return check_captions(listed, place) if listed else ()


def _is_image(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS and path.is_file()


def _sample(place: str, image: bytes, members: dict[str, bytes]) -> Sample:
    facts = parse_object(members["json"], place) if "json" in members else {}
    label = next((read_label(facts[name], place) for name in LABEL_KEYS if name in facts), None)
    try:
        if "cls" in members:
            label = str(int(members["cls"]))
        if "txt" in members:
            facts = {"captions": members["txt"].decode("utf-8").splitlines()}
    except ValueError as error:
        raise BadSampleError(f"text that cannot be read ({error})", place) from error
    return Sample(place, image, label, _read_captions(facts, place))
