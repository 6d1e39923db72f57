"""The part of the engine inside the language model: cuts on entry of decoder layers, in prefill, and what
layers behind a cut get in place of the full-length arguments that the model's own loop passes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from backbones.attention_rows import attention_rows, layer_keys
from backbones.engine.selection_check import Offer, check_selections
from backbones.engine.trace import Cut
from backbones.families.family import Adapter
from backbones.layout import Layout, cut, gather
from methods.base import PromptView, Pruner, Stage, StageView

Rotary = tuple[Tensor, Tensor]


@dataclass
class PromptState:
    """A batch on entry of the first layer.

    Attributes:
        layout: of its columns.
        sizes: visual tokens of each image of each sample, unpruned.
        next: int64 [B], position of the first decoded token, by the prompt's own numbering.
    """

    layout: Layout
    sizes: Sequence[Sequence[int]]
    next: Tensor


@dataclass
class _AfterCut:
    """What a cut leaves behind.

    Attributes:
        layout: of the columns that are left.
        rotary: (cos, sin) of the tokens left, each [B, W, d_head].
        next: int64 [B], position of the first decoded token if this cut or an earlier one renumbered; else
            None.
        step: the forward pass that `arguments` belong to.
        arguments: what the layers behind the cut get in that pass.
    """

    layout: Layout
    rotary: Rotary
    next: Tensor | None
    step: object = None
    arguments: dict = field(default_factory=dict)


class LayerSide:
    """The stages of one pruner on one model. `start` begins a prefill; all else belongs to the latest one.

    Stages depend on the sizes of a sample's images; what all samples' have in common (layers, attention,
    positions) is read off the first that has an image.
    """

    def __init__(self, adapter: Adapter, pruner: Pruner):
        self.adapter, self.pruner = adapter, pruner
        self._known: dict[tuple[int, ...], list[Stage]] = {}  # by the sizes of a sample's images
        self.stages: list[Stage] = []
        #: of the latest cut, by sample
        self.cuts: list[Cut] = []

    def start(self, prompt: PromptState, embeds: Tensor) -> None:
        """A prefill begins. embeds: [B, W, D], input of the first layer."""
        self._prompt = prompt
        self._after: list[_AfterCut] = []
        self._previous: tuple[Tensor, Rotary] | None = None
        self._keys: tuple[Tensor, Rotary] | None = None
        self._own = [self._stages(tuple(sizes)) for sizes in prompt.sizes]
        self.stages = next(filter(None, self._own), [])
        entries = [stage.layer for stage in self.stages]
        if any([stage.layer for stage in own] != entries for own in self._own if own):
            raise RuntimeError(f"{self.pruner.name} cuts before other layers for images of other sizes")
        #: how many cuts lie at or before each layer
        self._cuts_until = [sum(entry <= i for entry in entries) for i in range(len(self.adapter.layers))]
        self._stage_at = {layer: number for number, layer in enumerate(entries)}
        self._rows = [self._choose_rows(*pair) for pair in zip(self._own, prompt.layout.columns, embeds)]

    def _stages(self, sizes: tuple[int, ...]) -> list[Stage]:
        """The stages for a sample with images of so many visual tokens: those for the first one, with the
        counts of all together."""
        if sizes not in self._known:
            layers, acts = len(self.adapter.layers), self.pruner.acts
            of_each = [self.pruner.stages(n, layers) if acts else () for n in sizes]
            self._known[sizes] = [
                replace(stages[0], count=None if stages[0].count is None else sum(s.count for s in stages))
                for stages in zip(*of_each)
            ]
        return self._known[sizes]

    def forget(self) -> None:
        """Drop all tensors."""
        self._prompt = self._previous = self._keys = None
        self._after, self._rows, self.cuts = [], [], []

    @property
    def layout(self) -> Layout:
        """Of the columns after the latest cut."""
        return self._after[-1].layout if self._after else self._prompt.layout

    @staticmethod
    def _choose_rows(
        stages: Sequence[Stage], columns: Tensor, embeds: Tensor
    ) -> dict[Callable[[PromptView], Tensor], Tensor]:
        """The query rows that a sample's stages choose; they may share a chooser, which is asked once."""
        choosers = {stage.rows for stage in stages if stage.rows}
        if not choosers:
            return {}
        prompt = PromptView(embeds[columns], embeds[int(columns[-1]) + 1 :])
        return {choose: choose(prompt) for choose in choosers}

    def enter(self, i: int, hidden: Tensor, kwargs: dict, prefill: bool, step: object) -> tuple[Tensor, dict]:
        """Layer i's input and changed arguments, given what the model's loop passes: [B, W, D] and kwargs."""
        if prefill and i in self._stage_at:
            hidden = self._cut(self._stage_at[i], hidden, kwargs)
        if prefill:
            self._remember(i, hidden, kwargs)
        if not self._cuts_until[i]:
            return hidden, {}
        return hidden, self._arguments(self._after[self._cuts_until[i] - 1], i, hidden, kwargs, prefill, step)

    def _remember(self, i: int, hidden: Tensor, kwargs: dict) -> None:
        """Keep layer i's query rows for a stage right behind it that reads its attention, and what its keys
        come from if no cache holds them."""
        number = self._stage_at.get(i + 1)
        stage = None if number is None else self.stages[number]
        self._previous = self._keys = None
        if stage is None or not (stage.keys or stage.attention == "previous"):
            return
        rows = slice(None) if stage.rows else slice(-1, None)
        rotary = self._rotary(kwargs)
        self._previous = hidden[:, rows], tuple(t[:, rows] for t in rotary)
        if kwargs.get("past_key_values") is None:
            self._keys = hidden, rotary

    def _rotary(self, kwargs: dict) -> Rotary:
        """(cos, sin) of the present columns."""
        return self._after[-1].rotary if self._after else kwargs["position_embeddings"]

    def _cut(self, number: int, hidden: Tensor, kwargs: dict) -> Tensor:
        """Ask stage `number` about every sample, drop what it does not keep, note the state behind the
        cut."""
        before, rotary = self.layout, self._rotary(kwargs)
        attention = self._attention(number, hidden, rotary, kwargs) if any(before.visual) else None
        keys = self._previous_keys(number, kwargs) if self.stages[number].keys else None
        answers = [self._ask(number, b, hidden, attention, keys) for b in range(len(hidden))]
        self._check(answers, hidden)
        targets, sources, places, kept, self.cuts = [], [], [], [], []
        for answer, identity in zip(answers, before.kept):
            none = answer is None  # a sample without visual tokens
            own = identity[:0] if none else answer.kept
            made = own < 0
            if none or answer.tokens is None:
                targets.append(own.sort().values)
                sources.append(own)
            else:
                targets.append(torch.arange(len(own), device=own.device))
                sources.append(targets[-1])
            given = None if none else answer.places
            places.append(torch.where(made, targets[-1], own) if given is None else given)
            kept.append(torch.where(made, own, identity[own.clamp(min=0)]))
            self.cuts.append(Cut(own, None if none else answer.merged, len(identity)))
        move, after = cut(before, targets, sources, places, kept)
        hidden = gather(hidden, move.source)
        for b, answer in enumerate(answers):
            if answer is not None and answer.tokens is not None:
                hidden[b, after.columns[b]] = answer.tokens.to(hidden.dtype)
        if self.stages[number].positions == "renumbered" and self.adapter.renumbers:
            rotary, following = (
                self.adapter.language_model.rotary_emb(hidden, position_ids=after.positions),
                after.ends,
            )
        else:
            rotary = tuple(gather(t, move.place) for t in rotary)
            following = self._after[-1].next if self._after else None
        self._after.append(_AfterCut(after, rotary, following))
        return hidden

    def _ask(self, number: int, b: int, hidden: Tensor, attention: list[Tensor] | None, keys: Tensor | None):
        """The stage's answer about sample b, None if it has no visual tokens. keys: [B, H_kv, W, d_head]."""
        layout = self.layout
        columns = layout.columns[b]
        if not len(columns):
            return None
        stage = self._own[b][number]
        view = StageView(
            attention=None if attention is None else attention[b][..., columns],
            kept=layout.kept[b],
            total=len(self._prompt.layout.columns[b]),
            images=len(self._prompt.sizes[b]),
            _hidden=hidden[b],
            _columns=columns,
            count=stage.count,
            sizes=tuple(self._prompt.sizes[b]),
            length=layout.lengths[b],
            keys=None if keys is None else keys[b, :, -layout.lengths[b] :].transpose(0, 1).flatten(1),
            final_norm=self.adapter.language_model.norm,
        )
        return stage.select(view)

    def _check(self, answers: Sequence[object], hidden: Tensor) -> None:
        """Raises BadSelection for an answer about a sample with visual tokens that cannot be applied."""
        asked = [(own, n) for own, n in zip(answers, self.layout.visual) if n]
        width = hidden.shape[-1]
        offers = [Offer(hidden[0], n, n, width) for _, n in asked]
        check_selections(self.pruner, [own for own, _ in asked], offers)

    def _attention(self, number: int, hidden: Tensor, rotary: Rotary, kwargs: dict) -> list[Tensor] | None:
        """For each sample the rows that stage `number` reads, [H, R, W]; None if it reads none."""
        stage = self.stages[number]
        if stage.attention is None:
            return None
        if stage.attention == "own":
            layer, queries = self.adapter.layers[stage.layer], hidden
            keys = layer_keys(layer, hidden, rotary)
        else:
            layer = self.adapter.layers[stage.layer - 1]
            queries, rotary = self._previous
            keys = self._previous_keys(number, kwargs)
        layout = self.layout
        if not stage.rows:
            last = torch.tensor([-1], device=hidden.device)
            return list(_rows(layer, queries, rotary, keys, last, layout.valid))
        nothing = torch.tensor([-1], device=hidden.device)  # for a sample without image; never read
        rows = [own.get(self._own[b][number].rows) if own else nothing for b, own in enumerate(self._rows)]
        return [
            _rows(
                layer,
                queries[b : b + 1],
                tuple(t[b : b + 1] if len(t) > 1 else t for t in rotary),
                keys[b : b + 1],
                offsets,
                None if layout.valid is None else layout.valid[b : b + 1],
            )[0]
            for b, offsets in enumerate(rows)
        ]

    def _previous_keys(self, number: int, kwargs: dict) -> Tensor:
        """The rotated keys of the layer before stage `number`, [B, H_kv, W, d_head]: the cache's, or computed
        once more where there is none."""
        before = self.stages[number].layer - 1
        if self._keys is not None:
            return layer_keys(self.adapter.layers[before], *self._keys)
        return kwargs["past_key_values"].layers[before].keys

    def _arguments(
        self, state: _AfterCut, i: int, hidden: Tensor, kwargs: dict, prefill: bool, step: object
    ) -> dict:
        """Mask and rotary embeddings behind a cut: made at its first layer in each forward pass."""
        if state.step is step:
            return state.arguments
        cache, rotary, new = kwargs.get("past_key_values"), state.rotary, 0
        if not prefill:
            new = cache.get_seq_length(i) + 1 - state.layout.width
            rotary = kwargs["position_embeddings"]
            if state.next is not None:
                positions = (state.next + (new - 1))[:, None]
                rotary = self.adapter.language_model.rotary_emb(hidden, position_ids=positions)
        mask = create_causal_mask(
            config=self.adapter.text_config,
            inputs_embeds=hidden,
            attention_mask=state.layout.valid_with(new),
            past_key_values=cache,
            position_ids=None,
            layer_idx=i,
        )
        # position_ids None: FlashAttention would take gaps in them for borders of packed sequences
        state.arguments = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}
        state.step = step
        return state.arguments


def _rows(
    layer, queries: Tensor, rotary: Rotary, keys: Tensor, offsets: Tensor, valid: Tensor | None
) -> Tensor:
    """attention_rows at offsets from the end."""
    columns = offsets + keys.shape[2]
    return attention_rows(
        layer, queries[:, offsets], tuple(t[:, offsets] for t in rotary), keys, columns, valid
    )
