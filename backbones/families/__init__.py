"""Model families: all that the project knows of one stands in its file here, and nowhere else.

from backbones import families
families.register(MyFamily())          # of your own; or the entry-point group `visual_token_families`
"""

from __future__ import annotations

from importlib.metadata import entry_points

from torch import nn

from backbones.families.family import Adapter, Family
from backbones.families.llava import Llava
from backbones.families.qwen2_5_vl import Qwen2_5_VL
from backbones.families.qwen2_vl import Qwen2VL
from methods.errors import UserError

#: entry points of other packages; each value is a subclass of Family
GROUP = "visual_token_families"

_FAMILIES: dict[str, Family] = {}
_looked_for_others = False


def register(family: Family) -> Family:
    """Make a family known by its `model_type`; a later one of the same type takes the place of the first."""
    _FAMILIES[family.model_type] = family
    return family


def known() -> dict[str, Family]:
    """All families by model_type: those here, in other packages' entry points, and registered ones.

    Raises UserError, naming the entry point, if one cannot be imported or is no Family.
    """
    global _looked_for_others
    if not _looked_for_others:
        for point in entry_points(group=GROUP):
            try:
                family = point.load()()
            except Exception as error:  # whatever another package's module raises
                raise UserError(
                    f"the entry point {point.name} = {point.value} in the group {GROUP} cannot be loaded "
                    f"({type(error).__name__}: {error}); mend or uninstall its package"
                ) from error
            if not isinstance(family, Family):
                raise UserError(
                    f"the entry point {point.name} = {point.value} in the group {GROUP} is no subclass of "
                    "backbones.families.family.Family"
                )
            _FAMILIES.setdefault(family.model_type, family)
        _looked_for_others = True
    return dict(_FAMILIES)


def of_type(model_type: str) -> Family:
    """The family of a `config.model_type`. Raises UserError, with the known ones, if there is none."""
    found = known()
    if model_type not in found:
        raise UserError(f"model family {model_type!r} is unknown; known: {', '.join(found)}")
    return found[model_type]


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a loaded model. Raises UserError if its family is not known, or not in this form."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in known() or not hasattr(model, "generate"):
        raise UserError(
            f"a {type(model).__name__} of family {kind!r} cannot be pruned; "
            f"use a generative model of: {', '.join(known())}"
        )
    return of_type(kind).adapter(model)


for _family in (Llava(), Qwen2_5_VL(), Qwen2VL()):
    register(_family)
