"""Scores against sums written out, SoftTopK against Sinkhorn and finite differences, the gate's moments."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from methods.stepprune.gate import LocalDenoiser, noise_gate, root
from methods.stepprune.policy import Choices
from methods.stepprune.training.options import Aggregation
from methods.stepprune.training.scores import (
    alive,
    default_gamma,
    expected_length,
    scores,
    with_held_length,
)
from methods.stepprune.training.soft_topk import soft_topk, standardised

DOUBLE = torch.float64


@pytest.fixture
def trajectory():
    """Three samples of six steps over five tokens: two stop (after 2 and 0 tokens), one does not."""
    torch.manual_seed(0)
    p = torch.randn(3, 6, 6, dtype=DOUBLE).softmax(-1)
    order = torch.tensor([[3, 1, 5, 5, 5, 5], [5] * 6, [0, 1, 2, 3, 4, 1]])
    return p, Choices(order, torch.tensor([2, 0, 6]))


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_scores_are_the_sum(trajectory, aggregation):
    p, choices = trajectory
    got = scores(p, choices, gamma=0.9, aggregation=aggregation)
    for b, steps in enumerate((3, 1, 6)):
        for j in range(5):
            total, alive_t = 0.0, 1.0
            for t in range(steps):
                weight = {
                    "full": 0.9**t * alive_t,
                    "alive": alive_t,
                    "uniform": 1.0,
                    "last": float(t == steps - 1),
                }[aggregation]
                total += weight * float(p[b, t, j])
                alive_t *= 1 - float(p[b, t, 5])
            assert math.isclose(float(got[b, j]), total, rel_tol=1e-12)


def test_alive_and_expected_length(trajectory):
    p, choices = trajectory
    assert (alive(p)[:, 0] == 1).all()
    for b, steps in enumerate((3, 1, 6)):
        survive, total = 1.0, 0.0
        for t in range(steps):
            survive *= 1 - float(p[b, t, 5])
            total += survive
        assert math.isclose(float(expected_length(p, choices)[b]), total, rel_tol=1e-12)


def test_expected_length_of_a_sure_policy_is_the_count():
    order = torch.tensor([[3, 1, 5, 5], [0, 4, 2, 1]])
    p = F.one_hot(order, 6).double()
    assert expected_length(p, Choices(order, torch.tensor([2, 4]))).tolist() == [2, 4]


def test_gamma_does_not_vanish():
    for tokens in (64, 128, 192):
        assert 0.6 < default_gamma(tokens) ** tokens < 0.62


def test_a_held_length_is_that_of_a_bias_solved_for(trajectory):
    """Values stay; the mean's gradient is nil; another function's is what finite differences give with the
    stop bias solved anew at each point."""
    _, choices = trajectory
    temperature = 0.7
    torch.manual_seed(1)
    logits = torch.randn(3, 6, 6, dtype=DOUBLE, requires_grad=True)
    weights = torch.randn(3, 6, 6, dtype=DOUBLE)

    def probabilities(z, bias=0.0):
        return ((z + bias * F.one_hot(torch.tensor(5), 6)) / temperature).softmax(-1)

    def mean(p):
        return expected_length(p, choices).mean()

    p = probabilities(logits)
    held = with_held_length(p, choices, temperature)
    assert torch.equal(held, p)
    (none,) = torch.autograd.grad(mean(held), logits, retain_graph=True)
    (some,) = torch.autograd.grad(mean(p), logits, retain_graph=True)
    assert none.abs().max() < 1e-12 < 1e-3 < some.abs().max()

    def solved(z):
        low, high = -5.0, 5.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if mean(probabilities(z, middle)) > mean(p) else (low, middle)
        return float((weights * probabilities(z, low)).sum())

    (found,) = torch.autograd.grad((weights * held).sum(), logits)
    for b, t, j in ((0, 0, 5), (0, 1, 2), (2, 3, 5), (2, 5, 1)):
        nudge = torch.zeros_like(logits)
        nudge[b, t, j] = 1e-5
        numeric = (solved(logits.detach() + nudge) - solved(logits.detach() - nudge)) / 2e-5
        assert math.isclose(float(found[b, t, j]), numeric, rel_tol=1e-4, abs_tol=1e-7)


# ---- SoftTopK


def sinkhorn(s, k, sharpness, iterations=2000):
    """Entropic transport in the log domain, after Xie et al.: costs (s - a)^2, regularisation 1/sharpness."""
    n = len(s)
    cost = torch.stack([s**2, (s - 1) ** 2], 1) * sharpness
    rows, columns = (
        torch.full((n,), -math.log(n), dtype=DOUBLE),
        torch.tensor([(n - k) / n, k / n]).double().log(),
    )
    f, g = torch.zeros(n, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)
    for _ in range(iterations):
        f = rows - torch.logsumexp(g - cost, 1)
        g = columns - torch.logsumexp(f[:, None] - cost, 0)
    return n * (f[:, None] + g - cost).exp()[:, 1]


@pytest.mark.parametrize("k, sharpness", [(3, 1.0), (3, 5.0), (7.5, 2.0)])
def test_soft_topk_is_what_sinkhorn_converges_to(k, sharpness):
    s = torch.rand(12, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        soft_topk(s[None], k, sharpness)[0], sinkhorn(s, k, sharpness), rtol=0, atol=1e-8
    )


def test_marginals_hold_with_padding_and_a_k_for_each_row():
    s = torch.randn(3, 40, dtype=DOUBLE)
    valid = torch.arange(40) < torch.tensor([[40], [20], [7]])
    got = soft_topk(s, torch.tensor([10.0, 3.5, 2.0]), 2.0, valid)
    torch.testing.assert_close(got.sum(1), torch.tensor([10, 3.5, 2], dtype=DOUBLE))
    assert not got[~valid].any() and (got[valid] > 0).all() and (got < 1).all()
    torch.testing.assert_close(got[1, :20], soft_topk(s[1:2, :20], 3.5, 2.0)[0])


def test_soft_topk_gradient_in_scores_and_k():
    s = torch.randn(2, 9, dtype=DOUBLE, requires_grad=True)
    k = torch.tensor([2.0, 4.5], dtype=DOUBLE, requires_grad=True)
    valid = torch.arange(9) < torch.tensor([[9], [7]])
    assert torch.autograd.gradcheck(lambda s, k: soft_topk(s, k, 1.5, valid), (s, k))


def test_sharp_limit_is_the_indicator():
    s = torch.randn(4, 50, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    hard = torch.zeros_like(s).scatter_(1, s.topk(11).indices, 1)
    errors = [float((soft_topk(s, 11, sharpness) - hard).abs().max()) for sharpness in (1, 30, 1e5)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3
    single = soft_topk(s.float(), 11, 1e4)
    torch.testing.assert_close(single, hard.float(), rtol=0, atol=1e-2)


def test_more_than_there_are_keeps_all():
    assert (soft_topk(torch.randn(1, 8, dtype=DOUBLE), 20.0, 2.0) > 0.98).all()


def test_standardised_scores_do_not_know_their_scale():
    s = torch.rand(2, 30, dtype=DOUBLE)
    valid = torch.arange(30) < torch.tensor([[30], [11]])
    got = standardised(s, valid)
    torch.testing.assert_close(got, standardised(7 * s + 3, valid))
    torch.testing.assert_close(got[1, :11].var(unbiased=False), torch.ones((), dtype=DOUBLE))


# ---- noise gate and denoiser


@pytest.mark.parametrize("gate", [0.0, 1e-4, 0.1, 0.5, 0.9, 1.0])
def test_second_moment_is_preserved(gate):
    torch.manual_seed(0)
    tokens = 3 * torch.randn(2, 500, 64, dtype=DOUBLE) + 1
    valid = torch.arange(500) < torch.tensor([[500], [100]])
    tokens[~valid] = 1000.0
    mixed = noise_gate(tokens, torch.full((2, 500), gate, dtype=DOUBLE), torch.randn_like(tokens), valid)
    for b in range(2):
        before, after = (x[b][valid[b]].square().mean() for x in (tokens, mixed))
        assert abs(float(after / before) - 1) < 0.03
    if gate == 1:
        assert torch.equal(mixed[valid], tokens[valid])
    if gate == 0:
        assert float((mixed * tokens)[valid].mean().abs()) < 0.1 * float(tokens[valid].square().mean())


def test_closed_gate_says_nothing_of_its_token():
    torch.manual_seed(0)
    tokens, noise = torch.randn(1, 30, 8, dtype=DOUBLE), torch.randn(1, 30, 8, dtype=DOUBLE)
    other = tokens.clone()
    other[0, [3, 4]] = other[0, [4, 3]]
    gates = torch.ones(1, 30, dtype=DOUBLE)
    gates[0, [3, 4]] = 0
    torch.testing.assert_close(noise_gate(tokens, gates, noise), noise_gate(other, gates, noise))


def test_root():
    x = torch.linspace(0.01, 1, 20, dtype=DOUBLE, requires_grad=True)
    torch.testing.assert_close(root(x), x.sqrt())
    assert torch.autograd.gradcheck(lambda v: v.sqrt(), (x,))
    (slope,) = torch.autograd.grad(root(x).sum(), x)
    torch.testing.assert_close(slope, 0.5 * x.detach().rsqrt())
    edge = torch.zeros(1, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.grad(root(edge).sum(), edge)[0].isfinite() and root(edge) == 0


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    block = LocalDenoiser(16).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return block


def test_denoiser_keeps_tokens_apart(denoiser):
    x = torch.randn(2, 11, 16, dtype=DOUBLE)
    changed = x.clone()
    changed[0, 4] += torch.randn(16, dtype=DOUBLE)
    moved = (denoiser(x) != denoiser(changed)).any(-1)
    assert moved.nonzero().tolist() == [[0, 4]]


def test_denoiser_is_a_vit_block_with_the_identity_as_mask(denoiser):
    x = torch.randn(2, 11, 16, dtype=DOUBLE)
    normed = denoiser.norm_attention(x)
    query, key = torch.randn(16, 16, dtype=DOUBLE), torch.randn(16, 16, dtype=DOUBLE)
    heads = [
        y.unflatten(-1, (4, 4)).transpose(1, 2)
        for y in (normed @ query, normed @ key, denoiser.value(normed))
    ]
    mask = torch.eye(11, dtype=torch.bool)
    attended = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)
    y = x + denoiser.out(attended)
    torch.testing.assert_close(denoiser(x), y + denoiser.mlp(denoiser.norm_mlp(y)))


def test_denoiser_starts_as_the_identity():
    x = torch.randn(3, 8)
    assert torch.equal(LocalDenoiser(8)(x), x)
