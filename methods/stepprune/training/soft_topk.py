"""SoftTopK of Eq. 12: top-k as entropic optimal transport between scores and {drop, keep} (Xie et al., 2020).

With two target points the transport plan has one free number. Cost (s_j - a)^2 to a in {0, 1}, marginals 1/N
and ((N - k)/N, k/N), regularisation 1/sharpness: the plan's row j gives `keep` the share
sigmoid(2 * sharpness * s_j - threshold), and the threshold is what makes the shares sum to k. Sinkhorn's
iterations converge to it, slowly when sharp; bisection finds it directly, and the gradient, that of the fixed
point, costs one Newton step. (Ours: the solver. A test holds it against log-domain Sinkhorn.)
"""

from __future__ import annotations

import torch
from torch import Tensor

_BISECTIONS = 60


def soft_topk(scores: Tensor, k: Tensor | float, sharpness: float, valid: Tensor | None = None) -> Tensor:
    """Shares in [0, 1] that sum to k in each row; differentiable in scores and k.

    scores: [B, N]. k: number or [B]; brought into (0, number of valid tokens). sharpness: the larger, the
    nearer to the indicator of the k largest. valid: bool [B, N], False at padding, whose share is 0.
    """
    slope = 2 * sharpness
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    n = valid.sum(1).to(scores.dtype)
    k = torch.as_tensor(k, dtype=scores.dtype, device=scores.device).expand(len(scores))
    k = torch.minimum(k.clamp(min=1e-3), n - 1e-3)

    def shares(threshold: Tensor) -> Tensor:
        return torch.sigmoid(slope * scores - threshold[:, None]) * valid

    with torch.no_grad():
        logits = slope * scores
        low = logits.masked_fill(~valid, torch.inf).amin(1) - 40
        high = logits.masked_fill(~valid, -torch.inf).amax(1) + 40
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            too_many = shares(middle).sum(1) > k
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        threshold = (low + high) / 2
        found = shares(threshold)
        slack = (found * (1 - found)).sum(1).clamp(min=torch.finfo(scores.dtype).tiny)
    # Newton's step is nil in value; its gradient is the implicit function theorem's.
    return shares(threshold + (shares(threshold).sum(1) - k) / slack)


def standardised(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Scores in units of their standard deviation over a sample's tokens, so that a sharpness means the same
    whatever the steps' number and gamma make of their scale (open; ours). The unit has no gradient."""
    with torch.no_grad():
        if valid is None:
            valid = torch.ones_like(scores, dtype=torch.bool)
        n = valid.sum(1, keepdim=True)
        mean = (scores * valid).sum(1, keepdim=True) / n
        spread = (((scores - mean) ** 2 * valid).sum(1, keepdim=True) / n).sqrt().clamp(min=1e-8)
    return (scores - mean) / spread
