"""Class embeddings that were computed before, within a bound of memory.

A cache changes how long a call takes, never what it returns: the key holds all that the vector
depends on.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ENTRY_BYTES = 500
"""About what a key and the bookkeeping take beside the vector."""


class Key(NamedTuple):
    """Everything a class embedding depends on."""

    weights: str
    """Fingerprint of the model, its precision and its activation."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    context_length: int
    templates: tuple[str, ...]
    label: str


class EmbeddingCache:
    """The most recently used embeddings, as many as fit into `max_bytes`. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._vector_by_key: OrderedDict[Key, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()
        _caches.add(self)

    def __len__(self) -> int:
        return len(self._vector_by_key)

    def get(self, key: Key) -> NDArray[np.float32] | None:
        """Return the embedding, float32 (D,), or None."""
        with self._lock:
            vector = self._vector_by_key.get(key)
            if vector is not None:
                self._vector_by_key.move_to_end(key)
            return vector

    def put(self, key: Key, vector: NDArray[np.float32]) -> None:
        """Keep a copy of an embedding, and forget the least recently used beyond the bound."""
        with self._lock:
            replaced = self._vector_by_key.pop(key, None)
            if replaced is not None:
                self.num_bytes -= _count_bytes(key, replaced)
            self._vector_by_key[key] = vector.copy()
            self.num_bytes += _count_bytes(key, vector)
            while self.num_bytes > self.max_bytes and self._vector_by_key:
                self.num_bytes -= _count_bytes(*self._vector_by_key.popitem(last=False))


_caches: weakref.WeakSet[EmbeddingCache] = weakref.WeakSet()
_held: list[threading.Lock] = []


def _hold_all() -> None:
    """Before a fork: no thread may be in the middle of a change, or the child inherits it so."""
    for cache in _caches:
        cache._lock.acquire()
        _held.append(cache._lock)


def _release_all() -> None:
    while _held:
        _held.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_all, after_in_parent=_release_all, after_in_child=_release_all)


def _count_bytes(key: Key, vector: NDArray[np.float32]) -> int:
    return ENTRY_BYTES + 4 * len(key.label) + vector.nbytes
