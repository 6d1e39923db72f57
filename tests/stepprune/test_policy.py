"""The selection policy against a loop that caches nothing and keeps every formula apart."""

import pytest
import torch

from methods.stepprune.policy import Choices, Policy, PolicyConfig, straight_through, trimmed

WIDTH, TEXT_WIDTH = 16, 12


def make(seed=0, **settings) -> Policy:
    torch.manual_seed(seed)
    policy = Policy(PolicyConfig(WIDTH, TEXT_WIDTH, heads=4, **{"max_steps": 9, **settings})).double()
    policy.stop_bias.fill_(0.7)
    return policy


def batch(seed, sizes, words):
    """One sample a size: visual [N, d], text [T, D]."""
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, WIDTH, generator=g, dtype=torch.float64),
            torch.randn(t, TEXT_WIDTH, generator=g, dtype=torch.float64),
        )
        for n, t in zip(sizes, words)
    ]


def padded(samples):
    def pad(items):
        x = torch.nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=3.0)
        lengths = torch.tensor([len(i) for i in items])
        return x, torch.arange(x.shape[1]) < lengths[:, None]

    (visual, visual_valid), (text, text_valid) = (pad([s[i] for s in samples]) for i in (0, 1))
    return visual, text, visual_valid, text_valid


def naive(policy, visual, text, alpha=1.0):
    """Eqs. 3 to 8 for one sample, nothing cached, with gradient through every straight-through input.

    Returns the order with the stop action, and p_t of every step taken.
    """
    c = policy.config
    memory = policy.remember(visual[None], text[None], alpha=alpha)
    stop = len(visual)
    mask = torch.zeros(stop + 1, dtype=torch.float64)
    inputs, order, distributions = [policy.start], [], []
    while len(order) < min(c.max_steps, stop + 1):
        logits = policy.logits(torch.stack(inputs)[None], memory)[0, -1]
        m = mask.clone()
        if len(order) < c.min_tokens:
            m[stop] = -torch.inf
        p = ((logits + m) / c.temperature).softmax(-1)
        choice = int(p.argmax())
        order.append(choice)
        distributions.append(p)
        if choice == stop:
            break
        mask[choice] = -torch.inf
        soft = p @ memory.rows[0]
        inputs.append((memory.rows[0, choice] - soft).detach() + soft)
    return order, torch.stack(distributions)


