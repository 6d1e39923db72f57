"""StepPrune as a `Pruner`: the trained policy chooses before the language model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from methods.base import ImageView, Positions, Pruner, Selection
from methods.errors import UserError
from methods.registry import register
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.batch import padded
from methods.stepprune.fast import Decoder
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.policy import Choices, Memory, Policy, PolicyConfig, step_codes


@register
@dataclass
class StepPrune(Pruner):
    """StepPrune: a trained pointer decoder takes one visual token per step, given the prompt, until it stops.

    Attributes:
        budget: the *mean* number of tokens wanted; the number for each question is the policy's own. The
            shipped checkpoint trained nearest to it is used, with a scalar on the stop logit calibrated on
            held-out data (ours; the paper trains once for each mean).
        positions: survivors keep the rotary positions of their places, as in training, where the sequence has
            its full length (`original`; open in the paper), or are `renumbered`.
        checkpoint: a safetensors file of `harness train stepprune`; None: a shipped one.
        denoise: survivors pass the trained denoiser too (off, as in the paper).
        tokens_per_step: taken at once, those with the highest logits, 1 or more (ours; 1, as in the paper;
            more are faster, and the next choice is told of them together).
        orders: of each image of the latest call, the tokens kept in the order in which they were chosen,
            int64 [K] (to look at).

    `Trace.kept`: ascending, the spatial order of Sec. 3.1.
    """

    name: ClassVar[str] = "stepprune"
    reads_text: ClassVar[bool] = True
    may_exceed_budget = True
    positions: Positions = "original"
    checkpoint: str | None = None
    denoise: bool = False
    tokens_per_step: int = 1

    #: policy and tokens_per_step -> what runs its loop
    decoder: ClassVar[Callable[[Policy, int], Callable[[Memory], Choices]]] = Decoder
    #: policy and denoiser instead of a checkpoint's, see `take`
    _given: ClassVar[tuple[Policy, LocalDenoiser] | None] = None
    #: what the policy at hand was prepared for
    _ready: ClassVar[tuple | None] = None

    def __post_init__(self):
        super().__post_init__()
        if self.tokens_per_step < 1:
            raise UserError(
                f"stepprune: tokens_per_step {self.tokens_per_step}: give a whole number from 1 on"
            )
        if self.checkpoint is not None:  # named by a person: refused before a model is loaded
            checkpoints.read(Path(self.checkpoint))

    def resources(self, model: torch.nn.Module) -> dict[str, object]:
        if not self.acts:
            return {}
        if self._given is not None:
            return {"weights": "random"}
        found, bias = self._find(model)
        return {"checkpoint": found.path.stem, "weights": found.digest(), "stop_bias": bias}

    def prepare(self, model: torch.nn.Module) -> None:
        if not self.acts:
            return
        like = next(model.parameters())
        found, bias = (None, 0.0) if self._given is not None else self._find(model)
        wanted = (found and found.path, bias, like.device, like.dtype)
        if self._ready == wanted:  # the recorded loops go on being of use
            return
        weights = found.load() if found else self._given
        self._use(*(m.to(like.device, like.dtype) for m in weights))
        if found:
            self._policy.stop_bias.fill_(bias)
        self._ready = wanted

    def _use(self, policy: Policy, denoiser: LocalDenoiser) -> None:
        self._policy, self._denoiser = policy, denoiser
        self._decode = self.decoder(policy, self.tokens_per_step)

    def take(self, policy: Policy, denoiser: LocalDenoiser) -> None:
        """Choose by this policy, with its own stop bias, instead of a checkpoint's."""
        self._given, self._ready = (policy, denoiser), None
        self._use(policy, denoiser)

    def untrained(self, width: int, text_width: int, tokens: int) -> None:
        """Random weights for these widths instead of a checkpoint's, and exactly `tokens` tokens whatever the
        image (for costs)."""
        config = PolicyConfig(width, text_width, max_steps=tokens, min_tokens=tokens)
        with torch.random.fork_rng(devices=[]):
            self.take(_random(config), LocalDenoiser(width).eval())

    def _find(self, model: torch.nn.Module) -> tuple[checkpoints.Checkpoint, float]:
        """Checkpoint and stop bias for the model and the budget."""
        candidates = checkpoints.suiting(model, self.checkpoint, PolicyConfig)
        visual_tokens = checkpoints.visual_tokens(model, self.budget, candidates)
        tokens = self.budget if visual_tokens is None else self.count(visual_tokens)
        return checkpoints.best_for(tokens, candidates)

    def select_all(self, images: Sequence[ImageView]) -> list[Selection]:
        visual, visual_valid = padded([image.features for image in images])  # V
        text, text_valid = padded([image.text for image in images])  # E
        memory = self._policy.remember(visual, text, visual_valid, text_valid)  # M = [H ; s_stop]
        choices = self._decode(memory)  # i_1, i_2, ... until the stop action
        kept = choices.kept()  # S, in spatial order
        self.orders = [row[: len(k)] for row, k in zip(choices.order, kept)]
        if not self.denoise:
            return [Selection(k) for k in kept]
        return [Selection(k, self._denoiser(image.features[k])) for k, image in zip(kept, images)]


def _random(config: PolicyConfig) -> Policy:
    """A policy with random weights, the same for the same widths."""
    with torch.device("meta"):
        policy = Policy(config)
    policy = policy.to_empty(device="cpu")
    policy.load_state_dict(_random_weights(config.width, config.text_width))
    policy.step_codes.copy_(step_codes(config.max_steps, config.width))
    return policy.eval()


@functools.lru_cache(maxsize=1)
def _random_weights(width: int, text_width: int) -> dict[str, torch.Tensor]:
    """Kept, because at real widths drawing them takes longer than a selection does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Policy(PolicyConfig(width, text_width)).state_dict()
