"""What a pruner did in the latest prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """What one cut did to one sample.

    Attributes:
        kept: int64 [n], which of the tokens that were there stands in each place now; below 0: a made one.
        merged: see `methods.views.Selection.merged`; None: nothing was merged.
        present: V, tokens that were there.
    """

    kept: Tensor
    merged: Tensor | None
    present: int

    def holders(self) -> Tensor:
        """int64 [V]: the place that holds each token now, its own or that of the one that took it in; -1:
        none."""
        found = self.kept.new_full((self.present,), -1)
        if self.merged is not None:
            found[: len(self.merged)] = self.merged
        own = self.kept >= 0
        found[self.kept[own]] = own.nonzero()[:, 0]
        return found


@dataclass
class Trace:
    """Filled by the engine; valid during and after the `with`.

    Attributes:
        layers: L, of the language model.
        visual_tokens: int64 [B, L], visual tokens entering each of them, as measured in the latest prefill
            ([0, L] before the first).
        kept: for each sample, one int64 tensor per stage (the one before the language model first, if the
            method has it): which visual tokens were left, in the language model's order; see
            `methods.views.Selection.kept`.
        cuts: the same as `Cut`s, by which merged tokens can be followed (`holders`).
    """

    layers: int
    kept: list[list[Tensor]] = field(default_factory=list)
    cuts: list[list[Cut]] = field(default_factory=list)
    _columns: dict[int, list[int]] = field(default_factory=dict)

    @property
    def visual_tokens(self) -> Tensor:
        batch = len(next(iter(self._columns.values()), []))
        counts = [self._columns.get(i, [0] * batch) for i in range(self.layers)]
        return torch.tensor(counts, dtype=torch.int64).reshape(self.layers, batch).T.contiguous()

    def start(self, batch: int) -> None:
        """A prefill of `batch` samples begins."""
        self.kept, self.cuts = [[] for _ in range(batch)], [[] for _ in range(batch)]
        self._columns = {}

    def layer(self, index: int, visual: list[int]) -> None:
        """A layer was entered with so many visual tokens per sample."""
        self._columns[index] = visual


def holders(cuts: Sequence[Cut]) -> Tensor | None:
    """int64 [V]: for each visual token of a sample the place, after all of its cuts, of the token that holds
    it: itself, or one that took it in; -1 where it is gone. None without a cut."""
    found = None
    for cut in cuts:
        step = cut.holders()
        found = step if found is None else torch.where(found < 0, -1, step[found.clamp(min=0)])
    return found
