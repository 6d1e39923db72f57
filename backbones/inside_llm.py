"""The part of the engine inside the language model: cuts on entry of decoder layers, in prefill, and what
layers behind a cut get in place of the full-length arguments that the model's own loop passes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from backbones.before_llm import check
from backbones.cut import Layout, cut, gather
from backbones.llava import Llava
from backbones.rows import attention_rows, layer_keys
from methods.base import PromptView, Pruner, Stage, StageView

Rotary = tuple[Tensor, Tensor]


@dataclass
class Prompt:
    """A batch on entry of the first layer. images: number of images of each sample. next: position [B] of the
    first decoded token, by the prompt's own numbering."""

    layout: Layout
    images: Sequence[int]
    next: Tensor


@dataclass
class _AfterCut:
    """What a cut leaves behind. rotary: (cos, sin) of the tokens left, [B, W, d_head]. next: position [B] of
    the first decoded token if the cut (or an earlier one) renumbered, else None. arguments: what layers
    behind it get in forward pass `step`."""

    layout: Layout
    rotary: Rotary
    next: Tensor | None
    step: object = None
    arguments: dict = field(default_factory=dict)


class LayerSide:
    """The stages of one pruner on one model. `start` begins a prefill; all else belongs to the latest one."""

    def __init__(self, adapter: Llava, pruner: Pruner):
        self.adapter, self.pruner = adapter, pruner
        layers = len(adapter.layers)
        self.stages: list[Stage] = list(pruner.stages(adapter.visual_tokens, layers)) if pruner.acts else []
        entries = [stage.layer for stage in self.stages]
        #: how many cuts lie at or before each layer
        self._cuts_until = [sum(entry <= i for entry in entries) for i in range(layers)]
        self._stage_at = {stage.layer: stage for stage in self.stages}

    def start(self, prompt: Prompt, embeds: Tensor) -> None:
        """A prefill begins. embeds: [B, W, D], input of the first layer."""
        self._prompt = prompt
        self._after: list[_AfterCut] = []
        self._previous: tuple[Tensor, Rotary] | None = None
        choosers = {stage.rows for stage in self.stages if stage.rows}  # stages may share one: asked once
        self._rows = {choose: self._choose_rows(choose, embeds) for choose in choosers}

    def forget(self) -> None:
        """Drop all tensors."""
        self._prompt = self._previous = None
        self._after, self._rows = [], {}

    @property
    def layout(self) -> Layout:
        """Of the columns after the latest cut."""
        return self._after[-1].layout if self._after else self._prompt.layout

    def _choose_rows(self, choose: Callable[[PromptView], Tensor], embeds: Tensor) -> list[Tensor]:
        rows = []
        for own, columns in zip(embeds, self._prompt.layout.columns):
            if len(columns):
                rows.append(choose(PromptView(own[columns], own[int(columns[-1]) + 1 :])))
            else:  # nothing to rate; never read
                rows.append(torch.tensor([-1], device=embeds.device))
        return rows

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
        """Keep layer i's query rows for a stage right behind it that reads its attention."""
        stage = self._stage_at.get(i + 1)
        if stage is None or stage.attention != "previous":
            self._previous = None
            return
        rows = slice(None) if stage.rows else slice(-1, None)
        self._previous = hidden[:, rows], tuple(t[:, rows] for t in self._rotary(kwargs))

    def _rotary(self, kwargs: dict) -> Rotary:
        """(cos, sin) of the present columns."""
        return self._after[-1].rotary if self._after else kwargs["position_embeddings"]

    def _cut(self, stage: Stage, hidden: Tensor, kwargs: dict) -> Tensor:
        """Ask the stage about every sample, drop what it does not keep, and note the state behind the cut."""
        before, rotary = self.layout, self._rotary(kwargs)
        attention = self._attention(stage, hidden, rotary, kwargs) if any(before.visual) else None
        answers = [self._ask(stage, b, hidden, attention) for b in range(len(hidden))]
        targets, sources, places, kept = [], [], [], []
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
            places.append(torch.where(made, targets[-1], own))
            kept.append(torch.where(made, own, identity[own.clamp(min=0)]))
        move, after = cut(before, targets, sources, places, kept)
        hidden = gather(hidden, move.source)
        for b, answer in enumerate(answers):
            if answer is not None and answer.tokens is not None:
                hidden[b, after.columns[b]] = answer.tokens.to(hidden.dtype)
        if stage.positions == "renumbered":
            rotary, following = (
                self.adapter.language_model.rotary_emb(hidden, position_ids=after.positions),
                after.ends,
            )
        else:
            rotary = tuple(gather(t, move.place) for t in rotary)
            following = self._after[-1].next if self._after else None
        self._after.append(_AfterCut(after, rotary, following))
        return hidden

    def _ask(self, stage: Stage, b: int, hidden: Tensor, attention: list[Tensor] | None):
        layout = self.layout
        columns = layout.columns[b]
        if not len(columns):
            return None
        view = StageView(
            attention=None if attention is None else attention[b][..., columns],
            kept=layout.kept[b],
            total=len(self._prompt.layout.columns[b]),
            images=self._prompt.images[b],
            _hidden=hidden[b],
            _columns=columns,
        )
        answer = stage.select(view)
        check(self.pruner, answer, len(columns), len(columns))
        return answer

    def _attention(self, stage: Stage, hidden: Tensor, rotary: Rotary, kwargs: dict) -> list[Tensor] | None:
        """For each sample the rows that the stage reads, [H, R, W]; None if it reads none."""
        if stage.attention is None:
            return None
        if stage.attention == "own":
            layer, queries = self.adapter.layers[stage.layer], hidden
            keys = layer_keys(layer, hidden, rotary)
        else:
            layer = self.adapter.layers[stage.layer - 1]
            queries, rotary = self._previous
            cache = kwargs.get("past_key_values")
            if cache is None:
                raise RuntimeError(
                    f"{self.pruner.name} reads the key-value cache: call the model with use_cache=True"
                )
            keys = cache.layers[stage.layer - 1].keys
        layout = self.layout
        if not stage.rows:
            last = torch.tensor([-1], device=hidden.device)
            return list(_rows(layer, queries, rotary, keys, last, layout.valid))
        return [
            _rows(
                layer,
                queries[b : b + 1],
                tuple(t[b : b + 1] if len(t) > 1 else t for t in rotary),
                keys[b : b + 1],
                offsets,
                None if layout.valid is None else layout.valid[b : b + 1],
            )[0]
            for b, offsets in enumerate(self._rows[stage.rows])
        ]

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
