"""One (image, caption) pair of a user's data, where pairs come from, and which were left out.

Captions are checked here for all sources alike; images are checked when they are decoded.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from clip_rt.errors import InputError
from clip_rt.inputs.tokenizer import MAX_TEXT_CHARS

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp"),
    *("jpe", "jfif", "pjpeg", "pjp", "apng"),  # JPEG and PNG by other names
)
"""What is taken for an image; which decoder runs depends on the bytes, and others never do."""
MAX_CAPTION_BYTES = 4 * MAX_TEXT_CHARS
MAX_JSON_BYTES = 1024 * 1024
"""Of one sample's metadata, or of one line of a table."""
_MAX_EXAMPLES = 3


class BadSampleError(InputError):
    """A sample cannot be used for training; `reason` is one of few, `example` says which one."""

    def __init__(self, reason: str, example: str) -> None:
        super().__init__(f"{example}: {reason}")
        self.reason = reason
        self.example = example


class Pair(NamedTuple):
    """An image, not yet read or decoded, and what may be said of it."""

    image: bytes | Path
    captions: tuple[str, ...]
    """At least one; each time the pair is read one of them is chosen."""
    name: str
    """Where it is, for messages."""
    label: str | None = None
    """The class of the image; pairs of one class fit each other, whatever their captions."""


class Source(Protocol):
    """Pairs in an order that never changes."""

    skips: Skips
    """What is known to be bad before any pair is read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair:
        """Return a pair.

        Raises:
            BadSampleError: it cannot be used.
        """
        ...


@dataclass
class Skips:
    """What was left out and why: counts by reason, with the first few of each."""

    counts: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    """What no sample is lost by: members of shards that are never read, by extension, files that
    other programs left, empty folders."""
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        """Count one more."""
        self.counts[reason] += 1
        self._remember(reason, example)

    def note(self, reason: str, example: str) -> None:
        """Count one more of what no sample is lost by."""
        self.ignored[reason] += 1
        self._remember(reason, example)

    def _remember(self, reason: str, example: str) -> None:
        known = self.examples.setdefault(reason, [])
        if len(known) < _MAX_EXAMPLES:
            known.append(example[:200])

    def merge(self, other: Skips) -> None:
        """Count all of another's."""
        self.counts.update(other.counts)
        self.ignored.update(other.ignored)
        for reason, examples in other.examples.items():
            known = self.examples.setdefault(reason, [])
            known.extend(examples[: _MAX_EXAMPLES - len(known)])

    def without(self, reason: str) -> Skips | None:
        """Return what was left out for other reasons than this; None if nothing was."""
        counts = Counter({each: n for each, n in self.counts.items() if each != reason and n})
        return Skips(counts, Counter(), self.examples) if counts else None

    @property
    def total(self) -> int:
        """How many were left out."""
        return self.counts.total()

    def __str__(self) -> str:
        said = [self._say(reason, count) for reason, count in self.counts.most_common()]
        if self.ignored:
            noted = [self._say(reason, count) for reason, count in self.ignored.most_common()]
            said.append(f"no sample is lost by {', '.join(noted)}")
        return "; ".join(said)

    def _say(self, reason: str, count: int) -> str:
        examples = self.examples.get(reason)
        return f"{count} x {reason}" + (f" ({', '.join(examples)})" if examples else "")


def check_caption(caption: object, name: str) -> str:
    """Return `caption` if it is text that a tokenizer takes.

    Raises:
        BadSampleError: it is missing, blank, too long, holds a NUL, or is no valid Unicode.
    """
    if isinstance(caption, bytes):
        try:
            caption = caption.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSampleError("caption is not UTF-8", name) from error
    if not isinstance(caption, str) or not caption.strip():
        raise BadSampleError("no caption", name)
    if len(caption) > MAX_TEXT_CHARS:
        raise BadSampleError("caption too long", name)
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSampleError("caption is no valid Unicode", name) from error
    if "\0" in caption:
        raise BadSampleError("caption holds NUL", name)
    return caption.strip()


def check_captions(captions: object, name: str) -> tuple[str, ...]:
    """Return a caption, or each of a list of several, as `check_caption` does."""
    listed = captions if isinstance(captions, list) and captions else [captions]
    return tuple(check_caption(caption, name) for caption in listed)


def parse_object(encoded: bytes, name: str) -> dict[str, object]:
    """Parse a JSON object of at most `MAX_JSON_BYTES`.

    Raises:
        BadSampleError: it is none.
    """
    if len(encoded) > MAX_JSON_BYTES:
        raise BadSampleError("JSON too large", name)
    try:
        parsed = json.loads(encoded)
    # Nesting too deep is a RecursionError; ValueError covers syntax, encoding and huge numbers.
    except (ValueError, RecursionError) as error:
        raise BadSampleError("damaged JSON", name) from error
    if not isinstance(parsed, dict):
        raise BadSampleError("JSON is no object", name)
    return parsed


class Strings:
    """A long list of strings in two arrays.

    A list would be copied into every worker process, page by page, as reference counts change.
    """

    def __init__(self, strings: list[str]) -> None:
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self._ends[index], self._ends[index + 1]
        return self._bytes[start:end].tobytes().decode("utf-8", "surrogatepass")
