"""StepPrune: Stepwise Token Selection for Efficient Multimodal Large Language Models (arXiv 2606.16067).

The method itself is in `method`, its training in `training`. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from methods.stepprune.method import StepPrune

__all__ = ["StepPrune"]


def __getattr__(name: str):
    if name == "StepPrune":
        from methods.stepprune.method import StepPrune

        return StepPrune
    raise AttributeError(name)
