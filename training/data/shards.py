"""WebDataset tar shards in, (image, caption) pairs out."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import webdataset
from braceexpand import braceexpand
from tqdm import tqdm
from webdataset.gopen import gopen

from clip_rt.errors import InputError
from clip_rt.inputs.decoding import MAX_BYTES
from training.data.batches import Purpose, rng
from training.data.pairs import (
    IMAGE_EXTENSIONS,
    BadSampleError,
    Pair,
    Skips,
    check_captions,
    parse_object,
)
from training.data.tar_samples import CUT_OFF, Header, index_samples, read_extent, read_samples

_URL = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)


def _make_pair(parts: dict[str, bytes], name: str, *, caption_key: str) -> Pair:
    image = next((parts[key] for key in IMAGE_EXTENSIONS if key in parts), None)
    if image is None:
        raise BadSampleError("no image", name)
    captions: object = parts.get("txt")
    if captions is None and "json" in parts:
        captions = parse_object(parts["json"], name).get(caption_key)
    return Pair(image, check_captions(captions, name), name)


class TarShards:
    """Local, uncompressed shards, read at random.

    Headers are read once, when the object is made; after that every pair costs two reads. The
    index takes 48 bytes a sample and is shared with worker processes.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        caption_key: str = "caption",
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Index shards.

        Args:
            shards: Paths; braces expand, as in `train/{000..099}.tar`.
            caption_key: Where a sample without .txt has its caption, or several, in its .json.
            max_bytes: Largest encoded size of an image.

        Raises:
            InputError: a shard is missing or no path is local, or no sample is usable.
        """
        self.skips = Skips()
        self.paths = [_local(shard) for shard in expand(shards)]
        self._caption_key = caption_key
        self._max_bytes = max_bytes
        rows = (
            self._index_shard(number, path)
            for number, path in enumerate(tqdm(self.paths, desc="indexing shards", disable=None))
        )
        numbers = itertools.chain.from_iterable(itertools.chain.from_iterable(rows))
        self._rows = np.fromiter(numbers, np.int64).reshape(-1, 6)
        if not len(self._rows):
            raise InputError(
                f"{_shorten(self.paths)} hold no pair of an image ({', '.join(IMAGE_EXTENSIONS)}) "
                f"and a caption (.txt, or .json with {caption_key!r}); only uncompressed tars are "
                f"read at random. Left out: {self.skips}."
            )

    def _index_shard(self, number: int, path: Path) -> Iterator[tuple[int, ...]]:
        with path.open("rb") as file:
            for name, parts in index_samples(
                file, str(path), self.skips, max_bytes=self._max_bytes
            ):
                image = next((parts[key] for key in IMAGE_EXTENSIONS if key in parts), None)
                text = parts.get("txt") or parts.get("json")
                if image is None or text is None:
                    reason = "no image" if image is None else "no caption"
                    self.skips.add(reason, f"{path}, {name!r}")
                else:
                    yield number, *image, *text, "txt" in parts

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Pair:
        number, offset, size, text_offset, text_size, is_txt = self._rows[index].tolist()
        path = self.paths[number]
        name = f"{path}, image at byte {offset}"
        try:
            with path.open("rb", buffering=0) as file:
                image = read_extent(file, offset, size)
                text = read_extent(file, text_offset, text_size)
        except OSError as error:
            raise BadSampleError("unreadable shard", name) from error
        parts = {"jpg": image, "txt" if is_txt else "json": text}
        return _make_pair(parts, name, caption_key=self._caption_key)


class PipedShards:
    """Shards that can only be read from front to back: remote ones, or the output of commands.

    What is exact: the stream is a pure function of the seed, the shards, their contents, and of
    `rank` and `world_size`, since each rank reads shards of its own. A run resumes by reading
    all that came before and throwing it away undecoded, so it costs time in proportion.

    What is not: order is random only within the epoch's order of shards and a buffer; on another
    number of ranks the order is another; a transfer that fails in the middle loses the rest
    of its shard for that epoch, and shifts what follows.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        caption_key: str = "caption",
        allow_commands: bool = False,
        buffer_samples: int = 1000,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Remember shards; nothing is opened yet.

        Args:
            shards: `https://...`, or any other scheme of webdataset's gopen, or `pipe:command`;
                braces expand. Compressed archives are read as well.
            caption_key: Where a sample without .txt has its caption in its .json.
            allow_commands: Whether `pipe:` shards may run their commands in a shell.
            buffer_samples: Undecoded samples from which the next is drawn; they stay in memory.
            max_bytes: Largest encoded size of an image.

        Raises:
            InputError: a shard is a command and commands are not allowed, or is a local path.
        """
        self.skips = Skips()
        self.urls = expand(shards)
        for url in self.urls:
            if url.lower().startswith("pipe:") and not allow_commands:
                raise InputError(
                    f"{url[:80]!r} is a command that would be run. Pass --allow-commands, in "
                    "Python allow_commands=True, if it is yours."
                )
            if not _URL.match(url):
                raise InputError(f"{url[:80]!r} is no URL. Local shards are read by TarShards.")
        self._caption_key = caption_key
        self._buffer_samples = buffer_samples
        self._max_bytes = max_bytes

    def stream(self, *, seed: int, rank: int = 0, world_size: int = 1) -> Iterator[Pair]:
        """Yield this rank's pairs, epoch after epoch.

        Raises:
            InputError: there are fewer shards than ranks, or an epoch had no usable pair.
        """
        if len(self.urls) < world_size:
            raise InputError(
                f"{len(self.urls)} shards cannot be shared by {world_size} processes; make more "
                "and smaller ones."
            )
        pairs = self._read(seed, rank, world_size)
        mixed = webdataset.shuffle(
            self._buffer_samples,
            initial=self._buffer_samples,
            rng=random.Random(f"{seed} {rank} {world_size}"),
        )
        yield from mixed(pairs)

    def _read(self, seed: int, rank: int, world_size: int) -> Iterator[Pair]:
        for epoch in itertools.count():
            order = rng(Purpose.ORDER, seed, 0, epoch).permutation(len(self.urls))
            # Each epoch the ranks share out another order, yet the same number of shards.
            is_empty = True
            for number in order[rank::world_size]:
                for pair in self._read_shard(self.urls[number]):
                    is_empty = False
                    yield pair
            if is_empty:
                raise InputError(
                    f"{_shorten(self.urls)} gave no pair in epoch {epoch}. Left out: {self.skips}."
                )

    def _read_shard(self, url: str) -> Iterator[Pair]:
        def read(header: tarfile.TarInfo) -> bytes:
            try:
                return tar.extractfile(header).read()  # type: ignore[union-attr]
            except Exception as error:
                raise BadSampleError(CUT_OFF, header.name) from error

        try:
            with contextlib.closing(gopen(url)) as stream:
                tar = tarfile.open(fileobj=stream, mode="r|*", tarinfo=Header)  # noqa: SIM115
                for name, parts in read_samples(
                    tar, url, self.skips, read, max_bytes=self._max_bytes
                ):
                    try:
                        place = f"{url}, {name!r}"
                        pair = _make_pair(parts, place, caption_key=self._caption_key)
                    except BadSampleError as error:
                        self.skips.add(error.reason, error.example)
                    else:
                        yield pair
        # A failing command or transfer shows only here; tarfile adds what it raises on garbage.
        except Exception as error:
            self.skips.add("unreadable shard", f"{url}: {error}")


def expand(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """Expand the braces of one or several names of shards.

    Raises:
        InputError: a brace is open, or no shard is named.
    """
    names = [shards] if isinstance(shards, (str, Path)) else shards
    try:
        expanded = [each for name in names for each in braceexpand(str(name))]
    except ValueError as error:
        raise InputError(f"the braces in {names!r:.200} cannot be expanded: {error}.") from error
    if not expanded:
        raise InputError("no shard is named.")
    return expanded


def _local(shard: str) -> Path:
    if _URL.match(shard):
        raise InputError(f"{shard[:80]!r} is no local file. PipedShards reads URLs and commands.")
    path = Path(shard)
    if not path.is_file():
        raise InputError(f"there is no shard {shard[:200]!r}. Check its name and its braces.")
    return path


def _shorten(names: Sequence[object]) -> str:
    return f"{names[0]}" + (f" and {len(names) - 1} other shards" if len(names) > 1 else "")
