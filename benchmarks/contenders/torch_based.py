"""What the peers that are made of torch share."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contenders.implementation import count_cores
from clip_rt.specs import CLIP_MEAN, CLIP_STD

_declared: list[object] = []


def set_up() -> None:
    """Give torch as many threads as all contenders have, and make torchvision importable."""
    torch.set_num_threads(count_cores())
    _import_torchvision()


def normalise(pixels_NSSC: NDArray[np.uint8]) -> torch.Tensor:
    """Return float32 (N, 3, S, S) with CLIP's mean and deviation applied, as its towers read it."""
    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    scaled = (pixels_NSSC.astype(np.float32) / 255 - mean) / std
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))


def to_numpy(rows: torch.Tensor) -> NDArray[np.float32]:
    """Return float32 on the processor."""
    array: NDArray[np.float32] = rows.float().cpu().numpy()
    return array


def normalised(rows: torch.Tensor) -> torch.Tensor:
    """Scale rows to length 1."""
    return torch.nn.functional.normalize(rows, dim=-1)


def _import_torchvision() -> None:
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
