"""Can a method's answer be applied? Every Selection passes here before anything is indexed with it, before
and inside the language model, whoever wrote the method.

Types, shapes and dtypes are known on the host. What has to be read off the device (range, repetitions, finite
tokens) is one synchronisation per call, for all images or samples of it together; with answers of one length,
a dozen small kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Pruner, Selection
from methods.errors import BadSelection


@dataclass(frozen=True)
class Offer:
    """What a method was asked about.

    Attributes:
        like: [.., d], a tensor of the width, dtype and device of the visual tokens that were offered.
        tokens: V.
        places: the most tokens that there is room for.
        width: D, of the language model, for tokens that are `projected`.
    """

    like: Tensor
    tokens: int
    places: int
    width: int


def check_selections(pruner: Pruner, answers: object, offers: Sequence[Offer]) -> None:
    """Raises BadSelection, naming method and field, unless there is one fitting Selection per offer."""
    if not isinstance(answers, list | tuple) or len(answers) != len(offers):
        given = f"{len(answers)} answers" if isinstance(answers, list | tuple) else _called(answers)
        raise BadSelection(
            f"{pruner.name}: select_all returned {given} for {len(offers)} images; return a list with one "
            "Selection per image"
        )
    pairs = list(zip(answers, offers))
    for answer, offer in pairs:
        if problem := _by_its_looks(answer, offer):
            raise BadSelection(f"{pruner.name}: {problem}")
    for (answer, offer), values in zip(pairs, _values(pairs)):
        if problem := _by_its_values(answer, offer, *values):
            raise BadSelection(f"{pruner.name}: {problem}")


def _by_its_looks(answer: object, offer: Offer) -> str:
    """What is wrong with the answer as far as the host can see; empty if nothing is."""
    if not isinstance(answer, Selection):
        return f"it returned {_called(answer)}; return a methods.base.Selection"
    for name in ("kept", "places", "merged"):
        value = getattr(answer, name)
        if name != "kept" and value is None:
            continue
        if problem := _no_index(value, offer.like.device):
            return f"Selection.{name} {problem}"
    n = len(answer.kept)
    if not n:
        return "Selection.kept is empty; keep at least one token"
    if n > offer.places:
        return f"Selection.kept has {n} tokens of {offer.tokens} offered; there is room for {offer.places}"
    if answer.places is not None and len(answer.places) != n:
        return f"Selection.places has {len(answer.places)} entries for {n} tokens"
    if answer.merged is not None and len(answer.merged) != offer.tokens:
        return f"Selection.merged has {len(answer.merged)} entries for {offer.tokens} tokens offered"
    if answer.tokens is None:
        given = "projected" if answer.projected else "merged" if answer.merged is not None else None
        return f"Selection.{given} is set, but there are no tokens" if given else ""
    return _no_values(answer.tokens, n, offer, offer.width if answer.projected else offer.like.shape[-1])


def _no_index(value: object, device: torch.device) -> str:
    wanted = "; give int64 indices of the tokens to keep"
    if not isinstance(value, Tensor):
        return f"is {_called(value)}{wanted}"
    if value.dtype == torch.bool:
        return f"is a boolean mask of shape {tuple(value.shape)}{wanted} (mask.nonzero()[:, 0])"
    if value.dtype != torch.int64:
        return f"has dtype {_short(value.dtype)}{wanted}"
    if value.ndim != 1:
        return f"has shape {tuple(value.shape)}; give one dimension"
    if value.device != device:
        return f"is on {value.device}, the visual tokens on {device}"
    return ""


def _no_values(tokens: object, n: int, offer: Offer, width: int) -> str:
    if not isinstance(tokens, Tensor):
        return f"Selection.tokens is {_called(tokens)}; give a tensor of shape {(n, width)}"
    if tuple(tokens.shape) != (n, width):
        return f"Selection.tokens has shape {tuple(tokens.shape)}; {(n, width)} is expected, one row per kept"
    if tokens.dtype != offer.like.dtype:
        dtypes = [_short(t.dtype) for t in (tokens, offer.like)]
        return "Selection.tokens has dtype {}, the tokens offered {}".format(*dtypes)
    if tokens.device != offer.like.device:
        return f"Selection.tokens is on {tokens.device}, the visual tokens on {offer.like.device}"
    return ""


@torch.no_grad()
def _values(pairs: Sequence[tuple[Selection, Offer]]) -> list[list[int]]:
    """[least of kept, most, smallest gap between two of them, least and most of places, least and most of
    merged, most of merged among the kept, tokens finite] of each answer, by one transfer from the device."""
    groups: dict[int, list[int]] = {}
    for i, (answer, _) in enumerate(pairs):
        groups.setdefault(len(answer.kept), []).append(i)
    rows = []
    for n, members in groups.items():
        kept = torch.stack([pairs[i][0].kept for i in members]).sort(dim=1).values
        gap = (kept[:, 1:] - kept[:, :-1]).amin(1) if n > 1 else torch.ones_like(kept[:, 0])
        places = torch.stack([_places(pairs[i][0]) for i in members])
        merged = torch.stack([_merged(pairs[i][0]) for i in members])
        own = [kept[:, 0], kept[:, -1], gap, places.amin(1), places.amax(1)]
        rows.append(torch.cat([torch.stack(own, 1), merged], 1))
    order = [i for members in groups.values() for i in members]
    finite = [_finite(pairs[i][0]) for i in order]
    table = torch.cat([torch.cat(rows), torch.stack(finite)[:, None]], 1).tolist()
    return [own for _, own in sorted(zip(order, table))]


def _places(answer: Selection) -> Tensor:
    return torch.zeros_like(answer.kept) if answer.places is None else answer.places


def _merged(answer: Selection) -> Tensor:
    """int64 [3]: least and most of `merged`, and most of it among the tokens that were kept."""
    if answer.merged is None:
        return answer.kept.new_full((3,), -1)
    kept = answer.kept.clamp(0, len(answer.merged) - 1)  # a token out of range is refused for itself
    own = torch.where(answer.kept < 0, -1, answer.merged[kept]).amax()
    return torch.stack([*torch.aminmax(answer.merged), own])


def _finite(answer: Selection) -> Tensor:
    """int64 scalar, 1 if all given tokens are finite."""
    if answer.tokens is None or not answer.tokens.numel():
        return answer.kept.new_ones(())
    return torch.stack(torch.aminmax(answer.tokens)).isfinite().all().long()  # NaN passes through aminmax


def _by_its_values(
    answer: Selection, offer: Offer, least: int, most: int, gap: int, first: int, last: int,
    lowest: int, highest: int, own: int, finite: int,
) -> str:  # fmt: skip
    if most >= offer.tokens:
        return f"Selection.kept names token {most}; {offer.tokens} were offered, counted from 0"
    if answer.tokens is None and least < 0:
        return f"Selection.kept names token {least}; only tokens given in Selection.tokens may be negative"
    if answer.tokens is None and gap == 0:
        return "Selection.kept names a token twice; name each once, or give Selection.tokens"
    if first < 0 or last >= offer.tokens:
        wrong = first if first < 0 else last
        return f"Selection.places names token {wrong}; {offer.tokens} were offered, counted from 0"
    if lowest < -1 or highest >= len(answer.kept):
        wrong = lowest if lowest < -1 else highest
        return f"Selection.merged names place {wrong}; {len(answer.kept)} tokens are kept, counted from 0"
    if own >= 0:
        return "Selection.merged says of a token in Selection.kept that another one took it in; give it -1"
    return "" if finite else "Selection.tokens holds numbers that are not finite (NaN or infinite)"


def check_budget(pruner: Pruner, sizes: Sequence[Sequence[int]], left: Sequence[int]) -> None:
    """Raises BadSelection if more visual tokens than the budget enter the last layer.

    Args:
        pruner: with the budget; one that `may_exceed_budget` is not checked.
        sizes: visual tokens of each image of each sample, unpruned.
        left: visual tokens of each sample in the last layer.
    """
    if pruner.budget is None or not pruner.acts or pruner.may_exceed_budget:
        return
    for own, n in zip(sizes, left):
        budget = sum(map(pruner.count, own))
        if n > budget:
            raise BadSelection(
                f"{pruner.name}: {n} visual tokens are left in the last layer, its budget is {budget}; keep "
                "fewer, or set may_exceed_budget and say so in the docstring"
            )


def _called(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
