"""Samples of different lengths in one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """[n_i, d] each -> [B, n, d] with zeros on the right, and bool [B, n], False there; None if all are of
    one length."""
    lengths = [len(r) for r in rows]
    if min(lengths) == max(lengths):
        return torch.stack(list(rows)), None
    together = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    ends = torch.tensor(lengths, device=together.device)
    return together, torch.arange(together.shape[1], device=together.device) < ends[:, None]
