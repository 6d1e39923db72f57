"""What a pruner did in the latest prefill."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


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
    """

    layers: int
    kept: list[list[Tensor]] = field(default_factory=list)
    _columns: dict[int, list[int]] = field(default_factory=dict)

    @property
    def visual_tokens(self) -> Tensor:
        batch = len(next(iter(self._columns.values()), []))
        counts = [self._columns.get(i, [0] * batch) for i in range(self.layers)]
        return torch.tensor(counts, dtype=torch.int64).reshape(self.layers, batch).T.contiguous()

    def start(self, batch: int) -> None:
        """A prefill of `batch` samples begins."""
        self.kept = [[] for _ in range(batch)]
        self._columns = {}

    def layer(self, index: int, visual: list[int]) -> None:
        """A layer was entered with so many visual tokens a sample."""
        self._columns[index] = visual
