"""Method settings as text: parsing `k=3,schedule=average`, and checking values against annotations."""

from __future__ import annotations

import types
from typing import Literal, Union, get_args, get_origin

from methods.errors import UserError


def parse(text: str) -> dict[str, object]:
    """`"k=3,schedule=average"` -> {"k": 3, "schedule": "average"}. Raises UserError for a piece that is no
    pair."""
    settings: dict[str, object] = {}
    for piece in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not (key and equals and value):
            raise UserError(f"method parameter {piece!r}: write key=value, several separated by commas")
        if key in settings:
            raise UserError(f"method parameter {key} is given twice")
        settings[key] = _value(value)
    return settings


def _value(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def problem_with(value: object, hint: object) -> str | None:
    """Why `value` does not fit the annotation `hint` (class, Literal, union of these); None if it does."""
    return None if _fits(value, hint) else f"is {value!r}; it takes {_words(hint)}"


def _fits(value: object, hint: object) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in get_args(hint))
    if origin in (Union, types.UnionType):
        return any(_fits(value, h) for h in get_args(hint))
    if hint is None or hint is type(None):
        return value is None
    if not isinstance(hint, type):
        return True  # an annotation we have no rule for is the method's own business
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _words(hint: object) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(h) for h in get_args(hint) if h is not type(None))
    return _NAMES.get(hint, str(hint))
