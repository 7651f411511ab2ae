"""For all tests: signals, time limits, and the reference they compare with, open_clip."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
from processes import make_signals_deliverable

pytest_plugins = ["time_limits"]

OPEN_CLIP_VERSION = "3.3.0"

_declared: list[object] = []


def pytest_configure() -> None:
    make_signals_deliverable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "open_clip" in getattr(item, "fixturenames", ()):
            item.add_marker("torch")


@pytest.fixture(scope="session")
def open_clip() -> ModuleType:
    _import_torchvision()
    module = importlib.import_module("open_clip")
    assert module.__version__ == OPEN_CLIP_VERSION, "parity is proven against this version only"
    return module


def _import_torchvision() -> None:
    """Import torchvision, whose wheel on PyPI is built for the CUDA torch, beside a CPU torch too.

    Its compiled operators do not load then, and its import fails where it describes two of them
    to torch's tracer. The transforms that open_clip uses on PIL images are Python only and need
    none, so declaring the two operators, without any implementation, is enough.
    """
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    import torch

    for name in [each for each in sys.modules if each.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # The declaration lives as long as this object does.
    _declared.append(library)
    importlib.import_module("torchvision")
