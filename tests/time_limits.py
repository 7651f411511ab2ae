"""The limit behind the limit: where a test cannot be stopped, the whole run is.

pytest-timeout (`timeout` in pyproject.toml, `@pytest.mark.timeout` for one test) stops a test by
SIGALRM: the test fails with the stacks of all threads, its fixtures clean up, and the others run.
That takes an interpreter that gets to its next instruction. It does not where a call into C never
returns, in a fixture that hangs after the test has failed, in a module that hangs while it is
imported, and at the end, when Python waits for threads. There a watchdog of the interpreter's,
which needs no GIL, writes the stacks of all threads and ends the process with exit code 1.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator

import pytest

_stderr = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "timeout_grace",
        "Seconds between a test's time limit and the end of the whole run, if the test still hangs",
        default="60",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_stderr] = os.dup(2)  # Later 2 is what pytest captures.


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    _watch(session.config, _limit_s(session.config))
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    _watch(item.config, _limit_s(item.config, item))
    return (yield)


# Each part anew: pytest ends a watch when it shows an error, before fixtures are torn down.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    _watch(item.config, _limit_s(item.config, item))
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    _watch(item.config, _limit_s(item.config, item))
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    _watch(config, 0.0)


def _limit_s(config: pytest.Config, item: pytest.Item | None = None) -> float:
    marker = item.get_closest_marker("timeout") if item is not None else None
    if marker is not None:
        return float(marker.args[0])
    return float(config.getoption("timeout") or config.getini("timeout") or 0)


def _watch(config: pytest.Config, limit_s: float) -> None:
    grace_s = float(config.getini("timeout_grace"))
    faulthandler.dump_traceback_later(limit_s + grace_s, exit=True, file=config.stash[_stderr])
