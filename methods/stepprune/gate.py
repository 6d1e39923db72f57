"""The noise gate of Eq. 13 and the local denoiser of Eq. 14; they train the policy, inference has neither."""

from __future__ import annotations

from torch import Tensor, nn

from methods.stepprune.policy import feed_forward

#: gates below this have the square root's gradient at this: it has none at 0
_SMALLEST = 1e-3


def root(x: Tensor) -> Tensor:
    """sqrt(x), exactly; its gradient stays finite towards 0."""
    slope = 0.5 * x.detach().clamp(min=_SMALLEST).rsqrt()
    return x.detach().sqrt() + slope * (x - x.detach())


def noise_gate(tokens: Tensor, gates: Tensor, noise: Tensor, valid: Tensor | None = None) -> Tensor:
    """Eq. 13: sqrt(g) v + sqrt(1 - g) e, [B, N, d].

    gates: [B, N] in [0, 1]. noise: standard normal [B, N, d]; scaled here by the root mean square of the
    image's tokens, without gradient, so that the second moment is that of the tokens at every gate (mean over
    an image; a scale for each token would tell the reader of a closed gate how long its token was). valid:
    bool [B, N], False at padding.
    """
    squares = tokens.detach().square()
    if valid is None:
        mean = squares.mean((1, 2), keepdim=True)
    else:
        mean = (squares * valid[..., None]).sum((1, 2), keepdim=True)
        mean = mean / (valid.sum(1)[:, None, None] * tokens.shape[2])
    gates = gates[..., None]
    return root(gates) * tokens + root(1 - gates) * noise * mean.sqrt()


class LocalDenoiser(nn.Module):
    """Eq. 14: a ViT block whose attention mask is the identity.

    A token that attends to itself alone gets its own value, whatever its query and key: the block has
    neither. It starts as the identity (open; ours).
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = feed_forward(width)
        for linear in (self.out, self.mlp[-1]):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[.., d] -> [.., d], each row on its own."""
        x = x + self.out(self.value(self.norm_attention(x)))
        return x + self.mlp(self.norm_mlp(x))
