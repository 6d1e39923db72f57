"""Finding methods: modules of this package that register a class, and other packages' entry points."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from dataclasses import fields
from typing import TypeVar

from methods.base import Pruner
from methods.errors import UserError
from methods.settings import parse

GROUP = "visual_token_pruners"
_NOT_METHODS = ("base", "registry", "errors", "settings", "schedules")

_registered: dict[str, type[Pruner]] = {}
P = TypeVar("P", bound=type[Pruner])


def register(cls: P) -> P:
    """Class decorator: makes the method known under `cls.name`.

    Raises UserError if the class cannot be a method or another one has its name.
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


def available() -> dict[str, type[Pruner]]:
    """All methods by name: vanilla first, then in alphabetical order. Raises UserError for a broken
    plug-in."""
    _import_own()
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            cls = point.load()
        except Exception as error:
            package = point.dist.name if point.dist else point.value
            raise UserError(
                f"pruner plug-in {point.name} of package {package} cannot be loaded ({error}); "
                "fix or uninstall it"
            ) from error
        register(cls)
    return dict(sorted(_registered.items(), key=lambda item: (item[0] != "vanilla", item[0])))


@functools.cache
def _import_own() -> None:
    import methods

    for module in pkgutil.iter_modules(methods.__path__):
        if not module.name.startswith("_") and module.name not in _NOT_METHODS:
            inner = ".method" if module.ispkg else ""  # a package's __init__ imports nothing heavy
            importlib.import_module(f"methods.{module.name}{inner}")


def build(spec: str, budget: int | float | None = None) -> Pruner:
    """`build("fastv:k=3,schedule=average", budget=64)`.

    Raises UserError for an unknown method or parameter (it lists the known ones), or a value that does not
    fit.
    """
    name, _, text = spec.partition(":")
    methods = available()
    if name not in methods:
        raise UserError(f"unknown method {name!r}; known: {', '.join(methods)}")
    cls = methods[name]
    settings = parse(text)
    known = [f.name for f in fields(cls) if f.init and f.name != "budget"]
    for key in settings:
        if key not in known:
            raise UserError(f"{name} has no parameter {key!r}; it takes: {', '.join(known) or 'none'}")
    return cls(budget=budget, **settings)
