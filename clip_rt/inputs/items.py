"""What counts as a list, one rule for images, texts, labels and templates: ordered, one axis.

Lists, tuples, generators, arrays of one axis, columns of a table and views of a dict are lists. A
table, a mapping, a set or an array of several axes can be iterated in Python too, over something
else than its author means: the names of its columns, its keys, no certain order, its rows.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Mapping, MappingView, Set
from typing import Any, Literal, TypeAlias

from clip_rt.errors import InputError

OnError: TypeAlias = Literal["raise", "skip"]
"""What an unusable item does: end the call, or be left out and reported."""

MAX_SHOWN = 5
"""Names of columns that an error shows."""


def check_list(given: object, name: str, what: str, error: type[InputError]) -> Iterable[Any]:
    """Return what was given, to be iterated over, if it is a list; none of its items is looked at.

    Args:
        given: Anything; a string is no list, whatever else its meaning.
        name: Of the argument, for the error.
        what: Its items are, in the plural, for the error.
        error: To raise.

    Raises:
        InputError: as `error`; it is no list. The message says what to pass instead.
    """
    kind = type(given).__name__
    num_axes = count_axes(given)
    if isinstance(given, (str, bytes, bytearray, memoryview)):
        way_out = f"Pass a list of {what}, [{name[:-1]}] for one alone; bytes are decoded first."
    elif isinstance(given, Mapping):
        way_out = f"Pass a list: list({name}) of its keys, or list({name}.values())."
    elif isinstance(given, Set) and not isinstance(given, MappingView):
        way_out = f"Pass a list in an order of your choice: sorted({name})."
    elif hasattr(given, "__dataframe__") or num_axes == 2:
        way_out = _choose_column(given, name)
    elif num_axes not in (None, 1):
        way_out = f"It has {num_axes} axes: pass {name}.ravel().tolist()."
    elif not isinstance(given, Iterable):
        way_out = f"Pass a list or a generator of {what}."
    else:
        return given
    raise error(f"{name} is a {kind}, which is no ordered, one-dimensional list. {way_out}")


def count_axes(given: object) -> int | None:
    """Return how many axes an array or a table says it has; None where it says nothing."""
    try:
        num_axes = getattr(given, "ndim", None)
        if isinstance(num_axes, int):
            return num_axes
        shape = getattr(given, "shape", None)
        # Of a class, these are descriptions of its instances'.
        return None if shape is None or isinstance(given, type) else len(shape)
    # Whatever it is: its attributes are of anyone's making.
    except Exception:
        return None


def describe_non_string(item: object) -> str:
    """Say what stands in place of a string, and what to do; the rest of a sentence on it."""
    kind = type(item).__name__
    is_nan = isinstance(item, numbers.Real) and item != item
    if item is None or is_nan or kind in ("NAType", "NaTType", "MaskedConstant"):
        return (
            f"is a missing value, {item!r:.20}; it must be a str. Leave it out (.dropna() of a "
            "column) or fill it in (.fillna('nothing'))."
        )
    if isinstance(item, (bytes, bytearray)):
        return f"is a {kind}; it must be a str. Decode bytes with .decode('utf-8')."
    if hasattr(item, "as_py"):
        return f"is a {kind}; it must be a str. Pass the whole list as .to_pylist()."
    return f"is a {kind}; it must be a str."


def _choose_column(given: object, name: str) -> str:
    columns: Any = getattr(given, "column_names", None) or getattr(given, "columns", None)
    try:
        names = [] if columns is None else list(columns)
    # As above.
    except Exception:
        names = []
    if not names:
        return f"It has two axes: pass one column, {name}[:, 0], or {name}.ravel().tolist()."
    list_of = ".to_pylist()" if hasattr(given, "to_pylist") else ""
    shown = ", ".join(f"{each!r:.40}" for each in names[:MAX_SHOWN])
    more = ", ..." if len(names) > MAX_SHOWN else ""
    return (
        f"Iterating over it gives no row of it: pass one of its columns, such as "
        f"{name}[{names[0]!r:.40}]{list_of}. It has {shown}{more}."
    )


def check_on_error(on_error: str) -> None:
    """Refuse what is not an `OnError`.

    Raises:
        InputError: it is not.
    """
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error is {on_error!r:.40}; it must be 'raise' or 'skip'.")


def check_whole_number(given: object, name: str, *, most: int | None = None) -> int:
    """Return what was given as a number.

    Raises:
        InputError: it is no whole number, below 1 or above `most`.
    """
    try:
        number = operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number < 1 or (most is not None and number > most):
        span = "from 1" if most is None else f"1 to {most}"
        raise InputError(f"{name} is {given!r}; it must be a whole number {span}.")
    return number
