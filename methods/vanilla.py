"""The unpruned model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.base import Pruner
from methods.registry import register


@register
@dataclass
class Vanilla(Pruner):
    """All visual tokens, the reference of every ratio. A budget is ignored; the per-layer counts are
    traced."""

    name: ClassVar[str] = "vanilla"

    @property
    def acts(self) -> bool:
        return False
