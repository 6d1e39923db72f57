"""What the selection loop is held against: its own first step, its steps told of the wrong tokens, and a
policy before training. Only to find out what a policy does (`python -m harness policy`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from methods.stepprune.fast import Decoder
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.method import StepPrune
from methods.stepprune.policy import Choices, Memory, Policy, counts

FIRST, SHUFFLED, UNTRAINED = "first step's top K", "steps shuffled", "untrained"


class FirstStep:
    """As many tokens as the loop takes, chosen in one pass: those that its first step ranks highest."""

    def __init__(self, policy: Policy, tokens_per_step: int = 1):
        self.policy, self.loop = policy, Decoder(policy, tokens_per_step)

    @torch.no_grad()
    def __call__(self, memory: Memory) -> Choices:
        count, steps = self.loop(memory).count, self.policy.steps(memory)
        state = self.policy.begin(memory, 1)
        logits = self.policy.step(memory, state, 0, may_stop=False)
        order = logits[:, :-1].argsort(1, descending=True)[:, :steps]
        return _cut(order, count, memory.stop)


class Shuffled:
    """As many tokens as the loop takes, by its steps told of the tokens that it takes in a random order: none
    knows what has just been chosen, and each is masked once this loop has it."""

    def __init__(self, policy: Policy, tokens_per_step: int = 1, seed: int = 0):
        self.policy, self.loop = policy, Decoder(policy, tokens_per_step)
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self, memory: Memory) -> Choices:
        own = self.loop(memory)
        steps = int(own.count.max())
        places = torch.rand(own.order[:, :steps].shape, generator=self.generator).to(own.order.device)
        places.masked_fill_(torch.arange(steps, device=places.device) >= own.count[:, None], 2)
        told = memory.rows.gather(
            1, own.order.gather(1, places.argsort(1))[..., None].expand(-1, -1, memory.rows.shape[2])
        )
        state = self.policy.begin(memory, steps)
        for at in range(steps):
            self.policy.step(memory, state, at, may_stop=False)
            state.query.copy_(told[:, at : at + 1])
        return _cut(state.order, own.count, memory.stop)


def _cut(order: Tensor, count: Tensor, stop: int) -> Choices:
    taken = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return Choices(order.masked_fill(~taken, stop), count)


@torch.no_grad()
def untrained(trained: Policy, frozen, batches: Sequence, seed: int = 0) -> Policy:
    """A policy of the same shape as training starts with, its stop bias such that it takes as many tokens of
    these questions, on average, as the trained one.

    frozen: `methods.stepprune.training.objective.FrozenModel`. batches: its `Batch`es.
    """
    from methods.stepprune.training.calibrate import bias_for, collect
    from methods.stepprune.training.train import initialise

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy(trained.config).to(trained.start.device).eval()
    initialise(policy, frozen, batches[0])
    wanted = float(counts(collect(trained, frozen, batches), 0.0).double().mean())
    policy.stop_bias.add_(bias_for(collect(policy, frozen, batches), wanted))
    return policy


class _First(StepPrune):
    decoder = FirstStep


class _Shuffled(StepPrune):
    decoder = Shuffled


def ways(pruner: StepPrune, frozen, batches: Sequence) -> dict[str, StepPrune]:
    """See `methods.learned.Learned.controls`."""
    settings = {"budget": pruner.budget, **pruner.parameters()}
    start = StepPrune(**settings)
    start.take(untrained(pruner._policy, frozen, batches), LocalDenoiser(frozen.width).eval())
    return {FIRST: _First(**settings), SHUFFLED: _Shuffled(**settings), UNTRAINED: start}
