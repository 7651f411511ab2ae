"""Embeddings of any number of images or texts, in files; what is interrupted goes on.

Names are imported when they are first used: `sources` does without what the others need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clip_rt.errors import InputError

if TYPE_CHECKING:
    from clip_rt.bulk.job import Progress as Progress
    from clip_rt.bulk.job import Summary as Summary
    from clip_rt.bulk.job import embed as embed
    from clip_rt.bulk.result import Partition as Partition
    from clip_rt.bulk.result import Result as Result

_MODULE_BY_NAME = {
    "Partition": "result",
    "Progress": "job",
    "Result": "result",
    "Summary": "job",
    "embed": "job",
}
__all__ = sorted(_MODULE_BY_NAME)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULE_BY_NAME[name]}")
    except ModuleNotFoundError as error:
        raise InputError(
            f"bulk embedding needs {error.name}: pip install 'clip-rt[commands]'."
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value
