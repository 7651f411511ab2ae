"""No test waits for ever: each call that can wait for another thread or process has a limit."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NUM_ARGUMENTS = {"wait": 1, "join": 1, "result": 1, "exception": 1, "communicate": 2, "acquire": 2}
"""Methods that wait, and how many arguments they have when the limit is passed by position."""
FUNCTIONS = {"run", "call", "check_call", "check_output", "Barrier", "urlopen", "create_connection"}
"""Functions that wait, or make what waits; these take the limit by name."""
FUTURES = {"result", "exception"}


def unlimited(source: str) -> Iterator[tuple[int, str]]:
    """Find calls that may wait for ever: their line, and what they call."""
    tree = ast.parse(source)
    barriers = {
        ast.unparse(target)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and _name(node.value).endswith("Barrier")
        for target in node.targets
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.With | ast.AsyncWith):
            for each in node.items:
                name = _name(each.context_expr)
                if name.endswith("Popen"):
                    yield node.lineno, f"with {name}"
        if not isinstance(node, ast.Call) or _has_limit(node):
            continue
        name = _name(node)
        owner, _, function = name.rpartition(".")
        if function in FUNCTIONS and (owner in ("subprocess", "socket", "threading", "request")):
            yield node.lineno, name
        elif isinstance(node.func, ast.Attribute) and function in NUM_ARGUMENTS:
            if len(node.args) < NUM_ARGUMENTS[function] and owner not in barriers:
                yield node.lineno, name
        elif isinstance(node.func, ast.Attribute) and function == "get" and not node.args:
            yield node.lineno, name


def _has_limit(call: ast.Call) -> bool:
    return any(each.arg in ("timeout", "timeout_s", None) for each in call.keywords)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _name(node.func)
    return ast.unparse(node)


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.name)
def test_every_wait_has_a_limit(path: Path) -> None:
    found = list(unlimited(path.read_text(encoding="utf-8")))
    assert not found, f"{path.name} may wait for ever"


WITHOUT = """
with subprocess.Popen(command) as process: pass
process.wait()
process.communicate()
process.communicate(b"input")
subprocess.run(command, check=True)
subprocess.check_output(command)
thread.join()
future.result()
some_queue.get()
lock.acquire()
is_set.wait()
threading.Barrier(2)
socket.create_connection(address)
"""
WITH = """
with open(path) as file: pass
process.wait(10)
process.communicate(timeout=10)
process.communicate(b"input", 10)
subprocess.run(command, **options, timeout=3)
thread.join(5)
", ".join(names)
future.result(timeout=5)
some_queue.get(timeout=3)
a_dict.get("key")
lock.acquire(True, 3)
barrier = threading.Barrier(2, timeout=3)
barrier.wait()
socket.create_connection(address, timeout=1)
"""


def test_a_wait_without_a_limit_is_found() -> None:
    lines = WITHOUT.strip().splitlines()
    assert [line for line in lines if not list(unlimited(line))] == []


def test_a_wait_with_a_limit_is_not() -> None:
    assert list(unlimited(WITH)) == []
