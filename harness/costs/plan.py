"""A method's plan on a backbone of given shape: visual tokens entering each layer, and the method's own work.

The method itself is asked, not a table about it: its `select` and the `select` of its `stages` run on random
tensors of the true widths, in the engine's order (`backbones.engine.before_llm`,
`backbones.engine.inside_llm`), with torch's counter around them. What the engine computes on a method's
behalf (a few rows of attention, keys of a layer not yet run) is counted by formula. A method's sizes follow
from its budget and not from the values, or else `varies` says so: SparseVLM's recycled clusters are a fixed
share of what it drops, PruMerge's released rule depends on the image. How many words rate the tokens
(SparseVLM) does depend on them: all words after the image are taken, the most there can be (a few hundredths
of a percent of the total).

A method with weights is asked as it would be before training: it may have a method `untrained(width,
text_width, tokens)` that gives it random weights for those widths (of the tower's features and of the word
embeddings) and makes it take exactly `tokens` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbones import families
from methods.base import ImageView, PromptView, Pruner, Selection, Signal, StageView


@dataclass(frozen=True)
class Plan:
    """What a method leaves and computes, layer by layer.

    Attributes:
        visual_tokens: entering each of the LLM's layers [L].
        grid: rows and columns of visual tokens that the tower sees.
        projected: visual tokens through the projector.
        own: MAC of the method's own work.
        varies: the counts depend on the image; those here are of a random one.
    """

    visual_tokens: tuple[int, ...]
    grid: tuple[int, int]
    projected: int
    own: int
    varies: bool

    @property
    def mean(self) -> float:
        """Mean over the layers' inputs."""
        return sum(self.visual_tokens) / len(self.visual_tokens)

    def runs(self) -> str:
        """`576 x2, 64 x30`: the counts layer by layer."""
        runs: list[list[int]] = []
        for n in self.visual_tokens:
            if runs and runs[-1][0] == n:
                runs[-1][1] += 1
            else:
                runs.append([n, 1])
        return ", ".join(f"{n} x{layers}" for n, layers in runs)


def make(
    config,
    pruner: Pruner,
    grid: tuple[int, int],
    text_before: int,
    text_after: int,
    raters: int | None = None,
) -> Plan:
    """The plan of `pruner` for one image of `grid` rows and columns of visual tokens.

    config: of the whole model (Hugging Face's, or `backbones.shapes.Shape.config`). text_before,
    text_after: text tokens around the image. raters: query rows of a stage that chooses them by their values;
    None: all words after the image. Raises UserError if the method does not suit the shape, and whatever the
    method raises.
    """
    if pruner.acts:
        pruner.validate(grid[0] * grid[1], config.text_config.num_hidden_layers)
        families.of_type(config.model_type).check_signals(pruner)
        give_weights(config, pruner, grid[0] * grid[1])
    ask = _Asked(config, pruner, grid, text_before, text_after, raters)
    first = ask.plan(seed=0)
    if hasattr(pruner, "untrained"):  # as many tokens as it was told, whatever the image
        return Plan(*first, varies=False)
    return Plan(*first, varies=first[:3] != ask.plan(seed=1)[:3])


def give_weights(config, pruner: Pruner, visual_tokens: int) -> None:
    """Random ones, for a method that has weights (its `untrained`), so that it takes as many tokens as its
    budget says."""
    if pruner.acts and hasattr(pruner, "untrained"):
        width = families.of_type(config.model_type).feature_width(config.vision_config)
        pruner.untrained(width, config.text_config.hidden_size, pruner.count(visual_tokens))


