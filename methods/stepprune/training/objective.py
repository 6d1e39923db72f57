"""The training pathway (Sec. 3.3 and 3.4): gated tokens through the frozen model's projector and LLM.

scores -> SoftTopK -> noise gate -> denoiser -> projector -> LLM -> next-token loss + lambda E[K] / N
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.stepprune.gate import LocalDenoiser, noise_gate
from methods.stepprune.policy import Choices, Policy, cut_at, trimmed
from methods.stepprune.training.options import Aggregation
from methods.stepprune.training.scores import expected_length, scores, with_held_length
from methods.stepprune.training.soft_topk import soft_topk, standardised

#: rows and columns of an image's visual tokens
Grid = tuple[int, int]

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Samples as the objective takes them: one image and one answered question each.

    features: [B, N, d], of the vision tower, before the projector. before: int64 [P], token ids ahead of the
    image, the same for all. after: int64 [B, L], ids behind it, question then answer, padded on the right.
    targets: int64 [B, L], the answer's ids at their places, IGNORE elsewhere. question: int64 [B], ids of
    `after` that belong to the prompt. things: int64 [B], the scene's true complexity, -1 if unknown.
    positions: rotary ones of the whole sequence, int64 [1 or 3, B, P + N + L]. valid: bool [B, N], False at
    the padding of smaller images; None: all images are of one size. evidence: bool [B, N], the visual tokens
    that hold the answer; None: unknown.
    """

    features: Tensor
    before: Tensor
    after: Tensor
    targets: Tensor
    question: Tensor
    things: Tensor
    positions: Tensor
    valid: Tensor | None = None
    evidence: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, chosen: slice) -> Batch:
        """Some of the samples."""
        names = ("features", "after", "targets", "question", "things")
        own = {name: getattr(self, name)[chosen] for name in names}
        for name in ("valid", "evidence"):
            given = getattr(self, name)
            own[name] = None if given is None else given[chosen]
        return replace(self, **own, positions=self.positions[:, chosen])

    @property
    def visual_tokens(self) -> Tensor:
        """Of each sample, int64 [B]."""
        if self.valid is not None:
            return self.valid.sum(1)
        return torch.full((len(self),), self.features.shape[1], device=self.features.device)


