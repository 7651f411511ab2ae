"""What happens at a fork of the process, in one place and in this order.

A forked child has one thread, and copies of locks that others may have held, of channels that are
the parent's and of servers that the parent ends. Each module says what it has to make anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable

ORDER = (
    "telemetry",
    "cache",
    "ownership",
    "sharing",
    "server",
    "transport",
    "connection",
    "session",
)
"""In the child, and in the parent after the fork; before it the other way round. What is first is
used by what comes later."""

Hook = Callable[[], object]

_before: dict[str, Hook] = {}
_in_parent: dict[str, Hook] = {}
_in_child: dict[str, Hook] = {}


def register(
    name: str, *, in_child: Hook, before: Hook | None = None, in_parent: Hook | None = None
) -> None:
    """Have hooks called at each fork.

    Args:
        name: One of `ORDER`; a module registers once.
        in_child: After the fork, in the child.
        before: Before it, in the parent.
        in_parent: After it, in the parent.
    """
    if name not in ORDER:
        raise ValueError(f"{name!r} has no place in ORDER")
    _in_child[name] = in_child
    if before is not None:
        _before[name] = before
    if in_parent is not None:
        _in_parent[name] = in_parent


def _call(hooks: dict[str, Hook], names: tuple[str, ...]) -> None:
    for name in names:
        if name in hooks:
            hooks[name]()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _call(_before, ORDER[::-1]),
        after_in_parent=lambda: _call(_in_parent, ORDER),
        after_in_child=lambda: _call(_in_child, ORDER),
    )
