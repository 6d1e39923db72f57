"""Method settings as text: parsing `k=3,schedule=average`, and checking values against annotations."""

from __future__ import annotations

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from methods.errors import UserError

#: whole numbers beyond this do not fit where torch wants them
LARGEST = 2**63 - 1
_RULES = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "a text",
}


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
    """Why `value` does not fit the annotation `hint`; None if it does. Nothing is converted, but a whole
    number passes where any number will do; numbers are finite."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"is {value}; whole numbers go up to {LARGEST}"
    try:
        TypeAdapter(hint, config=_RULES).validate_python(value, strict=True)
    except ValidationError as error:
        wanted = [e["msg"].removeprefix("Input should be ") for e in error.errors()]
        return f"is {value!r}; it takes {' or '.join(_WORDS.get(w, w) for w in wanted)}"
    except PydanticSchemaGenerationError:  # an annotation without a rule is the method's own business
        return None
    return None
