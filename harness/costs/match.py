"""Budgets of equal cost: for each method the budget at which its prefill costs as many FLOPs as keeping b
visual tokens before the language model, by plan (`harness.costs.shape_counter`); no model is run.

What "64 tokens" costs depends on where a method cuts: FastV with 64 tokens behind its second layer costs 1.1
times what 64 tokens in every layer do. The reference is `uniform`, which keeps b tokens before the language
model and computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.costs.shape_counter import Budget, ShapeCounter
from methods import registry
from methods.errors import UserError

REFERENCE = "uniform"
#: guesses along a line; after them the interval is halved
LINEAR = 8


@dataclass(frozen=True)
class Match:
    """Of one method at one budget b.

    Attributes:
        spec: the method.
        block: b, as it was asked for.
        target: MAC of the prefill that keeps b tokens before the language model.
        budget: of the method, of b's kind (tokens or a share of the image); None: there is none.
        macs: of its prefill at that budget; None without one.
        step: MAC between the method's two budgets next to the target.
        reason: why there is none, in words.
    """

    spec: str
    block: Budget
    target: int
    budget: Budget | None = None
    macs: int | None = None
    step: int = 0
    reason: str = ""


def find(counter: ShapeCounter, spec: str, block: Budget) -> Match:
    """The budget whose cost is nearest to the target; of two that are as near, the smaller.

    A method's cost rises with its budget, but for roundings of its own. It cannot be matched if its cheapest
    budget costs more than a step above the target, or if its cost does not follow its budget.
    """
    target = counter.count(REFERENCE, block).total
    none, n = Match(spec, block, target), counter.visual_tokens
    search = _Search(counter, spec, block)
    try:
        least = search.least(n)
        low, high = search.bracket(target, least, n)
    except UserError as error:
        return _without(none, str(error))
    except Exception as error:  # a method that cannot be planned without weights or an answer key
        return _without(none, f"it cannot be planned ({type(error).__name__}: {error})")
    if search.varies:
        return _without(none, "how many tokens it keeps depends on the image")
    step = abs(search.cost(high) - search.cost(low))
    best = min((low, high), key=lambda own: (abs(search.cost(own) - target), own))
    off = search.cost(best) - target
    if abs(off) > step:
        if not step and search.cost(least) == search.cost(n):
            return _without(none, "its cost does not depend on its budget")
        which = "smallest" if off > 0 else "largest"
        return _without(none, f"its {which} budget, {search.name(best)}, costs {off / target:+.1%}")
    return Match(spec, block, target, search.name(best), search.cost(best), step)


def _without(match: Match, reason: str) -> Match:
    return Match(match.spec, match.block, match.target, reason=reason)


class _Search:
    """Costs of one method by number of tokens. varies: whether any counted plan depends on the image."""

    def __init__(self, counter: ShapeCounter, spec: str, block: Budget):
        self.counter, self.spec, self.block, self.share = counter, spec, block, isinstance(block, float)
        self.varies = False
        self._known: dict[int, int] = {}

    def name(self, tokens: int) -> Budget:
        """The budget that is so many tokens of the counter's image."""
        if not self.share or tokens == self.counter.visual_tokens:
            return tokens
        return round(tokens / self.counter.visual_tokens, 6)

    def cost(self, tokens: int) -> int:
        """MAC of the prefill. Raises what the method raises."""
        if tokens not in self._known:
            found = self.counter.count(self.spec, self.name(tokens))
            self._known[tokens] = found.total
            self.varies |= found.plan.varies
        return self._known[tokens]

    def bracket(self, target: int, least: int, most: int) -> tuple[int, int]:
        """Two neighbouring budgets, the first at most the target and the second above it; the two at the end
        where it lies beyond. By few counts: each guess follows the line through the two latest."""
        own = self.counter.count("vanilla", None).plan.mean
        at = self.counter.count(REFERENCE, self.name(most)).total
        slope = max(1.0, (at - target) / own)
        guess = min(max(round(self._block(own)), least), most)
        low, high, before = least - 1, most + 1, None
        for tries in range(most):
            cost = self.cost(guess)
            low, high = (guess, high) if cost <= target else (low, guess)
            if high - low == 1:
                break
            if before is not None and before[0] != guess and cost != before[1]:
                slope = max(1.0, (cost - before[1]) / (guess - before[0]))
            before = guess, cost
            wanted = round(guess + (target - cost) / slope) if tries < LINEAR else (low + high) // 2
            guess = min(max(wanted, low + 1), high - 1)
        low = min(max(low, least), max(least, most - 1))
        return low, min(low + 1, most)

    def _block(self, tokens: float) -> float:
        return self.block * tokens if self.share else self.block

    def least(self, most: int) -> int:
        """The smallest budget that the method can have. Raises UserError, the method's own, if not even all
        tokens."""
        layers = self.counter.shape.layers

        def able(tokens: int) -> bool:
            try:
                registry.build(self.spec, self.name(tokens)).validate(most, layers)
            except UserError:
                return False
            return True

        if not able(most):
            registry.build(self.spec, self.name(most)).validate(most, layers)
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if able(middle) else (middle, high)
        return high
