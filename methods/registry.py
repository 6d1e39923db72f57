"""Finding methods: modules of this package that register a class, and other packages' entry points."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
import sys
from dataclasses import fields
from typing import TypeVar

from methods.base import Pruner
from methods.errors import UserError
from methods.settings import parse

GROUP = "visual_token_pruners"
_NOT_METHODS = ("base", "registry", "errors", "settings", "schedules", "together", "clip_text", "learned")

_registered: dict[str, type[Pruner]] = {}
#: what could not be imported -> (the name by which it would be asked for, the line that says why)
_left_out: dict[str, tuple[str, str]] = {}
P = TypeVar("P", bound=type[Pruner])


def register(cls: P) -> P:
    """Class decorator: makes the method known under `cls.name`.

    Raises:
        UserError: the class cannot be a method, or another one has its name.
    """
    where = f"{cls.__module__}.{cls.__qualname__}"
    if not (isinstance(cls, type) and issubclass(cls, Pruner)):
        raise UserError(f"{where} is no subclass of methods.base.Pruner")
    if not cls.name or "__dataclass_fields__" not in vars(cls):
        raise UserError(f"{where}: give it a class attribute `name` and the decorator @dataclass")
    other = _registered.get(cls.name, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UserError(
            f"two methods are named {cls.name}: {where} and {other.__module__}.{other.__qualname__}"
        )
    _registered[cls.name] = cls
    return cls


def available(answer_key: bool = False) -> dict[str, type[Pruner]]:
    """All methods by name: vanilla first, then in alphabetical order. A module of this package that cannot
    be imported, and a plug-in that cannot be loaded, are left out, with one line on stderr.

    Args:
        answer_key: whether controls that know the answer key are among them.
    """
    _import_own()
    for point in _plugins(importlib.metadata.entry_points, tuple(sys.path)):
        _take_plugin(point)
    found = {name: cls for name, cls in _registered.items() if answer_key or not cls.answer_key}
    return dict(sorted(found.items(), key=lambda item: (item[0] != "vanilla", item[0])))


@functools.lru_cache(maxsize=1)
def _plugins(entry_points, path: tuple[str, ...]) -> tuple[importlib.metadata.EntryPoint, ...]:
    """The installed ones; 5 ms a look at all packages, and asked hundreds of times. path: Python's; another
    one has other packages."""
    return tuple(entry_points(group=GROUP))


def _take_plugin(point: importlib.metadata.EntryPoint) -> None:
    package = point.dist.name if point.dist else point.value
    what = f"pruner plug-in {point.name} of package {package}"
    if what in _left_out:
        return
    try:
        register(point.load())
    except Exception as error:  # whatever somebody else's module raises
        _leave_out(what, point.name, f"{what} cannot be loaded ({_reason(error)}); fix or uninstall it")


@functools.cache
def _import_own() -> None:
    import methods

    for module in pkgutil.iter_modules(methods.__path__):
        if module.name.startswith("_") or module.name in _NOT_METHODS:
            continue
        inner = ".method" if module.ispkg else ""  # a package's __init__ imports nothing heavy
        before = dict(_registered)
        try:
            importlib.import_module(f"methods.{module.name}{inner}")
        except Exception as error:  # a syntax error, a missing package, or what the module itself raises
            _registered.clear()
            _registered.update(before)
            what = f"methods/{module.name}{inner.replace('.', '/')}.py"
            _leave_out(what, module.name, f"{what} cannot be imported ({_reason(error)}); the others go on")


def _leave_out(what: str, name: str, line: str) -> None:
    """Say it once."""
    if what not in _left_out:
        _left_out[what] = (name, line)
        print(f"LEFT OUT {line}", file=sys.stderr)


def _reason(error: Exception) -> str:
    line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {text}{line}"


def build(spec: str, budget: int | float | None = None) -> Pruner:
    """A pruner by its spec: `build("fastv:k=3,schedule=average", budget=64)`.

    Args:
        spec: the method's name; behind a colon its settings, with commas between them.
        budget: see `Pruner`.

    Raises:
        UserError: an unknown method or parameter (it lists the known ones), or a value that does not fit.
    """
    name, _, text = spec.partition(":")
    methods = available(answer_key=True)
    if name not in methods:
        for left_out, line in _left_out.values():
            if name == left_out:
                raise UserError(f"method {name} is not available: {line}")
        raise UserError(f"unknown method {name!r}; known: {', '.join(methods)}")
    cls = methods[name]
    settings = parse(text)
    known = [f.name for f in fields(cls) if f.init and f.name != "budget"]
    for key in settings:
        if key not in known:
            raise UserError(f"{name} has no parameter {key!r}; it takes: {', '.join(known) or 'none'}")
    return cls(budget=budget, **settings)
