"""What happens in a forked child: each object makes anew what it cannot share with the parent.

The child has one thread, and copies of locks that others may have held, of channels that are the
parent's and of servers that the parent ends.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Owner = TypeVar("Owner")

_restart_by_owner: weakref.WeakKeyDictionary[Any, Callable[[Any], object]] = (
    weakref.WeakKeyDictionary()
)


def restart_in_child(owner: Owner, restart: Callable[[Owner], object]) -> None:
    """Have `restart(owner)` called in each forked child, as long as `owner` exists."""
    _restart_by_owner[owner] = restart


def in_child(hook: Callable[[], object]) -> None:
    """Have `hook` called in each forked child."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=hook)


def _restart_all() -> None:
    for owner, restart in list(_restart_by_owner.items()):
        restart(owner)


in_child(_restart_all)
