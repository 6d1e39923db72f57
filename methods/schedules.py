"""Layer lists for models of any depth, and what they mean for the mean number of visual tokens."""

from __future__ import annotations

from collections.abc import Sequence

from methods.errors import UserError

#: decoder layers of the model (7B) that authors' layer lists are written for
AUTHORS_LAYERS = 32
#: how far from the budget a schedule's mean over the layers may be, as a share of it
TOLERANCE = 0.02


def scaled(cuts: Sequence[int], layers: int) -> list[int]:
    """Cuts "after so many of 32 layers" for a model of `layers` layers: round(cut * layers / 32).

    Where that would put two cuts in one place or one at an end of the model, it moves to the nearest place
    that keeps them ascending, distinct and between 1 and layers - 1. Raises UserError for a model of too few
    layers.
    """
    if layers <= len(cuts):
        raise UserError(f"{len(cuts)} cuts between layers need a model of more than {layers} layers")
    result: list[int] = []
    for i, cut in enumerate(cuts):
        lowest = result[-1] + 1 if result else 1
        highest = layers - (len(cuts) - i)
        result.append(min(max(round(cut * layers / AUTHORS_LAYERS), lowest), highest))
    return result


def mean_over_layers(cuts: Sequence[int], tokens: Sequence[float], layers: int) -> float:
    """Mean over the layers' inputs. tokens: visual tokens at the input and after each of the `cuts`."""
    ends = [*cuts, layers]
    return sum(n * (end - start) for n, start, end in zip(tokens, [0, *cuts], ends)) / layers
