"""Class embeddings that were computed before, in memory and, if there is a folder, on disk.

A cache changes how long a call takes, never what it returns: the key holds all that the vector
depends on.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_rt import fork, telemetry
from clip_rt.cache.disk import DiskCache
from clip_rt.deadline import Deadline
from clip_rt.errors import ServerTimeoutError

ENTRY_BYTES = 500
"""About what a key and the bookkeeping take beside the vector."""
MAX_DISK_BYTES = 1024**3
WRITE_EVERY_S = 5.0
"""While a call makes embeddings, the finished ones go to the folder this often, so that they
outlive a process that is killed."""


class Key(NamedTuple):
    """Everything a class embedding depends on."""

    weights: str
    """Fingerprint of the model, its precision and its activation."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    context_length: int
    templates: tuple[str, ...]
    label: str


_Entry = tuple[str, str]
"""Hash of all of a key but its label, and the label: no template is hashed again for each label."""


class _Flight:
    """Entries that one call is making while others may wait for them."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.vector_by_entry: dict[_Entry, NDArray[np.float32]] = {}
        """What has been made so far; in the end all of the entries, unless the call failed."""
        self.has_landed = False


class PromptCache:
    """The most recently used class embeddings, within a bound of memory and another of disk.

    Thread-safe; a forked child has its own memory and shares the folder. The folder can serve any
    number of processes, see `disk_cache`. Whatever is wrong with it, results are the same and one
    warning is logged as `clip_rt.cache`.

    Args:
        max_bytes: Memory for embeddings and keys; 0 keeps none.
        folder: Where embeddings outlive the process; None keeps none on disk.
        max_disk_bytes: Size of all the files in it.
    """

    def __init__(
        self, max_bytes: int, folder: Path | None = None, max_disk_bytes: int = MAX_DISK_BYTES
    ) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Memory in use."""
        self.hits = 0
        """Embeddings that were in memory, or that another call was making already."""
        self.disk_hits = 0
        """Embeddings that were read from the folder."""
        self.misses = 0
        """Embeddings that had to be made."""
        self._disk = None if folder is None else DiskCache(folder, max_disk_bytes)
        self._vector_by_entry: OrderedDict[_Entry, NDArray[np.float32]] = OrderedDict()
        self._flight_by_entry: dict[_Entry, _Flight] = {}
        self._lock = threading.Lock()
        self._landing = threading.Condition(self._lock)
        with _caches_lock:
            _caches.add(self)

    def __len__(self) -> int:
        return len(self._vector_by_entry)

    def __repr__(self) -> str:
        place = "" if self._disk is None else f", folder={str(self._disk.folder)!r}"
        return (
            f"PromptCache({len(self):,} embeddings in {self.num_bytes:,} of {self.max_bytes:,} "
            f"bytes, hits={self.hits:,}, disk_hits={self.disk_hits:,}, misses={self.misses:,}"
            f"{place})"
        )

    @property
    def num_disk_bytes(self) -> int:
        """Size of the files in the folder, whoever wrote them; 0 without one."""
        return 0 if self._disk is None else self._disk.num_bytes

    def get_or_make(
        self,
        keys: Sequence[Key],
        make: Callable[[Sequence[int]], Iterable[NDArray[np.float32]]],
        *,
        dim: int,
        deadline: Deadline,
    ) -> NDArray[np.float32]:
        """Return the embeddings of keys, made now where they are not known.

        What another thread is making is waited for, and made here if it fails there. However the
        call ends, the embeddings that were made are kept, and whoever waits for them has them.

        Args:
            keys: Any number, in any mixture.
            make: Is given the ascending positions in `keys` of what is missing, each distinct key
                once, and returns or yields a row for each, float32 (dim,) of length 1. Not called
                when nothing is missing; no lock is held meanwhile.
            dim: Numbers in an embedding.
            deadline: How long to wait for another thread; `make` minds its own time.

        Returns:
            float32 (len(keys), dim), a copy.

        Raises:
            ServerTimeoutError: another thread was still making some of them at the deadline, or
                `make` raised it; says how many are left.
            Exception: what else `make` raises.
        """
        if not keys:
            return np.empty((0, dim), np.float32)
        with telemetry.stage("cache", len(keys)):
            entries = _index(keys)
            position_by_entry: dict[_Entry, int] = {}
            for position, entry in enumerate(entries):
                position_by_entry.setdefault(entry, position)
        vector_by_entry: dict[_Entry, NDArray[np.float32]] = {}
        missing = list(position_by_entry)
        while missing:
            flight = _Flight()
            try:
                try:
                    others = self._claim(missing, flight, vector_by_entry)
                    self._find_or_make(flight, position_by_entry, make, dim)
                finally:
                    # Also after an interrupt, or others would wait for nobody.
                    self._land(flight)
                    vector_by_entry |= flight.vector_by_entry
                # Only now that its own are done, so that no two calls wait for each other.
                for other in others:
                    self._wait(other, missing, vector_by_entry, deadline)
            except ServerTimeoutError as error:
                raise self._count_left(error, missing, vector_by_entry) from error
            missing = [entry for entry in missing if entry not in vector_by_entry]
        return np.concatenate([vector_by_entry[entry] for entry in entries]).reshape(-1, dim)

    def clear(self) -> None:
        """Forget everything, what other processes wrote to the folder too, and count from 0."""
        with self._lock:
            self._vector_by_entry.clear()
            self.num_bytes = self.hits = self.disk_hits = self.misses = 0
        if self._disk is not None:
            self._disk.clear()

    def _claim(
        self,
        missing: list[_Entry],
        flight: _Flight,
        vector_by_entry: dict[_Entry, NDArray[np.float32]],
    ) -> list[_Flight]:
        """Take what is in memory, and let `flight` make what no other flight is making.

        Returns:
            The other flights that have some of them.
        """
        others: dict[_Flight, None] = {}
        num_found = 0
        with self._lock:
            for entry in missing:
                vector = self._vector_by_entry.get(entry)
                if vector is not None:
                    self._vector_by_entry.move_to_end(entry)
                    vector_by_entry[entry] = vector
                    num_found += 1
                elif (other := self._flight_by_entry.get(entry)) is not None:
                    others[other] = None
                else:
                    flight.entries.append(entry)
                    self._flight_by_entry[entry] = flight
            self.hits += num_found
        telemetry.count("cache_hits", num_found)
        return list(others)

    def _find_or_make(
        self,
        flight: _Flight,
        position_by_entry: dict[_Entry, int],
        make: Callable[[Sequence[int]], Iterable[NDArray[np.float32]]],
        dim: int,
    ) -> None:
        """Fill the flight from the folder and with what `make` gives, which is written there."""
        with telemetry.stage("cache", 0):
            found = self._read(flight.entries, dim)
        with self._landing:
            flight.vector_by_entry |= found
            self._landing.notify_all()
            self.disk_hits += len(found)
        telemetry.count("cache_disk_hits", len(found))
        missing = [entry for entry in flight.entries if entry not in found]
        if not missing:
            return
        unwritten: list[_Entry] = []
        written_at_s = time.monotonic()
        try:
            rows = make([position_by_entry[entry] for entry in missing])
            for entry, row in zip(missing, rows, strict=True):
                with self._landing:
                    flight.vector_by_entry[entry] = row
                    self.misses += 1
                    self._landing.notify_all()
                unwritten.append(entry)
                if time.monotonic() - written_at_s > WRITE_EVERY_S:
                    self._write(unwritten, flight.vector_by_entry)
                    unwritten, written_at_s = [], time.monotonic()
        finally:
            telemetry.count("cache_misses", sum(each in flight.vector_by_entry for each in missing))
            # Before the disk, which may be slow.
            self._land(flight)
            with telemetry.stage("cache", 0):
                self._write(unwritten, flight.vector_by_entry)

    def _land(self, flight: _Flight) -> None:
        with self._lock:
            for entry, vector in flight.vector_by_entry.items():
                self._put(entry, vector)
            for entry in flight.entries:
                if self._flight_by_entry.get(entry) is flight:
                    del self._flight_by_entry[entry]
            flight.has_landed = True
            self._landing.notify_all()

    def _count_left(
        self,
        error: ServerTimeoutError,
        missing: list[_Entry],
        vector_by_entry: dict[_Entry, NDArray[np.float32]],
    ) -> ServerTimeoutError:
        """Return the error with how many embeddings are left to make, and what is kept."""
        num_left = sum(entry not in vector_by_entry for entry in missing)
        with self._lock:
            num_kept = sum(entry in self._vector_by_entry for entry in vector_by_entry)
        if self._disk is not None or num_kept == len(vector_by_entry):
            outlook = "What is finished is kept: calling again goes on from there."
        else:
            outlook = (
                f"Of what is finished {num_kept:,} are kept: raise cache_bytes= or name a "
                "cache_dir=, so that calling again goes on from there."
            )
        num_all = len(vector_by_entry) + num_left
        return ServerTimeoutError(
            f"{error} {num_left:,} of {num_all:,} class embeddings are left to make. {outlook}",
            url=error.url,
            timeout_s=error.timeout_s,
        )

    def _wait(
        self,
        other: _Flight,
        missing: list[_Entry],
        vector_by_entry: dict[_Entry, NDArray[np.float32]],
        deadline: Deadline,
    ) -> None:
        wait_s = min(deadline.remaining_s(), threading.TIMEOUT_MAX)
        others = set(other.entries)
        wanted = [entry for entry in missing if entry in others]
        num_there = 0

        def is_over() -> bool:
            # The rows come in order, so that each is looked at once.
            nonlocal num_there
            while num_there < len(wanted) and wanted[num_there] in other.vector_by_entry:
                num_there += 1
            is_complete = num_there == len(wanted)
            return is_complete or other.has_landed or deadline.remaining_s() <= 0

        with deadline.waking(self._wake), self._landing:
            self._landing.wait_for(is_over, timeout=wait_s)
            made = {
                entry: other.vector_by_entry[entry]
                for entry in wanted
                if entry in other.vector_by_entry
            }
            vector_by_entry |= made
            self.hits += len(made)
        telemetry.count("cache_hits", len(made))
        if len(made) < len(wanted) and not other.has_landed:
            num_left = len(other.entries) - len(other.vector_by_entry)
            raise ServerTimeoutError(
                f"another call was still making {num_left} of the same class embeddings "
                f"after {deadline.timeout_s:g} s. Allow more with timeout_s=.",
                timeout_s=deadline.timeout_s,
            )

    def _wake(self) -> None:
        """Have those who wait look at their deadlines; one was called off."""
        with self._landing:
            self._landing.notify_all()

    def _put(self, entry: _Entry, vector: NDArray[np.float32]) -> None:
        """Keep a copy of an embedding, and forget the least recently used beyond the bound."""
        replaced = self._vector_by_entry.pop(entry, None)
        if replaced is not None:
            self.num_bytes -= _count_bytes(entry, replaced)
        self._vector_by_entry[entry] = vector.copy()
        self.num_bytes += _count_bytes(entry, vector)
        while self.num_bytes > self.max_bytes and self._vector_by_entry:
            self.num_bytes -= _count_bytes(*self._vector_by_entry.popitem(last=False))

    def _read(self, entries: list[_Entry], dim: int) -> dict[_Entry, NDArray[np.float32]]:
        if self._disk is None:
            return {}
        return {
            (namespace, label): vector
            for namespace, labels in _group(entries).items()
            for label, vector in self._disk.read(namespace, labels, dim).items()
        }

    def _write(
        self, made: list[_Entry], vector_by_entry: dict[_Entry, NDArray[np.float32]]
    ) -> None:
        if self._disk is None or not made:
            return
        for namespace, labels in _group(made).items():
            rows = np.stack([vector_by_entry[namespace, label] for label in labels])
            self._disk.write(namespace, labels, rows)


