"""For all tests: signals, time limits, and the reference they compare with, open_clip."""

from __future__ import annotations

from types import ModuleType

import pytest
from processes import make_signals_deliverable

pytest_plugins = ["time_limits"]

OPEN_CLIP_VERSION = "3.3.0"


def pytest_configure() -> None:
    make_signals_deliverable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "open_clip" in getattr(item, "fixturenames", ()):
            item.add_marker("torch")


@pytest.fixture(scope="session")
def open_clip() -> ModuleType:
    # Here, because it needs torch, and most tests of the client do not.
    from training.encoders.libraries import import_open_clip

    module: ModuleType = import_open_clip()
    assert module.__version__ == OPEN_CLIP_VERSION, "parity is proven against this version only"
    return module