class FrozenModel:
    """The vision-language model around the policy: no module, so that nothing registers its parameters."""

    def __init__(self, model: nn.Module, adapter, checkpointing: bool = False):
        """
        Args:
            model: Hugging Face's.
            adapter: what is known of its family (`backbones.families.family.Adapter`).
            checkpointing: compute the language model's layers again in the backward pass.
        """
        self.model = model.eval().requires_grad_(False)
        self.adapter = adapter
        if checkpointing:
            # Only layers in training mode do it; theirs alone is set, not that of what is inside (dropout).
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in adapter.layers:
                layer.training = True
        vision = model.config.vision_config
        self.width = adapter.family.feature_width(vision)
        self.text_width = self.adapter.text_config.hidden_size
        self._embed = model.get_input_embeddings()

    @torch.no_grad()
    def features(self, images: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Grid]]:
        """V of each image, float32 [N, d], and its rows and columns of visual tokens. images: what the
        model's image processor makes of them."""
        device, dtype = self._embed.weight.device, self.model.dtype
        moved = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in images.items()}
        feature, given = self.adapter.feature, self.adapter.images(moved)
        seen = self.adapter.see(given, range(len(given)), given.grids, {feature})
        first = 1 if self.adapter.has_cls else 0
        return [own[feature][first:].float() for own in seen], list(given.grids)

    def positions(self, before: int, grid: Grid, after: int) -> Tensor:
        """Rotary positions of a sequence with one image, int64 [1, n], or M-RoPE's [3, n]. before, after: the
        numbers of tokens on either side."""
        return self.adapter.prompt_positions(before, grid, after)

    @torch.no_grad()
    def words(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """E: embeddings of each prompt's text without its answer, float32 [B, T, D], just what the method
        gets at inference; and which are no padding, bool [B, T]."""
        head = batch.before.expand(len(batch), -1)
        longest = int(batch.question.max())
        ids = torch.cat([head, batch.after[:, :longest]], 1)
        places = torch.arange(ids.shape[1], device=ids.device)
        return self._embed(ids).float(), places < (head.shape[1] + batch.question)[:, None]

    def loss(
        self,
        batch: Batch,
        tokens: Tensor,
        places: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean next-token loss over the answers, and the share of answers that are right in every token.

        tokens: [B, V, d], read through the model's own projector. places: int64 [B, V], which of the N places
        each stands in (their rotary positions), ascending; None: V = N, all. valid: bool [B, V], False at
        padding; needed with `places` alone.
        """
        rows, n = batch.features.shape[:2]
        device = tokens.device
        visual = self.adapter.project(tokens.to(self.model.dtype))
        head, tail = self._embed(batch.before).expand(rows, -1, -1), self._embed(batch.after)
        x = torch.cat([head, visual, tail], 1)
        prefix = head.shape[1]
        positions = batch.positions
        if places is None:
            valid = batch.valid
        else:
            columns = (prefix + places).expand(len(positions), -1, -1)
            own = (positions[..., :prefix], positions.gather(2, columns), positions[..., prefix + n :])
            positions = torch.cat(own, 2)
        if len(positions) == 1:
            positions = positions[0]
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=device)
        if valid is not None:
            mask[:, prefix : prefix + valid.shape[1]] = valid
        hidden = self.adapter.language_model(
            inputs_embeds=x, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        # A token's loss is read off the state before it: `after` starts one place behind the image.
        hidden = hidden[:, -tail.shape[1] - 1 : -1]
        asked = batch.targets != IGNORE
        logits = self.model.lm_head(hidden[asked]).float()
        wanted = batch.targets[asked]
        wrong = torch.zeros(rows, device=device).index_add_(
            0, asked.nonzero()[:, 0], (logits.argmax(-1) != wanted).float()
        )
        return F.cross_entropy(logits, wanted), (wrong == 0).float().mean()


@dataclass(frozen=True)
class ObjectiveConfig:
    """gamma, sharpness and the rest are open in our copy of the paper.

    chain: links of the straight-through chain that the gradient follows, None for all (see `Policy.replay`).
    k_from: K-bar of Eq. 12: the `batch`'s running average (the paper's), or (ours) each sample's own: the
    hard count in value, E[K] in gradient, so that the LM loss sees, and answers for, every sample's length.
    slots: places that the language model reads: those chosen (the last ones not, if they are more), then
    others, as noise, at random for each sample. None: all N, as in the paper. Fewer (ours) make a step
    cheaper, and its sequence more like the one at inference.
    held (ours): the mean K is held from outside, see `with_held_length`. supervise: see `TrainOptions`.
    """

    gamma: float
    aggregation: Aggregation = "full"
    chain: int | None = 1
    k_from: Literal["batch", "sample"] = "batch"
    slots: int | None = None
    held: bool = False
    supervise: Literal["loss", "evidence"] = "loss"


@dataclass(frozen=True)
class Step:
    """Where a training step stands. alpha: the text gate. sharpness: of SoftTopK. length_weight: lambda.
    mean_count: K-bar. seed: of the step's noise."""

    alpha: float
    sharpness: float
    length_weight: float
    mean_count: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Of one batch. loss: to be differentiated. The rest has no gradient; count: K, [B]; margins: of the
    stop logit, [B, S]; recall: share of the evidence that was chosen. NaN stands for what there is not."""

    loss: Tensor
    lm_loss: Tensor
    right: Tensor
    expected: Tensor
    count: Tensor
    margins: Tensor
    gates: Tensor
    pointer_max: Tensor
    steps: int
    recall: Tensor


class GatedObjective(nn.Module):
    """A policy trained through the gate (Eqs. 12 to 14): what StepPrune and its one-shot sibling share. Its
    parameters are all that is trained.

    slots: see `ObjectiveConfig`.
    """

    def __init__(
        self, policy: nn.Module, denoiser: LocalDenoiser, frozen: FrozenModel, slots: int | None = None
    ):
        super().__init__()
        self.policy, self.denoiser, self.slots = policy, denoiser, slots
        self._frozen = (frozen,)

    @property
    def frozen(self) -> FrozenModel:
        return self._frozen[0]

    def lm_loss(self, batch: Batch, gates: Tensor, choices: Choices, seed: int) -> tuple[Tensor, Tensor]:
        """Of the gated and denoised sequence, see `FrozenModel.loss`.

        Args:
            batch: B samples of N visual tokens.
            gates: [B, N] in 0..1.
            choices: what was chosen, which has the first right to a slot.
            seed: of the noise.
        """
        tokens, generator = self.gated(batch, gates, seed)
        places, valid = self._slots(choices, batch.valid, generator, batch.features.shape[1]), None
        tokens = self.denoiser(tokens)
        if places is not None:
            tokens = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
            valid = None if batch.valid is None else batch.valid.gather(1, places)
        return self.frozen.loss(batch, tokens, places, valid)

    def gated(self, batch: Batch, gates: Tensor, seed: int) -> tuple[Tensor, torch.Generator | None]:
        """Eq. 13's tokens, [B, N, d], and the generator that made their noise."""
        # of tensors without values (an estimate of memory) nothing is drawn
        generator = None if gates.is_meta else torch.Generator(gates.device).manual_seed(seed)
        noise = torch.randn(
            batch.features.shape, generator=generator, device=gates.device, dtype=batch.features.dtype
        )
        return noise_gate(batch.features, gates, noise, batch.valid), generator

    def chosen(self, batch: Batch, step: Step) -> tuple[Choices, Tensor]:
        """What inference keeps, and the gates of training, [B, N]; without gradient."""
        raise NotImplementedError

    def settled(self) -> dict[str, object]:
        """Values that follow from the options, for a checkpoint's description."""
        return {}

    def also(self, batch: Batch) -> dict[str, Choices]:
        """Further choices of inference to be compared, by the pathway's name."""
        return {}

    def _slots(
        self, choices: Choices, valid: Tensor | None, generator: torch.Generator | None, n: int
    ) -> Tensor | None:
        """Which of n places the language model reads, int64 [B, slots]: what was chosen, in order of choice,
        then others at random, padding last. None: all places."""
        slots = self.slots
        if slots is None or slots >= n:
            return None
        priority = torch.rand(len(choices.count), n + 1, generator=generator, device=choices.order.device)
        if valid is not None:
            priority[:, :n].masked_fill_(~valid, -1)
        steps = torch.arange(choices.order.shape[1], device=choices.order.device)
        priority = priority.scatter(1, choices.order, (n - steps).float().expand(choices.order.shape))[:, :n]
        return priority.topk(slots, 1).indices.sort(1).values


class Objective(GatedObjective):
    """L = L_LM + lambda E[K] / N (Eq. 15)."""

    def __init__(self, policy: Policy, denoiser: LocalDenoiser, frozen: FrozenModel, config: ObjectiveConfig):
        super().__init__(policy, denoiser, frozen, config.slots)
        self.config = config

    def forward(self, batch: Batch, step: Step) -> Outcome:
        if self.config.supervise == "evidence":
            return self._by_evidence(batch, step)
        words, valid_words = self.frozen.words(batch)
        memory = self.policy.remember(batch.features, words, batch.valid, valid_words, step.alpha)
        order, margins = self.policy.explore(memory)
        choices = trimmed(cut_at(order, margins, memory.stop))
        p = self.policy.replay(memory, choices, self.config.chain)
        if self.config.held:
            p = with_held_length(p, choices, self.policy.config.temperature)
        length = expected_length(p, choices)
        gates = self.gates(p, choices, length, step, batch.valid)
        lm_loss, right = self.lm_loss(batch, gates, choices, step.seed)
        loss = lm_loss + step.length_weight * (length / batch.visual_tokens).mean()
        return Outcome(
            loss,
            lm_loss.detach(),
            right,
            length.detach().mean(),
            choices.count,
            margins,
            gates.detach(),
            surest(p.detach(), choices),
            choices.order.shape[1],
            recall(choices, batch),
        )

    def _by_evidence(self, batch: Batch, step: Step) -> Outcome:
        """The loss is the pointer's divergence from the evidence, along the policy's own choices: at each
        step from the evidence not yet chosen, all of it alike, and from the stop action once none is left."""
        words, valid_words = self.frozen.words(batch)
        memory = self.policy.remember(batch.features, words, batch.valid, valid_words, step.alpha)
        order, margins = self.policy.explore(memory)
        path = until_found(order, batch.evidence, memory.stop)
        log_p = self.policy.replay(memory, path, self.config.chain, log=True)
        wanted = still_wanted(path, batch.evidence)
        sizes = wanted.sum(-1)
        # where a token was chosen before it is masked: -inf, and not wanted
        apart = -log_p.masked_fill(~wanted, 0).sum(-1) / sizes - sizes.log()
        loss = ((apart * path.running).sum(1) / path.running.sum(1)).mean()
        none = torch.tensor(math.nan, device=loss.device)
        choices = cut_at(order, margins, memory.stop)
        p = log_p.detach().exp()
        return Outcome(
            loss,
            none,
            none,
            expected_length(p, path).mean(),
            choices.count,
            margins,
            none.expand(batch.features.shape[:2]),
            surest(p, path),
            path.order.shape[1],
            recall(choices, batch),
        )

    def settled(self) -> dict[str, object]:
        return {"gamma": self.config.gamma}

    @torch.no_grad()
    def chosen(self, batch: Batch, step: Step) -> tuple[Choices, Tensor]:
        words, valid_words = self.frozen.words(batch)
        memory = self.policy.remember(batch.features, words, batch.valid, valid_words, step.alpha)
        choices = trimmed(self.policy.decode(memory))
        p = self.policy.replay(memory, choices, 0)
        return choices, self.gates(p, choices, expected_length(p, choices), step, batch.valid)

    def gates(
        self, p: Tensor, choices: Choices, length: Tensor, step: Step, valid: Tensor | None = None
    ) -> Tensor:
        """s-tilde of Eq. 12, [B, N]; 0 at padding."""
        s = standardised(scores(p, choices, self.config.gamma, self.config.aggregation), valid)
        k: Tensor | float = step.mean_count
        if self.config.k_from == "sample":
            k = choices.count + (length - length.detach())
        return soft_topk(s, k, step.sharpness, valid)


def surest(p: Tensor, path: Choices) -> Tensor:
    """The largest probability of a step, mean over the steps taken. p: [B, S, N + 1]."""
    return (p.amax(-1) * path.running).sum() / path.running.sum()


def recall(choices: Choices, batch: Batch) -> Tensor:
    """Share of each sample's evidence that was chosen, mean; NaN if the evidence is unknown."""
    if batch.evidence is None:
        return torch.tensor(math.nan, device=choices.order.device)
    found = taken(choices, batch.evidence.shape[1]) & batch.evidence
    return (found.sum(1) / batch.evidence.sum(1)).mean()


def taken(choices: Choices, n: int) -> Tensor:
    """bool [B, N]: what was chosen of n tokens."""
    found = torch.zeros(len(choices.order), n + 1, dtype=torch.bool, device=choices.order.device)
    return found.scatter(1, choices.order, True)[:, :n]


def until_found(order: Tensor, evidence: Tensor, stop: int) -> Choices:
    """A trajectory that never stops, cut where all the evidence has been chosen.

    order: int64 [B, S]. evidence: bool [B, N]. stop: index of the stop action.
    """
    missing = evidence.sum(1, keepdim=True) - evidence.gather(1, order).cumsum(1)
    count = (missing > 0).sum(1) + 1
    count = count.clamp(max=order.shape[1])
    steps = torch.arange(order.shape[1], device=order.device)
    return trimmed(Choices(order.masked_fill(steps >= count[:, None], stop), count))


def still_wanted(path: Choices, evidence: Tensor) -> Tensor:
    """What each step should choose, bool [B, S, N + 1]: the evidence that is left; the stop action if none
    is."""
    n = evidence.shape[1]
    before = F.one_hot(path.order, n + 1).cumsum(1)[..., :n]
    before = torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], 1)
    left = evidence[:, None] & (before == 0)
    return torch.cat([left, ~left.any(-1, keepdim=True)], -1)