class _Asked:
    def __init__(self, config, pruner, grid, text_before, text_after, raters):
        self.config, self.pruner = config, pruner
        self.family = families.of_type(config.model_type)
        self.has_cls = self.family.has_cls
        self.full, self.text, self.after, self.raters = grid, text_before + text_after, text_after, raters
        self.llm, self.vision = config.text_config, config.vision_config
        self.head_dim = (
            getattr(self.llm, "head_dim", None) or self.llm.hidden_size // self.llm.num_attention_heads
        )

    def plan(self, seed: int) -> tuple[tuple[int, ...], tuple[int, int], int, int]:
        """Plan's fields in order, with random values of that seed."""
        from torch.utils.flop_counter import FlopCounterMode

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad(), FlopCounterMode(display=False) as meter:
            grid, n, projected, taps = self._before(generator)
            counts, rows = self._inside(n, generator)
        own, odd = divmod(meter.get_total_flops(), 2)
        if odd:
            raise ArithmeticError(f"torch counted an odd number of FLOPs for {self.pruner.name}")
        return tuple(counts), grid, projected, own + taps + rows

    def _before(self, generator) -> tuple[tuple[int, int], int, int, int]:
        """(grid that the tower sees, visual tokens entering the LLM, visual tokens through the projector, MAC
        of attention that the engine computes for the method)."""
        grid = self.pruner.image_grid(self.full) if self.pruner.acts else self.full
        patches = grid[0] * grid[1]
        if not self.pruner.selects:
            return grid, patches, patches, 0
        width, projected = self.family.feature_width(self.vision), 0

        def project(features: Tensor) -> Tensor:
            nonlocal projected
            projected += features.shape[:-1].numel()
            return _random(generator, *features.shape[:-1], self.llm.hidden_size)

        wanted = self.pruner.reads(self.has_cls)
        signals = {s: self._signal(s, patches, generator) for s in wanted}
        pixels = _random(generator, 3, *(14 * n for n in grid))
        text = _random(generator, self.text, self.llm.hidden_size) if self.pruner.reads_text else None
        heads = self.family.tower_heads(self.vision)
        offered = patches + self.has_cls + self.pruner.text_before(self.has_cls)
        hidden = _random(generator, offered, width)
        image = ImageView(
            hidden, grid, heads, pixels, project, signals, text, self.has_cls, final_norm=lambda x: x
        )
        if self.pruner.reads_question:
            after = _random(generator, self.after, self.llm.hidden_size)
            image = replace(image, question=[0] * self.after, text_after=after)
        (answer,) = self.pruner.select_all([image])
        n = len(answer.kept)
        received = [s.layer for s in wanted if s.kind == "received"]
        taps = sum(self.family.received_macs(self.vision, layer, patches) for layer in received)
        if self.family.projects:
            return grid, n, projected + (0 if answer.projected else n), taps
        return grid, n, patches, taps  # the merger is part of the tower's forward pass: it has run on all

    def _signal(self, signal: Signal, patches: int, generator) -> Tensor:
        if signal.kind == "received":
            return _random(generator, patches).softmax(-1)
        if signal.kind == "order":
            return torch.randperm(patches, generator=generator)
        rows = 1 if signal.kind == "cls_query" else patches + self.has_cls
        return _random(generator, rows, self.family.tower_width(self.vision))

    def _inside(self, n: int, generator) -> tuple[list[int], int]:
        """(visual tokens entering each layer, MAC of the rows of attention that the stages read)."""
        layers, total = self.llm.num_hidden_layers, n
        stages = {}
        if self.pruner.acts:
            stages = {s.layer: s for s in self.pruner.stages(self.full[0] * self.full[1], layers)}
        counts, macs = [], 0
        choosers = {s.rows for s in stages.values() if s.rows is not None}
        places = {choose: self._rows(choose(self._prompt(n, generator))) for choose in choosers}
        for layer in range(layers):
            stage = stages.get(layer)
            if stage is not None:
                attention = None
                if stage.attention is not None:
                    rows = places[stage.rows] if stage.rows else 1
                    macs += self._row_macs(rows, n + self.text, stage.attention == "own")
                    attention = _random(generator, self.llm.num_attention_heads, rows, n).softmax(-1)
                view = self._stage_view(stage, attention, n, total, generator)
                answer: Selection = stage.select(view)
                n = len(answer.kept)
            counts.append(n)
        return counts, macs

    def _stage_view(self, stage, attention, n: int, total: int, generator) -> StageView:
        """Of one sample with n visual tokens left of `total`, text before and behind them."""
        before, length = self.text - self.after, self.text + n
        keys = self.llm.num_key_value_heads * self.head_dim
        return StageView(
            attention,
            torch.arange(n),
            total,
            images=1,
            _hidden=_random(generator, length, self.llm.hidden_size),
            _columns=torch.arange(before, before + n),
            count=stage.count,
            sizes=(total,),
            length=length,
            keys=_random(generator, length, keys) if stage.keys else None,
            final_norm=lambda x: x,
        )

    def _prompt(self, n: int, generator) -> PromptView:
        width = self.llm.hidden_size
        return PromptView(_random(generator, n, width), _random(generator, self.after, width))

    def _rows(self, chosen: Sequence[int]) -> int:
        """Query rows of a stage that chooses them: as many as asked for, else all words after the image."""
        return self.raters if self.raters is not None else max(self.after, len(chosen))

    def _row_macs(self, rows: int, columns: int, own: bool) -> int:
        """backbones.attention_rows: queries of the rows, their logits; keys of a layer not yet run."""
        width = self.llm.hidden_size
        query = self.llm.num_attention_heads * self.head_dim
        keys = self.llm.num_key_value_heads * self.head_dim * width * columns if own else 0
        return rows * (width * query + columns * query) + keys


def _random(generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)
