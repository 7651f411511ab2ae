"""The drawing of the errors is what the classes are."""

from __future__ import annotations

import inspect
import pickle
import re

import clip_rt
from clip_rt import errors


def read_drawing() -> dict[str, str]:
    """Return the parent of each class in the drawing, by name."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^((?:[│ ]   )*)(?:[├└]── )?(\w+Error)\b", line)
        if match is None:
            continue
        depth = len(match[1]) // 4 + ("──" in line)
        path[depth:] = [match[2]]
        parents[match[2]] = path[depth - 1] if depth else "Exception"
    return parents


def find_classes() -> dict[str, type]:
    classes = vars(errors).items()
    return {n: c for n, c in classes if inspect.isclass(c) and issubclass(c, Exception)}


def test_the_drawing_shows_every_class_under_its_parent():
    assert read_drawing() == {
        name: each.__bases__[0].__name__ for name, each in find_classes().items()
    }


def test_every_error_is_public_and_explained():
    for name, each in find_classes().items():
        assert getattr(clip_rt, name) is each
        assert each.__doc__


def test_builtin_parents_are_kept():
    assert issubclass(clip_rt.InputError, ValueError)
    assert issubclass(clip_rt.ServerTimeoutError, TimeoutError)


def test_only_passing_faults_are_retryable():
    retryable = {name for name, each in find_classes().items() if each.retryable}
    assert retryable == {
        "SearchIndexLockedError",
        "ServerUnavailableError",
        "ServerOverloadedError",
    }


def test_public_names_are_complete_sorted_and_there():
    public = [name for name in clip_rt.__all__ if not name.startswith("_")]
    constants = [name for name in public if name.isupper()]
    classes = [name for name in public if name[0].isupper() and name not in constants]
    functions = [name for name in public if name.islower()]
    assert public == sorted(constants) + sorted(classes) + sorted(functions)
    for name in clip_rt.__all__:
        assert getattr(clip_rt, name) is not None
        assert name in dir(clip_rt)


def test_errors_cross_processes():
    error = clip_rt.ServerUnavailableError("gone", url="127.0.0.1:1")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.url) == (type(error), "gone", "127.0.0.1:1")