_caches: weakref.WeakSet[PromptCache] = weakref.WeakSet()
_caches_lock = threading.Lock()
_held: list[threading.Lock] = []


def _hold_all() -> None:
    """Before a fork: no thread may be in the middle of a change, or the child inherits it so."""
    _caches_lock.acquire()
    _held.append(_caches_lock)
    for cache in _caches:
        cache._lock.acquire()
        _held.append(cache._lock)


def _release_all() -> None:
    while _held:
        _held.pop().release()


def _release_all_in_child() -> None:
    for cache in _caches:
        # The threads that were making them are not in this process.
        cache._flight_by_entry.clear()
    _release_all()


fork.register("cache", before=_hold_all, in_parent=_release_all, in_child=_release_all_in_child)


def _index(keys: Sequence[Key]) -> list[_Entry]:
    entries = []
    shared: tuple[object, ...] = ()
    for key in keys:
        if key[:-1] != shared:
            shared = key[:-1]
            namespace = hashlib.sha256(json.dumps(shared).encode()).hexdigest()
        entries.append((namespace, key.label))
    return entries


def _group(entries: list[_Entry]) -> dict[str, list[str]]:
    """Return the labels of each namespace."""
    labels_by_namespace: dict[str, list[str]] = {}
    for namespace, label in entries:
        labels_by_namespace.setdefault(namespace, []).append(label)
    return labels_by_namespace


def _count_bytes(entry: _Entry, vector: NDArray[np.float32]) -> int:
    return ENTRY_BYTES + 4 * len(entry[1]) + vector.nbytes
