"""A bulk job: everything that inputs mean, embedded once, whatever happens on the way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from clip_rt.bulk import listing
from clip_rt.bulk.folder import VERSION, JobFolder, written
from clip_rt.bulk.listing import Item, Listing
from clip_rt.bulk.partitions import Dtype, Format, Kind, Layout, Row
from clip_rt.bulk.reading import Content, Reader
from clip_rt.client import Client
from clip_rt.embedding import find_dimensions
from clip_rt.errors import InputError
from clip_rt.inputs.fetching import is_url
from clip_rt.inputs.hosts import check_hosts
from clip_rt.inputs.items import check_whole_number
from clip_rt.requests.results import Encoded

PARTITION_ITEMS = 10_000
"""Of 512 numbers in float32 they are a file of 20 MB."""
PARTITION_S = 60.0
TEXTS = 1024
"""Texts of a call."""
_NUMBERED = re.compile(r"^(?:image|text) \d+ (?:\(bytes\) )?")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is."""

    num_listed: int
    """Items found; all of them when `is_listed`."""
    is_listed: bool
    num_done: int = 0
    """Those whose partition is there or that are on their way to one, earlier runs' included."""
    num_failed: int = 0
    """Those of them that could not be embedded."""
    num_now: int = 0
    """Those of them that this run has done."""
    seconds: float = 0.0
    """Since this run began to embed."""

    @property
    def rate(self) -> float:
        """Items a second of this run; 0 before the first."""
        return self.num_now / self.seconds if self.num_now else 0.0

    @property
    def remaining_s(self) -> float:
        """Seconds until the end at this rate; infinite before the first item."""
        left = self.num_listed - self.num_done
        return left / self.rate if self.rate else float("inf")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a folder holds after a run."""

    num_items: int
    num_embedded: int
    num_failed: int
    is_complete: bool
    """False where the run was told to stop; call again to go on."""


class _StoppedError(Exception):
    """The run was told to stop while it looked for items."""


def embed(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    client: Client,
    *,
    kind: Kind = "image",
    image_column: str = "image",
    caption_column: str = "caption",
    text_column: str = "text",
    image_hosts: Collection[str] = (),
    truncate: bool = False,
    format: Format = "parquet",
    dtype: Dtype = "float32",
    dimensions: int | None = None,
    shard: tuple[int, int] | None = None,
    partition_items: int = PARTITION_ITEMS,
    partition_s: float = PARTITION_S,
    timeout_s: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Summary:
    """Embed any number of images or texts into files, and go on where an earlier run ended.

    Inputs are listed once, then embedded in partitions. A partition is in the folder as a whole or
    not at all, so a run that was killed is gone on with by the same call: what is there is not
    embedded again. Memory does not grow with the number of items.

    Args:
        inputs: Of images: files, folders, patterns, tar shards, URLs, tables (.csv, .tsv, .parquet)
            and "-", which reads these names from stdin. Of texts: files with one a line, tables,
            and "-" for lines on stdin.
        out: Folder for the result.
        client: Asked for the embeddings; its limits and options are those of the images.
        kind: "image" or "text".
        image_column: Of tables, with paths relative to the table's folder, or URLs.
        caption_column: Of tables, which may lack it; captions are kept beside the embeddings.
        text_column: Of tables of texts.
        image_hosts: Hosts that images are fetched from by URL.
        truncate: Cut texts that are too long for the model.
        format: "parquet", or "npy" for matrices beside Parquet files of what their rows are.
        dtype: Of the embeddings, "float32" or "float16".
        dimensions: Numbers of each embedding to keep, as `Client.encode_images` has it.
        shard: (i, n), i from 0: do the i-th of n disjoint parts of the inputs. Parts may be done at
            the same time, on machines that share the folder or not.
        partition_items: Most items of a partition.
        partition_s: A partition is ended after that time, so that no more is lost by a kill.
        timeout_s: Longest wait for a part of the answers; the client's own if None.
        on_progress: Called now and then.
        should_stop: Asked now and then; true ends the run at once, with what is done in the folder.

    Returns:
        What the folder holds now.

    Raises:
        InputError: an argument cannot be used, an input is not there or a table cannot be read.
        JobMismatchError: the folder holds a job of another model, other inputs or settings.
        JobRunningError: another process is at work on it.
        ServerError, UnknownModelError, ContractError: see `Client.encode_images`. What was done
            before is in the folder.
        OSError: the folder cannot be written to.
    """
    names = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    job = _Job(
        inputs=[os.fspath(each) for each in names],
        out=Path(out),
        client=client,
        kind=kind,
        image_column=image_column,
        caption_column=caption_column,
        text_column=text_column,
        image_hosts=image_hosts,
        truncate=truncate,
        format=format,
        dtype=dtype,
        dimensions=dimensions,
        shard=shard,
        partition_items=partition_items,
        partition_s=partition_s,
        timeout_s=timeout_s,
        on_progress=on_progress or (lambda progress: None),
        should_stop=should_stop or (lambda: False),
    )
    return job.run()


@dataclass(kw_only=True)
class _Job:
    """Arguments of `embed`, and how far it is."""

    inputs: list[str]
    out: Path
    client: Client
    kind: Kind
    image_column: str
    caption_column: str
    text_column: str
    image_hosts: Collection[str]
    truncate: bool
    format: Format
    dtype: Dtype
    dimensions: int | None
    shard: tuple[int, int] | None
    partition_items: int
    partition_s: float
    timeout_s: float | None
    on_progress: Callable[[Progress], None]
    should_stop: Callable[[], bool]

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InputError("inputs is empty; name at least one.")
        for name, kind in (("kind", Kind), ("format", Format), ("dtype", Dtype)):
            if getattr(self, name) not in get_args(kind):
                choices = " or ".join(map(repr, get_args(kind)))
                raise InputError(f"{name} is {getattr(self, name)!r:.80}; it must be {choices}.")
        check_whole_number(self.partition_items, "partition_items")
        if not self.partition_s > 0:
            raise InputError(f"partition_s is {self.partition_s!r:.80}; it must be above 0.")
        if self.shard is not None and not 0 <= self.shard[0] < self.shard[1]:
            raise InputError(
                f"shard is {self.shard!r:.80}; it must be (i, n) with i from 0 to n - 1."
            )
        check_hosts(self.image_hosts)
        self._options = self.client._image_options
        self._folder = JobFolder(self.out, self.shard)
        self._progress = Progress(num_listed=0, is_listed=False)

    def run(self) -> Summary:
        """Do what is still to be done."""
        with self._folder.locked():
            model = self._describe_model()
            self._folder.begin(self._describe(model))
            self._folder.clean()
            layout = Layout(
                kind=self.kind,
                format=self.format,
                dtype=self.dtype,
                embedding_dim=model["dimensions"],
                facts={"model": model["name"], "fingerprint": model["fingerprint"]},
            )
            if not self._folder.listing.exists():
                if self._folder.find_done():
                    raise InputError(
                        f"{self._folder.listing} is gone, which says what the partitions in "
                        f"{self.out} are of. Write to another folder."
                    )
                try:
                    self._list()
                except _StoppedError:
                    return Summary(num_items=0, num_embedded=0, num_failed=0, is_complete=False)
            with contextlib.closing(Listing(self._folder.listing)) as items:
                return self._embed_missing(items, layout)

    def _describe_model(self) -> dict[str, Any]:
        manifest = self.client.manifest
        return {
            "name": manifest.model,
            "fingerprint": manifest.fingerprint,
            # Two exports of the same weights need not give the same embeddings.
            "precision": manifest.precision,
            "activation": manifest.activation,
            "dimensions": find_dimensions(manifest, self.dimensions),
            "side_px": manifest.side_px,
            "resizing": asdict(manifest.resizing),
            "tokenization": asdict(manifest.tokenization),
        }

    def _check_model(self) -> None:
        """Refuse answers of a model that replaced the job's since it was asked which it is.

        Raises:
            JobMismatchError: they are.
        """
        self._folder.begin(self._describe(self._describe_model()))

    def _describe(self, model: dict[str, Any]) -> dict[str, Any]:
        """Return what must be the same in all runs, as JSON has it."""
        of_kind: dict[str, Any] = (
            {"text_column": self.text_column, "truncate": self.truncate}
            if self.kind == "text"
            else {
                "image_column": self.image_column,
                "caption_column": self.caption_column,
                "exif": self._options.exif,
                "decode": self._options.decode,
            }
        )
        job = {
            "version": VERSION,
            "kind": self.kind,
            "inputs": self.inputs,
            "shard": self.shard,
            "format": self.format,
            "dtype": self.dtype,
            **of_kind,
            "model": model,
        }
        found: dict[str, Any] = json.loads(json.dumps(job))
        return found

    def _list(self) -> None:
        """Find all items, and write the listing."""

        def note(num_items: int) -> None:
            self._report(num_listed=num_items)

        with written(self._folder.listing) as path:
            listing.write(path, self._find_items(), note)

    def _find_items(self) -> Iterator[Item]:
        if self.kind == "text":
            items = listing.find_text_items(self.inputs, text_column=self.text_column)
        else:
            items = listing.find_image_items(
                self.inputs, image_column=self.image_column, caption_column=self.caption_column
            )
        if self.shard is not None:
            items = listing.in_shard(items, self.shard)
        for item in items:
            if self.should_stop():
                raise _StoppedError
            if not self.image_hosts and is_url(item.path):
                raise InputError(
                    f"{item.path[:200]!r} is a URL, and none are fetched. Name the hosts that may "
                    "be asked with --image-host, in Python image_hosts=."
                )
            yield item

    def _embed_missing(self, items: Listing, layout: Layout) -> Summary:
        num_items = len(items)
        num_done = sum(end - start for start, end in self._folder.find_done())
        num_failed = self._folder.count_failed()
        self._report(num_listed=num_items, is_listed=True, num_done=num_done, num_failed=num_failed)
        begun_s = time.monotonic()
        encode = self._encode_texts if self.kind == "text" else self._encode_images
        for start, end in self._folder.find_missing(num_items):
            with contextlib.closing(encode(items.items(start, end))) as parts:
                self._write_partitions(parts, start, layout, begun_s)
            if self.should_stop():
                break
        done = self._progress
        return Summary(
            num_items=num_items,
            num_embedded=done.num_done - done.num_failed,
            num_failed=done.num_failed,
            is_complete=done.num_done == num_items,
        )

    def _write_partitions(
        self, parts: Iterable[list[Row]], start: int, layout: Layout, begun_s: float
    ) -> None:
        """Gather rows of neighbouring items, and write a partition when it is full or old."""
        rows: list[Row] = []
        num_committed = 0
        partition_begun_s = time.monotonic()

        def commit(num_rows: int) -> None:
            nonlocal rows, num_committed, partition_begun_s
            some = rows[:num_rows]
            self._folder.commit(start + num_committed, some, layout)
            rows, num_committed = rows[num_rows:], num_committed + num_rows
            partition_begun_s = time.monotonic()

        try:
            for part in parts:
                rows += part
                done = self._progress
                self._report(
                    num_done=done.num_done + len(part),
                    num_failed=done.num_failed + sum(row.embedding is None for row in part),
                    num_now=done.num_now + len(part),
                    seconds=time.monotonic() - begun_s,
                )
                while len(rows) >= self.partition_items:
                    commit(self.partition_items)
                if rows and time.monotonic() - partition_begun_s >= self.partition_s:
                    commit(len(rows))
        finally:
            # Whatever ended it, a lost server or Ctrl-C: what is done is done.
            if rows:
                commit(len(rows))

    def _encode_images(self, items: Iterable[Item]) -> Generator[list[Row], None, None]:
        sent: deque[Content] = deque()

        def feed(contents: Iterable[Content]) -> Iterator[bytes]:
            for content in contents:
                if self.should_stop():
                    return
                # What cannot be read is empty, which the client refuses in its place: so order
                # holds, and memory.
                sent.append(replace(content, encoded=b""))
                yield content.encoded

        options = self._options
        with Reader(
            max_pixels=options.max_pixels, max_bytes=options.max_bytes, hosts=self.image_hosts
        ) as reader:
            num_answered = 0
            stream = self.client.stream_images(
                feed(reader.read_ahead(items)),
                on_error="skip",
                dimensions=self.dimensions,
                timeout_s=self.timeout_s,
            )
            with contextlib.closing(stream):
                for encoded in stream:
                    num = len(encoded.indices) + len(encoded.failures)
                    some = [sent.popleft() for _ in range(num)]
                    if not num_answered:  # A stream is of one model from here to its end.
                        self._check_model()
                    yield _make_rows(some, encoded, num_answered)
                    num_answered += num

    def _encode_texts(self, items: Iterable[Item]) -> Generator[list[Row], None, None]:
        source = iter(items)
        while (some := [Content(item) for item in islice(source, TEXTS)]) and not (
            self.should_stop()
        ):
            encoded = self.client.encode_texts(
                [content.item.text or "" for content in some],
                truncate=self.truncate,
                on_error="skip",
                dimensions=self.dimensions,
                timeout_s=self.timeout_s,
            )
            self._check_model()
            yield _make_rows(some, encoded, 0)

    def _report(self, **changes: Any) -> None:
        self._progress = replace(self._progress, **changes)
        self.on_progress(self._progress)


def _make_rows(contents: Sequence[Content], encoded: Encoded, first: int) -> list[Row]:
    """Return what came of items, in order; `first` is the number of the first in `encoded`."""
    embedding_by_index = dict(zip(encoded.indices.tolist(), encoded.embeddings, strict=True))
    failure_by_index = {getattr(error, "index", None): error for error in encoded.failures}
    rows = []
    for number, content in enumerate(contents, first):
        failure = failure_by_index.get(number)
        error = message = ""
        if content.problem:
            error, message = "ImageError", content.problem
        elif failure is not None:
            # Its number counts from where this run went on.
            error, message = type(failure).__name__, _NUMBERED.sub("", str(failure))
        rows.append(
            Row(
                content.item,
                None if error else embedding_by_index[number],
                content.sha256,
                content.width,
                content.height,
                error,
                message,
            )
        )
    return rows
