"""From pointer distributions to one score a token: Eqs. 10 and 11, their ablations, and the expected length.

B samples, S decoding steps, N visual tokens; probabilities [B, S, N + 1] with the stop action last; running
bool [B, S], False at steps after the one that stopped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from methods.stepprune.policy import Choices
from methods.stepprune.training.options import Aggregation


def default_gamma(tokens: float) -> float:
    """A decay whose horizon suits so many tokens: gamma^tokens = e^-1/2 = 0.61, so that late choices still
    count (open in our copy of the paper; ours)."""
    return math.exp(-0.5 / tokens)


def survival(probabilities: Tensor) -> Tensor:
    """alive_2 .. alive_{S+1}: the probability that no step up to t has stopped, [B, S]."""
    return (1 - probabilities[..., -1]).cumprod(1)


def alive(probabilities: Tensor) -> Tensor:
    """alive_1 .. alive_S of Eq. 10, [B, S]; alive_1 = 1."""
    after = survival(probabilities)
    return torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1)


def expected_length(probabilities: Tensor, choices: Choices) -> Tensor:
    """E[K] = sum of alive_{t+1} over the steps taken, [B]: the differentiable K of Eq. 15."""
    return (survival(probabilities) * choices.running).sum(1)


def with_held_length(probabilities: Tensor, choices: Choices, temperature: float) -> Tensor:
    """The same probabilities, differentiated as if a common stop bias always brought the batch's mean E[K]
    back to what it is (ours, where a mean is wanted): its gradient is nil, that of what questions get more
    than others stays. It is the gradient of Eq. 15 at the lambda which keeps the mean.

    The bias is an implicit function of the probabilities; its value, at the solution, is 0.
    """
    stop = probabilities[..., -1:]
    after = survival(probabilities) * choices.running
    with torch.no_grad():  # of the mean E[K], by the bias: d log(1 - p(stop)) = -p(stop) / temperature
        slope = -(after * stop[..., 0].cumsum(1)).sum(1).mean() / temperature
    mean = after.sum(1).mean()
    bias = (mean.detach() - mean) / slope
    one_hot = torch.zeros_like(probabilities)
    one_hot[..., -1] = 1
    return probabilities + probabilities * (one_hot - stop) * (bias / temperature)


def scores(
    probabilities: Tensor, choices: Choices, gamma: float, aggregation: Aggregation = "full"
) -> Tensor:
    """s_j of Eq. 11, [B, N], over the steps taken, the one that stopped included."""
    running = choices.running
    if aggregation == "last":
        weights = running & ~torch.cat([running[:, 1:], torch.zeros_like(running[:, :1])], 1)
        weights = weights.to(probabilities.dtype)
    else:
        weights = running.to(probabilities.dtype)
        if aggregation != "uniform":
            weights = weights * alive(probabilities)
        if aggregation == "full":
            steps = torch.arange(running.shape[1], device=running.device, dtype=weights.dtype)
            weights = weights * gamma**steps
    return (weights[:, None] @ probabilities[..., :-1])[:, 0]