PATHWAYS = ("vanilla", "gated", "gated, no denoiser", "hard", "hard, denoised")


@torch.no_grad()
def compare_pathways(objective: GatedObjective, batch: Batch, step: Step) -> dict[str, tuple[float, float]]:
    """LM loss and share of right answers of one batch: nothing pruned; the training pathway with and without
    its denoiser; the hard subset of inference without and with it. The selection is the same in all."""
    frozen, denoiser = objective.frozen, objective.denoiser
    choices, gates = objective.chosen(batch, step)
    gated, _ = objective.gated(batch, gates, step.seed)
    places, valid = padded_places(choices)
    hard = at_places(batch, places)
    losses = (
        frozen.loss(batch, batch.features),
        frozen.loss(batch, denoiser(gated)),
        frozen.loss(batch, gated),
        frozen.loss(batch, hard, places, valid),
        frozen.loss(batch, denoiser(hard), places, valid),
    )
    found = dict(zip(PATHWAYS, losses))
    for name, others in objective.also(batch).items():
        places, valid = padded_places(others)
        found[name] = frozen.loss(batch, at_places(batch, places), places, valid)
    return {name: (float(loss), float(right)) for name, (loss, right) in found.items()}


def at_places(batch: Batch, places: Tensor) -> Tensor:
    """The visual tokens at int64 [B, V], [B, V, d]."""
    return batch.features.gather(1, places[..., None].expand(-1, -1, batch.features.shape[-1]))


def padded_places(choices: Choices) -> tuple[Tensor, Tensor]:
    """The chosen places of each sample in spatial order, int64 [B, V], and which are no padding."""
    kept = choices.kept()
    places = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)
    valid = torch.arange(places.shape[1], device=places.device) < choices.count[:, None]
    return places, valid
