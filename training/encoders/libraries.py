"""open_clip, transformers and torchvision, imported beside whatever torch there is."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from clip_rt.errors import CheckpointError

_declared: list[Any] = []


@contextlib.contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Let whatever a library raises of files and names of others be a `CheckpointError`.

    Their own checks are assertions, RuntimeErrors and what torch, timm and the hub raise.
    """
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{what}: {str(error)[:400] or type(error).__name__}") from error


def import_open_clip() -> Any:
    """Import open_clip.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import_torchvision()
        return importlib.import_module("open_clip")
    except ImportError as error:
        raise CheckpointError(
            f"models of open_clip need it ({error}): pip install 'clip-rt[open-clip]'."
        ) from error


def import_transformers() -> Any:
    """Import transformers, told to draw no bars on whoever's terminal.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import_torchvision()
        library: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise CheckpointError(
            f"models of transformers need it ({error}): pip install 'clip-rt[transformers]'."
        ) from error
    library.utils.logging.disable_progress_bar()
    return library


def import_torchvision() -> None:
    """Import torchvision, whose wheel on PyPI is built for the CUDA torch, beside a CPU torch too.

    Its compiled operators do not load then, and its import fails where it describes two of them to
    torch's tracer. What open_clip and transformers use of it is Python, so declaring the two,
    without any implementation, is enough.
    """
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [each for each in sys.modules if each.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library: Any = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # The declaration lives as long as this object does.
    _declared.append(library)
    importlib.import_module("torchvision")
