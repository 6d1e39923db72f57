"""VisPruner's rounds against recordings of the released code, each from the recorded pool before it.

`vispruner/steps.safetensors` holds the decision's inputs and results on all recorded images, the chaotic ones
too, where two neighbours swapped in one round change all later ones and kept tokens cannot be compared end to
end:

    scores.{i}, clip_features.{i}    float32 [N], [N, d], the inputs
    important.{label}.{i}            int64 [I], by descending score
    kept.{label}.{i}                 int64 [b], ascending
    pools.{label}.{i}                int16, the pool before each round and after the last, one after another,
                                     each 8 shorter than the one before (optional)

A round agrees if its tokens stand where they stood, up to neighbours whose cosines differ by less than
`SWAP`. Where every round of ours agrees to the last place, and where no pools are recorded, the kept tokens
must be the same as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from methods import vispruner

#: two cosines nearer than this may change places from one machine to another
SWAP = 1e-6


@dataclass(frozen=True)
class RoundsRow:
    """One recording's rounds.

    Attributes:
        first: the important tokens and the first pool are the recorded ones, in their order.
        rounds: how many were compared.
        swapped: how many of them have neighbours in another order.
        gap: largest difference of two cosines that stand at one place, 0 if nothing is swapped.
        kept: whether all rounds in a row, from the recorded inputs, keep the recorded tokens.
    """

    method: str
    label: str
    sample: int
    first: bool
    rounds: int
    swapped: int
    gap: float
    kept: bool

    @property
    def agrees(self) -> bool:
        return self.first and self.gap < SWAP and (self.kept or self.swapped > 0)

    def __str__(self) -> str:
        rounds = f"{self.rounds} rounds from recorded pools: {self.swapped} with a swap"
        gap = f" (cosines {self.gap:.1e} apart)" if self.swapped else ""
        kept = "same" if self.kept else "differ" + (", as a swap may make them" if self.swapped else "")
        verdict = "" if self.agrees else "  DISAGREES"
        return (
            f"{self.method:14} {self.label:>22} {self.sample:5}   {rounds}{gap}; all in a row: kept {kept}"
            f"{verdict}"
        )


def check(vectors: Mapping[str, Tensor]) -> Iterator[RoundsRow]:
    """A row per recorded (label, input)."""
    for key in sorted(key for key in vectors if key.startswith("kept.")):
        label, sample = re.fullmatch(r"kept\.(.+)\.(\d+)", key).groups()
        yield _row(vectors, label, int(sample))


def _row(vectors: Mapping[str, Tensor], label: str, sample: int) -> RoundsRow:
    scores, features = (vectors[f"{name}.{sample}"][None] for name in ("scores", "clip_features"))
    important, kept = (vectors[f"{name}.{label}.{sample}"] for name in ("important", "kept"))
    diverse = len(kept) - len(important)
    ours, last = vispruner.choose(scores, features, len(important), diverse)
    first = torch.equal(ours[0], important)
    same = torch.equal(torch.cat([ours[0], last[0]]).sort().values, kept)
    pools = vectors.get(f"pools.{label}.{sample}")
    if pools is None:
        return RoundsRow("vispruner", label, sample, first, 0, 0, 0.0, same)
    similar = vispruner.cosines(features)
    recorded = _pools(pools.long(), scores.shape[1] - len(important), diverse)
    order = scores[0].sort(descending=True, stable=True).indices
    first = first and torch.equal(order[len(important) :], recorded[0])
    swapped, largest = 0, 0.0
    for before, after in pairwise(recorded):
        made = vispruner.one_round(before[None], similar, diverse)[0]
        if not torch.equal(made, after):
            swapped += 1
            largest = max(largest, _gap(before, made, after, similar[0]))
    return RoundsRow("vispruner", label, sample, first, len(recorded) - 1, swapped, largest, same)


def _pools(joined: Tensor, length: int, last: int) -> list[Tensor]:
    """The pools, cut apart. length: of the first; last: of the last."""
    lengths = [*range(length, last, -vispruner.CUT), last]
    return list(joined.split(lengths))


def _gap(before: Tensor, made: Tensor, recorded: Tensor, similar: Tensor) -> float:
    """Largest difference of the cosines that the tokens at one place have with their nearest; infinite where
    other tokens than those ranked by it differ."""
    odd = before[1::2]
    left = len(made) - len(odd)
    if not torch.equal(made[left:], recorded[left:]):
        return float("inf")
    if not torch.isin(recorded[:left], before[::2]).all():
        return float("inf")
    nearest = [similar[own[:left]][:, odd].amax(1) for own in (made, recorded)]
    return float((nearest[0] - nearest[1]).abs().max())
