"""Folders, tables and shards on disk in, images with their class and captions out.

A folder holds one folder of images for each class, as ImageNet, its V2, Sketch and R do. A table is
a CSV or JSON lines. A shard is a tar in WebDataset's layout. Nothing is decoded here but JSON and
text. Which files of a folder are images, and of which class, is decided as in training. Unlike in
training nothing is left out: what is damaged, or cannot be read here, is an error, or figures would
be of other data than was named. Only what other programs left behind is passed over, and said so.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clip_rt.errors import InputError
from clip_rt.inputs.decoding import MAX_BYTES, ImageInput
from training.data.pairs import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    BadSampleError,
    Skips,
    check_captions,
    parse_object,
)
from training.data.tables import (
    TABLE_SUFFIXES,
    Row,
    check_path,
    is_table,
    read_label,
    read_rows,
    resolve,
)
from training.data.tar_samples import read_shard as read_members
from training.data.tree import LEFTOVER, read_tree

_log = logging.getLogger(__name__)

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


def check_exist(*paths: Path | None) -> None:
    """Refuse what is not there, before minutes of work; None names nothing.

    Raises:
        InputError: names the first that is not.
    """
    for path in paths:
        if path is not None and not path.exists():
            raise InputError(f"{str(path)!r} does not exist.")


def read_samples(
    data: Sequence[Path], *, allow_outside: bool = False, max_bytes: int = MAX_BYTES
) -> Iterator[Sample]:
    """Yield the samples of folders, tables and shards, one after the other.

    Args:
        data: Each is one of these.
        allow_outside: Whether paths of tables, and links in folders, may lead out of them.
        max_bytes: Largest encoded size of an image in a shard.

    Raises:
        InputError: a path is none of these, is damaged, or holds nothing to evaluate on.
    """
    check_exist(*data)
    count = 0
    for path in data:
        if path.is_dir():
            samples = read_folder(path, allow_outside=allow_outside)
        elif path.suffix.lower() == ".tar" and path.is_file():
            samples = read_shard(path, max_bytes=max_bytes)
        elif is_table(path):
            samples = read_table(path, allow_outside=allow_outside)
        else:
            raise InputError(
                f"{str(path)!r} is neither a folder, nor a table "
                f"({', '.join(TABLE_SUFFIXES)}), nor a .tar shard."
            )
        for sample in samples:
            count += 1
            yield sample
    if count == 0:
        raise InputError(
            f"no image was found in {', '.join(map(str, data))}. A folder of images for each "
            f"class is needed ({', '.join(IMAGE_EXTENSIONS)}), or shards with such members."
        )


def read_folder(folder: Path, *, allow_outside: bool = False) -> Iterator[Sample]:
    """Yield the images of a tree, each under the folder of its class; loose images have none.

    A folder whose only content is one folder of folders is stepped into, as archives of data sets
    are often packed. Where nearly every image has a .txt of the same name beside it, that is its
    caption. Links stay within the folder, unless `allow_outside`.

    Raises:
        InputError: it holds images that are not read here, or a link that leads out of it; a
            caption cannot be read.
    """
    tree = read_tree(folder)
    if lost := tree.skips.without(LEFTOVER):
        raise InputError(
            f"{folder} holds images that cannot be read here: {lost}. Convert them to PNG or JPEG, "
            "or move them out of the folder: figures are of all images or of none."
        )
    tree.note_empty_classes()
    if str(tree.skips):
        _log.warning("%s: passed over %s", folder, tree.skips)
    has_captions = bool(tree.holds_captions)
    if tree.captioned and not has_captions:
        _log.warning(
            "%s: %d of %d images have a .txt beside them, which are not read as captions",
            *(folder, len(tree.captioned), len(tree.images)),
        )
    for name in sorted(tree.images, key=lambda name: name.split(os.sep)):
        captions: tuple[str, ...] = ()
        if has_captions and name in tree.captioned:
            text = f"{os.path.splitext(name)[0]}.txt"
            captions = _read_caption_file(resolve(folder, text, allow_outside=allow_outside))
        key = name.removeprefix(tree.class_prefix)
        image = resolve(folder, name, allow_outside=allow_outside)
        yield Sample(key, image, tree.class_of(name), captions)


def _read_caption_file(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            encoded = file.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise InputError(f"the caption {path} cannot be read: {error.strerror}.") from error
    return check_captions(encoded, str(path)) if encoded.strip() else ()


def read_table(path: Path, *, allow_outside: bool = False) -> Iterator[Sample]:
    """Yield each image of a table once, with its `label` and all of its `caption`s.

    Paths are relative to the folder of the table and stay within it, unless `allow_outside`.

    Raises:
        InputError: the table is damaged, or an image has two labels.
    """
    samples: dict[str, Sample] = {}
    for place, image, row in _read_images(path):
        file = resolve(path.parent, image, allow_outside=allow_outside)
        label = read_label(row.get("label"), place)
        captions = _read_captions(row, place)
        known = samples.setdefault(image, Sample(image, file, label))
        label = label or known.label
        if known.label not in (None, label):
            raise InputError(f"{place}: the label is {label!r}, and was {known.label!r} before.")
        samples[image] = replace(known, label=label, captions=known.captions + captions)
    yield from samples.values()


def read_shard(path: Path, *, max_bytes: int = MAX_BYTES) -> Iterator[Sample]:
    """Yield the samples of one tar that have an image.

    Raises:
        InputError: the tar is damaged or hostile, or a sample's text or JSON cannot be read.
    """
    for name, members in read_members(path, max_bytes=max_bytes):
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
