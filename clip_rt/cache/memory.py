"""Class embeddings that were computed before, in memory and, if there is a folder, on disk.

A cache changes how long a call takes, never what it returns: the key holds all that the vector
depends on.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from itertools import starmap
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
    """Fingerprint of the model, its precision and its activation, and how many of its numbers are
    kept where that are not all."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    context_length: int
    templates: tuple[str, ...]
    label: str


_Entry = tuple[str, str]
"""Hash of all of a key but its label, and the label: no template is hashed again for each label."""
_Vectors = dict[_Entry, NDArray[np.float32]]
_Future = Future[NDArray[np.float32]]


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
        self._future_by_entry: dict[_Entry, _Future] = {}
        """What calls are making now, for others that want the same."""
        self._lock = threading.Lock()
        fork.restart_in_child(self, PromptCache._restart)

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
        vector_by_entry: _Vectors = {}
        missing = list(position_by_entry)
        while missing:
            own: dict[_Entry, _Future] = {}
            try:
                try:
                    others = self._claim(missing, own, vector_by_entry)
                    self._find_or_make(own, vector_by_entry, position_by_entry, make, dim)
                finally:
                    # Also after an interrupt, or others would wait for nobody.
                    self._give_up(own)
                # Only now that its own are done, so that no two calls wait for each other.
                self._wait(others, vector_by_entry, deadline)
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
        self, missing: list[_Entry], own: dict[_Entry, _Future], vector_by_entry: _Vectors
    ) -> dict[_Entry, _Future]:
        """Take what is in memory, and put into `own` what no other call is making.

        Returns:
            What others are making.
        """
        others: dict[_Entry, _Future] = {}
        num_found = 0
        with self._lock:
            for entry in missing:
                vector = self._vector_by_entry.get(entry)
                if vector is not None:
                    self._vector_by_entry.move_to_end(entry)
                    vector_by_entry[entry] = vector
                    num_found += 1
                elif (other := self._future_by_entry.get(entry)) is not None:
                    others[entry] = other
                else:
                    own[entry] = self._future_by_entry[entry] = Future()
            self.hits += num_found
        telemetry.count("cache_hits", num_found)
        return others

    def _find_or_make(
        self,
        own: dict[_Entry, _Future],
        vector_by_entry: _Vectors,
        position_by_entry: dict[_Entry, int],
        make: Callable[[Sequence[int]], Iterable[NDArray[np.float32]]],
        dim: int,
    ) -> None:
        """Take entries from the folder or from what `make` gives, which is written there."""
        with telemetry.stage("cache", 0):
            found = self._read(list(own), dim)
        for entry, row in found.items():
            self._keep(entry, row, own[entry])
        vector_by_entry |= found
        with self._lock:
            self.disk_hits += len(found)
        telemetry.count("cache_disk_hits", len(found))
        missing = [entry for entry in own if entry not in found]
        if not missing:
            return
        unwritten: _Vectors = {}
        written_at_s = time.monotonic()
        try:
            rows = make([position_by_entry[entry] for entry in missing])
            for entry, row in zip(missing, rows, strict=True):
                vector_by_entry[entry] = unwritten[entry] = row
                self._keep(entry, row, own[entry], num_made=1)
                if time.monotonic() - written_at_s > WRITE_EVERY_S:
                    self._write(unwritten)
                    unwritten, written_at_s = {}, time.monotonic()
        finally:
            telemetry.count("cache_misses", sum(each in vector_by_entry for each in missing))
            # Before the disk, which may be slow.
            self._give_up(own)
            with telemetry.stage("cache", 0):
                self._write(unwritten)

    def _keep(
        self, entry: _Entry, row: NDArray[np.float32], future: _Future, *, num_made: int = 0
    ) -> None:
        """Keep an embedding, and hand it to whoever waits for it."""
        with self._lock:
            self.misses += num_made
            self._put(entry, row)
            if self._future_by_entry.get(entry) is future:
                del self._future_by_entry[entry]
        future.set_result(row)

    def _give_up(self, own: dict[_Entry, _Future]) -> None:
        """Leave what was not made to others that want it."""
        with self._lock:
            for entry, future in own.items():
                if self._future_by_entry.get(entry) is future:
                    del self._future_by_entry[entry]
        for future in own.values():
            future.cancel()

    def _count_left(
        self,
        error: ServerTimeoutError,
        missing: list[_Entry],
        vector_by_entry: _Vectors,
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
        self, others: dict[_Entry, _Future], vector_by_entry: _Vectors, deadline: Deadline
    ) -> None:
        """Take what other calls make, as far as they have made it by the deadline."""
        for future in others.values():
            _wait_for(future, deadline)
            if not future.done():
                break
        made = {
            entry: future.result()
            for entry, future in others.items()
            if future.done() and not future.cancelled()
        }
        vector_by_entry |= made
        with self._lock:
            self.hits += len(made)
        telemetry.count("cache_hits", len(made))
        if num_left := sum(not future.done() for future in others.values()):
            raise ServerTimeoutError(
                f"another call was still making {num_left} of the same class embeddings "
                f"after {deadline.timeout_s:g} s. Allow more with timeout_s=.",
                timeout_s=deadline.timeout_s,
            )

    def _restart(self) -> None:
        """In a forked child: threads that were changing or making something are not here."""
        self._lock = threading.Lock()
        self._future_by_entry.clear()
        self.num_bytes = sum(starmap(_count_bytes, self._vector_by_entry.items()))

    def _put(self, entry: _Entry, vector: NDArray[np.float32]) -> None:
        """Keep a copy of an embedding, and forget the least recently used beyond the bound."""
        replaced = self._vector_by_entry.pop(entry, None)
        if replaced is not None:
            self.num_bytes -= _count_bytes(entry, replaced)
        self._vector_by_entry[entry] = vector.copy()
        self.num_bytes += _count_bytes(entry, vector)
        while self.num_bytes > self.max_bytes and self._vector_by_entry:
            self.num_bytes -= _count_bytes(*self._vector_by_entry.popitem(last=False))

    def _read(self, entries: list[_Entry], dim: int) -> _Vectors:
        if self._disk is None:
            return {}
        return {
            (namespace, label): vector
            for namespace, labels in _group(entries).items()
            for label, vector in self._disk.read(namespace, labels, dim).items()
        }

    def _write(self, vector_by_entry: _Vectors) -> None:
        if self._disk is None:
            return
        for namespace, labels in _group(vector_by_entry).items():
            rows = np.stack([vector_by_entry[namespace, label] for label in labels])
            self._disk.write(namespace, labels, rows)


def _wait_for(future: _Future, deadline: Deadline) -> None:
    """Wait until it is done, or the deadline has passed or was called off."""
    ended = threading.Event()
    future.add_done_callback(lambda _: ended.set())
    with deadline.waking(ended.set):
        ended.wait(min(max(deadline.remaining_s(), 0.0), threading.TIMEOUT_MAX))


def _index(keys: Sequence[Key]) -> list[_Entry]:
    entries = []
    shared: tuple[object, ...] = ()
    for key in keys:
        if key[:-1] != shared:
            shared = key[:-1]
            namespace = hashlib.sha256(json.dumps(shared).encode()).hexdigest()
        entries.append((namespace, key.label))
    return entries


def _group(entries: Iterable[_Entry]) -> dict[str, list[str]]:
    """Return the labels of each namespace."""
    labels_by_namespace: dict[str, list[str]] = {}
    for namespace, label in entries:
        labels_by_namespace.setdefault(namespace, []).append(label)
    return labels_by_namespace


def _count_bytes(entry: _Entry, vector: NDArray[np.float32]) -> int:
    return ENTRY_BYTES + 4 * len(entry[1]) + vector.nbytes