@pytest.fixture(params=["projection", "attention"])
def policy(request):
    return make(pointer=request.param, decoder_layers=2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_cached_loop_equals_naive_loop(policy, causal, seed):
    policy.encoder.causal = causal
    for visual, text in batch(seed, (12, 20, 5), (4, 1, 7)):
        order, p = naive(policy, visual, text)
        memory = policy.remember(visual[None], text[None])
        choices = policy.decode(memory)
        steps = len(order)
        assert choices.order[0, :steps].tolist() == order
        assert (choices.order[0, steps:] == len(visual)).all()
        assert int(choices.count) == sum(i != len(visual) for i in order)
        torch.testing.assert_close(policy.replay(memory, trimmed(choices))[0, :steps].double(), p.double())


def test_some_stop_early_and_some_do_not():
    """Else the tests above would not test the stop."""
    policy, lengths = make(max_steps=30), set()
    for seed in range(12):
        (sample,) = batch(seed, (25,), (3,))
        lengths.add(int(policy.decode(policy.remember(*(x[None] for x in sample))).count))
    assert len(lengths) > 3 and min(lengths) < 25, lengths


@pytest.mark.parametrize("bias", [-50.0, 0.0, 50.0])
def test_each_token_at_most_once_and_never_none(bias):
    policy = make(max_steps=100)
    policy.stop_bias.fill_(bias)
    choices = policy.decode(policy.remember(*padded(batch(1, (12, 30, 7), (3, 2, 5)))))
    for row, n, offered in zip(choices.order, choices.count.tolist(), (12, 30, 7)):
        taken = row[:n].tolist()
        assert len(set(taken)) == n and all(0 <= i < offered for i in taken)
        assert (row[n:] == 30).all()
        assert n == {-50.0: offered, 50.0: 1}.get(bias, n) and n >= 1


def test_max_steps_bounds_the_count():
    policy = make(max_steps=6)
    policy.stop_bias.fill_(-50)
    assert policy.decode(policy.remember(*padded(batch(1, (12, 30), (3, 2))))).count.tolist() == [6, 6]


@pytest.mark.parametrize("causal", [False, True])
def test_mixed_lengths_equal_single_runs(policy, causal):
    """Images of different sizes (Qwen-like) and prompts of different lengths in one batch."""
    policy.encoder.causal = causal
    samples = batch(5, (12, 31, 5, 20), (4, 1, 9, 2))
    memory = policy.remember(*padded(samples))
    choices = policy.decode(memory)
    together = policy.replay(memory, choices)
    for b, (visual, text) in enumerate(samples):
        alone = policy.remember(visual[None], text[None])
        single = policy.decode(alone)
        n = int(single.count)
        assert int(choices.count[b]) == n
        assert choices.order[b, :n].tolist() == single.order[0, :n].tolist()
        assert choices.kept()[b].tolist() == sorted(single.order[0, :n].tolist())
        steps = min(n + 1, single.order.shape[1])
        p = policy.replay(alone, single)[0, :steps]
        torch.testing.assert_close(together[b, :steps, : len(visual)], p[:, :-1])
        torch.testing.assert_close(together[b, :steps, -1], p[:, -1])
        assert not together[b, :, len(visual) : -1].any(), "padding has a probability"


def test_straight_through():
    hard, soft = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    soft.requires_grad_()
    out = straight_through(hard, soft)
    torch.testing.assert_close(out, hard, rtol=0, atol=1e-15)
    weight = torch.randn(3, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((out * weight).sum(), soft)
    assert torch.equal(gradient, weight)


def loss_of(p):
    return (p * torch.linspace(-1, 1, p.shape[-1]).sin() * torch.arange(1, len(p) + 1)[:, None]).sum()


def gradients(policy, loss):
    found = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    return {k: g for (k, _), g in zip(policy.named_parameters(), found)}


def test_replay_has_the_sequential_loops_gradient(policy):
    """With every link of the straight-through chain followed; with few links, nearly."""
    ((visual, text),) = batch(3, (14,), (3,))
    policy.stop_bias.fill_(-9)
    order, p = naive(policy, visual, text)
    assert len(order) == 9
    wanted = gradients(policy, loss_of(p))
    memory = policy.remember(visual[None], text[None])
    choices = policy.decode(memory)
    got = gradients(policy, loss_of(policy.replay(memory, choices, chain=None)[0]))
    assert wanted.keys() == got.keys()
    for name, g in wanted.items():
        assert g is not None and got[name] is not None, f"{name} has no gradient"
        torch.testing.assert_close(got[name], g, rtol=1e-5, atol=1e-6, msg=name)
    memory = policy.remember(visual[None], text[None])
    flat = [torch.cat([g.flatten() for g in x.values()]) for x in (wanted, got)]
    assert flat[0].norm() > 0.1
    truncated = gradients(policy, loss_of(policy.replay(memory, choices, chain=0)[0]))
    none = torch.cat([g.flatten() for g in truncated.values()])
    assert (none - flat[0]).norm() > 1e-3 * flat[0].norm(), "the chain contributes nothing to this test"


@torch.no_grad()
def test_text_changes_the_choice_and_alpha_scales_it():
    """At alpha 0 the words do not matter; the way from 0 to 1 is gradual."""
    policy = make()
    (visual, one), (_, two) = batch(3, (14, 14), (5, 5))

    def rows(text, alpha):
        return policy.remember(visual[None], text[None], alpha=alpha).rows

    assert torch.equal(rows(one, 0.0), rows(two, 0.0))
    steps = [float((rows(one, a) - rows(two, a)).norm()) for a in (0.01, 0.1, 1.0)]
    assert 0 < steps[0] < 0.25 * steps[1] < steps[2]


def test_causal_encoder_sees_only_what_stands_before():
    policy = make(causal_encoder=True)
    ((visual, text),) = batch(3, (14,), (5,))
    changed = visual.clone()
    changed[7] = changed[7].flip(0)
    difference = (
        policy.remember(visual[None], text[None]).rows - policy.remember(changed[None], text[None]).rows
    )
    moved = difference[0].abs().amax(-1) > 1e-9
    assert not moved[:7].any() and moved[7:14].all() and not moved[14]


def test_running_counts_the_stopping_step():
    choices = Choices(torch.tensor([[2, 5, 5, 5], [0, 1, 2, 3], [5, 5, 5, 5]]), torch.tensor([1, 4, 0]))
    assert choices.running.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert trimmed(Choices(choices.order[:1], choices.count[:1])).order.tolist() == [[2, 5]]
