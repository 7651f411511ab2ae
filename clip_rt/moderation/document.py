"""JSON of others in, frozen dataclasses out; what does not fit is refused by the name of its field.

Types are taken strictly: true is no number, 1.0 no count, and no field may be there that is not
known, so that a misspelt one is not passed over.
"""

from __future__ import annotations

import json
import math
import types
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from clip_rt.errors import PolicyError

Class = TypeVar("Class")

_NAME_BY_TYPE = {
    str: "a text",
    float: "a number",
    int: "a whole number",
    bool: "true or false",
}


def read_object(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object that a text is.

    Raises:
        PolicyError: it is none, or has a field twice.
    """
    try:
        document = json.loads(text, object_pairs_hook=_pair, parse_constant=_refuse_constant)
    # Bytes that are no text are a ValueError too.
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"it is no JSON that can be read: {error}.") from error
    if not isinstance(document, dict):
        raise PolicyError(f"it is {_describe(document)}; it must be an object, in braces.")
    return document


def build(cls: type[Class], document: Mapping[str, Any]) -> Class:
    """Return the dataclass that an object says.

    Args:
        cls: A dataclass of texts, numbers, truth values, literals, tuples and such dataclasses, any
            of which may be None where its annotation says so.
        document: Its fields.

    Raises:
        PolicyError: a field is missing, not known, of another type, or refused by its class.
    """
    hints = get_type_hints(cls)
    known = {each.name: each for each in fields(cls)}  # type: ignore[arg-type]
    for name in document:
        if name not in known:
            raise PolicyError(
                f"{name!r:.80} is not known here; known are {', '.join(known)}. Correct it, or "
                "leave it out.",
                field=name,
            )
    for name, each in known.items():
        if name not in document and each.default is MISSING:
            raise PolicyError(f"{name} is missing; add it.", field=name)
    return cls(**{name: _convert(value, hints[name], name) for name, value in document.items()})


def _convert(value: object, hint: Any, field: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (hint,) = (each for each in arguments if each is not types.NoneType)
        return None if value is None else _convert(value, hint, field)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            _refuse(value, field, f"one of {', '.join(map(json.dumps, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            _refuse(value, field, "a list")
        return tuple(
            _convert(each, arguments[0], f"{field}[{index}]") for index, each in enumerate(value)
        )
    if is_dataclass(hint):
        if not isinstance(value, dict):
            _refuse(value, field, "an object")
        try:
            return build(hint, value)  # type: ignore[arg-type]
        except PolicyError as error:
            # A message begins with the field, as it is called within.
            raise PolicyError(f"{field}.{error}", field=f"{field}.{error.field}") from error
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not hint or (isinstance(value, float) and not math.isfinite(value)):
        _refuse(value, field, _NAME_BY_TYPE[hint])
    return value


def _refuse(value: object, field: str, what: str) -> NoReturn:
    raise PolicyError(f"{field} is {_describe(value)}; it must be {what}.", field=field)


def _describe(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else f"{json.dumps(value):.80}"


def _pair(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r:.80} is there twice in one object")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
