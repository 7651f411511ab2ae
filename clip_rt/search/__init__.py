"""Search of one's own images: an index of embeddings on disk, kept up to date, and asked."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_rt.search.index import Index as Index
    from clip_rt.search.index import default_folder as default_folder
    from clip_rt.search.query import Query as Query
    from clip_rt.search.results import Hit as Hit
    from clip_rt.search.update import Report as Report
    from clip_rt.search.where import Where as Where

_MODULE_BY_NAME = {
    "Hit": "results",
    "Index": "index",
    "Query": "query",
    "Report": "update",
    "Where": "where",
    "default_folder": "index",
}

__all__ = ["Hit", "Index", "Query", "Report", "Where", "default_folder"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_BY_NAME[name]}"), name)
