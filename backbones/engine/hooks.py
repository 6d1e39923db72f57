"""Puts a pruner on an unmodified Hugging Face model, by hooks alone, for as long as a `with` lasts.

Before the language model: `get_image_features` is wrapped (generate() calls it itself, ahead of forward, and
reads its signature). The survivors stand in the first places of each image's features; a pre-hook of the
language model then drops the columns that are left empty. Inside it: pre-hooks of the decoder layers drop
columns on entry of a layer. generate() never knows: its token ids, 2-D mask and positions stay those of the
full prompt, and the hooks rewrite what the language model or a layer gets of them, in prefill and in every
decode step. The key-value cache simply holds fewer tokens in the layers after a cut.

A prefill is a call with an empty cache or none. Not supported, RuntimeError, the same for every method:
chunked prefill, generate() without a cache, assisted decoding, re-used or static caches, `labels`, two
threads at once, prompts padded on the right. `logits` of a plain forward have the length that is left.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from backbones.engine import questions
from backbones.engine.before_llm import ImageSide
from backbones.engine.below_cut import Rest
from backbones.engine.inside_llm import LayerSide, PromptState
from backbones.engine.selection_check import check_budget
from backbones.engine.trace import Cut, Trace
from backbones.engine.wrappers import uncompiled, unwrapped
from backbones.families import adapter_for
from backbones.families.family import Grid, Images
from backbones.layout import Layout, Move, cut, gather, layout_of
from methods.base import ImageView, Pruner, Selection

_busy: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class _Seen:
    """One image. grid: its raster in the prompt. answer: the method's; None if it waits for the prompt."""

    grid: Grid
    view: ImageView
    answer: Selection | None = None

    @property
    def places(self) -> Tensor:
        """Whose position each token of the answer takes, int64 [n]."""
        kept = self.answer.kept
        if self.answer.places is not None:
            return self.answer.places
        return torch.where(kept < 0, torch.arange(len(kept), device=kept.device), kept)


class Engine:
    """Context manager; `__enter__` gives the Trace. See `methods.base.Pruner.__call__`."""

    def __init__(self, model: nn.Module, pruner: Pruner, questions: Sequence | None = None):
        self._given, model = model, unwrapped(model)
        self.adapter = adapter_for(model)
        self.model, self.pruner, self.questions = model, pruner, questions
        if self.adapter.visual_tokens is not None:
            pruner.validate(self.adapter.visual_tokens, len(self.adapter.layers))
        self.images = ImageSide(self.adapter, pruner, model)
        self.stages = LayerSide(self.adapter, pruner)
        self.trace = Trace(len(self.adapter.layers))

    # ---- switching on and off

    def __enter__(self) -> Trace:
        if self.model in _busy:
            raise RuntimeError("a pruner is already on this model; leave its `with` first")
        _busy.add(self.model)
        self._undo: list[Callable[[], None]] = []
        self._forget()
        try:
            self._switch_on()
        except BaseException:
            self.__exit__()
            raise
        return self.trace

    def __exit__(self, *exc) -> None:
        while self._undo:
            self._undo.pop()()
        self._forget()
        _busy.discard(self.model)

    @property
    def behind(self) -> tuple[Layout, Tensor]:
        """What a method before the language model left of the latest prefill: its layout, and the position
        [B] of the next token. Only inside of the `with`."""
        return self._prompt.layout, self._prompt.next

    def resume(self, rest: Rest) -> None:
        """The next call of the language model is the rest of a prefill, of `rest.embeds` in its last columns
        and behind `rest.cache`: the method's first cut finds the columns ahead in `rest`. Only inside of the
        `with`, for a method that `cuts_only`."""
        sizes = self.adapter.image_sizes(rest.layout)
        self._rest, self._prompt = rest, PromptState(rest.layout, sizes, rest.following)
        self._renumbered = self._shortened = False
        self.trace.start(len(sizes))
        self.stages.start(self._prompt, rest.embeds)

    def _forget(self) -> None:
        """Drop all that belongs to one prefill."""
        self._rest: Rest | None = None
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._seen: list[_Seen] | None = None
        self._seen_by: int | None = None
        self._prompt: PromptState | None = None
        self._cache: object = None
        self._is_prefill = self._positions_given = False
        self._step: object = None
        self._caller: int | None = None
        self.stages.forget()

    def _switch_on(self) -> None:
        adapter = self.adapter
        self.pruner.prepare(self.model)
        hooks = [(adapter.inner, self._on_model), (adapter.language_model, self._on_language_model)]
        hooks += [(layer, functools.partial(self._on_layer, i)) for i, layer in enumerate(adapter.layers)]
        for module, hook in hooks:
            self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        self._undo.append(adapter.inner.register_forward_hook(self._after_model, always_call=True).remove)
        if self.pruner.acts:
            self._undo.append(self.model.register_forward_pre_hook(_refuse_labels, with_kwargs=True).remove)
            self._wrap(self.model, "_prefill", self._checked_prefill)
        eager = uncompiled(self._given)
        eager.__enter__()
        self._undo.append(lambda: eager.__exit__(None, None, None))
        if self.images.involved:
            self._wrap_image_features(adapter.inner)

    def _wrap(self, owner: nn.Module, name: str, make: Callable[[Callable], Callable]) -> None:
        """Put `make` of a method in its place on this one object, until the end."""
        original, had_own = getattr(owner, name), name in vars(owner)
        setattr(owner, name, make(original))
        self._undo.append(
            (lambda: setattr(owner, name, original)) if had_own else lambda: delattr(owner, name)
        )

    @staticmethod
    def _checked_prefill(original: Callable) -> Callable:
        """generate()'s prefill, refusing what makes several calls of one prompt: each would be taken for a
        prompt of its own, or for a decoding step."""

        @functools.wraps(original)
        def prefill(input_ids, generation_config, model_kwargs, *more, **options):
            chunk = generation_config.prefill_chunk_size
            if chunk is not None and chunk < input_ids.shape[1]:
                raise RuntimeError(
                    "chunked prefill is not supported while a pruner is on; leave out prefill_chunk_size"
                )
            if model_kwargs.get("use_cache", generation_config.use_cache) is False:
                raise RuntimeError(
                    "generate() without a cache is not supported while a pruner is on, since every token "
                    "would choose anew; call it with use_cache=True"
                )
            return original(input_ids, generation_config, model_kwargs, *more, **options)

        return prefill

    def _wrap_image_features(self, inner: nn.Module) -> None:
        original, had_own = inner.get_image_features, "get_image_features" in vars(inner)
        signature = inspect.signature(original)

        @functools.wraps(original)
        def get_image_features(*args, **options):
            given = signature.bind(*args, **options).arguments
            more = given.pop("kwargs", {})
            images = self.adapter.images({**given, **more})
            self._seen_by = threading.get_ident()
            return BaseModelOutputWithPooling(pooler_output=self._image_features(images))

        def restore():
            if had_own:
                inner.get_image_features = original
            else:
                del inner.get_image_features

        inner.get_image_features = get_image_features
        self._undo.append(restore)

    # ---- before the language model

    def _image_features(self, images: Images) -> list[Tensor]:
        """Stands in for the model's own: [N, D] for each image, survivors first, zeros behind."""
        views = self.images.look(images)
        if not self.pruner.selects:
            return self.images.all_tokens(views)
        if self._waits:
            self._seen = [_Seen(grid, view) for grid, view in zip(images.grids, views)]
            if self._text_before:
                return self.images.all_tokens(views)
            width = self.adapter.text_config.hidden_size
            return [v.hidden.new_zeros(1, 1).expand(n, width) for v, n in zip(views, images.sizes)]
        answers = self.images.select(views, images.sizes)
        self._seen = [_Seen(grid, view, own) for grid, view, (own, _) in zip(images.grids, views, answers)]
        return [
            torch.cat([tokens, tokens.new_zeros(n - len(tokens), tokens.shape[1])])
            for (_, tokens), n in zip(answers, images.sizes)
        ]

    @property
    def _text_before(self) -> int:
        """Text tokens ahead of each image that the method is offered as well."""
        return self.pruner.text_before(self.adapter.has_cls) if self.pruner.selects else 0

    @property
    def _waits(self) -> bool:
        """Whether the method can only be asked when the prompt is known."""
        told = self.pruner.reads_text or self.pruner.reads_question or self.pruner.answer_key
        return told or self._text_before > 0

    def _on_model(self, module, args, kwargs) -> None:
        """Pre-hook of the multimodal model: the only place where the prompt's token ids pass by."""
        me = threading.get_ident()
        if self._caller not in (None, me) or (self._seen is not None and self._seen_by != me):
            raise RuntimeError(
                "two threads call the model at once while a pruner is on; call it from one thread at a "
                "time, or give each a model of its own"
            )
        self._caller = me
        self.adapter.check_prompt(kwargs)
        self._ids = args[0] if args else kwargs.get("input_ids")
        self._positions_given = kwargs.get("position_ids") is not None

    def _after_model(self, module, args, output) -> None:
        if self._caller == threading.get_ident():
            self._caller = None

    def _on_language_model(self, module, args, kwargs):
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        if embeds is None:
            raise RuntimeError("call the whole multimodal model while a pruner is on, not its language model")
        self._step = object()
        if self._rest is not None and self._rest.cache is not self._cache:
            self._cache, self._is_prefill = self._rest.cache, True
            return None
        self._rest = None
        self._is_prefill = cache is None or cache.get_seq_length() == 0
        if self._is_prefill:
            return args, {**kwargs, **self._start(embeds, kwargs)}
        if cache is not self._cache:
            raise RuntimeError("a cache from another prefill cannot be used while a pruner is on")
        if embeds.shape[1] != 1:
            raise RuntimeError("chunked prefill and assisted decoding are not supported while a pruner is on")
        return args, {**kwargs, **self._decode_arguments(kwargs, cache)}

    def _start(self, embeds: Tensor, kwargs: dict) -> dict:
        """A prefill begins: lay out the prompt, drop the columns that `select` left empty. Gives changes."""
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if self._ids is None:
            raise RuntimeError("pass input_ids, not inputs_embeds, while a pruner is on")
        if isinstance(mask, dict) or (mask is not None and mask.ndim != 2) or _is_static(cache):
            raise RuntimeError("static caches and 4-D masks are not supported while a pruner is on")
        positions = kwargs.get("position_ids")
        layout, sizes = self._lay_out(self._ids == self.adapter.image_token_id, mask, positions)
        if layout.visual != [sum(own) for own in sizes]:
            raise RuntimeError(
                "the prompt holds a part of an image; chunked prefill is not supported while a pruner is on"
            )
        self._cache, self._mask = cache, mask
        self._renumbered = self._shortened = False
        self.trace.start(len(embeds))
        self._prompt = PromptState(layout, sizes, self.adapter.following(layout, positions))
        changed = {}
        if self.pruner.selects and any(sizes):
            changed = self._drop_empty(embeds, kwargs)
            embeds = changed["inputs_embeds"]
        self.stages.start(self._prompt, embeds)
        return changed

    def _lay_out(
        self, is_visual: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> tuple[Layout, list[list[int]]]:
        """The prompt, and how many columns each image of each sample has."""
        layout = layout_of(is_visual, mask)
        sizes = self.adapter.image_sizes(layout)
        self.adapter.check_positions(layout, sizes, positions)
        if not self._text_before:
            return layout, sizes
        for _ in range(self._text_before):
            is_visual = is_visual | torch.nn.functional.pad(is_visual[:, 1:], (0, 1))
        return layout_of(is_visual, mask), [[n + self._text_before for n in row] for row in sizes]

    def _drop_empty(self, embeds: Tensor, kwargs: dict) -> dict:
        layout, sizes = self._prompt.layout, self._prompt.sizes
        rows, tokens = self._deal(self._seen), None
        self._seen = None  # of this prompt alone
        if self._waits:
            rows, tokens = self._ask(rows, embeds)
        targets, places, kept, cuts = [], [], [], []
        empty = torch.empty(0, dtype=torch.long, device=embeds.device)
        for row, own_sizes in zip(rows, sizes):
            starts = list(itertools.accumulate(own_sizes, initial=0))
            filled = [torch.arange(len(seen.places), device=embeds.device) for seen in row]
            targets.append(torch.cat([empty, *(f + start for f, start in zip(filled, starts))]))
            places.append(torch.cat([empty, *(seen.places + start for seen, start in zip(row, starts))]))
            kept.append(torch.cat([empty, *(seen.answer.kept for seen in row)]))
            cuts.append(_of_sample([seen.answer for seen in row], own_sizes))
        move, after = cut(layout, targets, targets, places, kept)
        embeds = gather(embeds, move.source)
        for b, row in enumerate(tokens or []):
            if row:
                embeds[b, after.columns[b]] = torch.cat(row).to(embeds.dtype)
        self._note(after, cuts)
        self._shortened = True
        positions, following = self._positions(kwargs.get("position_ids"), rows, after, move)
        self._prompt = PromptState(after, sizes, following)
        mask = after.valid
        if mask is None and kwargs.get("past_key_values") is None and not kwargs.get("use_cache", True):
            # without cache and mask, transformers takes gaps in the positions for borders of packed sequences
            mask = torch.ones_like(after.positions, dtype=torch.bool)
        return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}

    def _ask(self, rows: list[list[_Seen]], embeds: Tensor) -> tuple[list[list[_Seen]], list[list[Tensor]]]:
        """The answers of a method that waited for the prompt: put into `rows`, and their tokens [n, D]."""
        layout, sizes = self._prompt.layout, self._prompt.sizes
        views = [[seen.view for seen in row] for row in rows]
        if self._text_before:
            offered = [own[columns].split(n) for own, columns, n in zip(embeds, layout.columns, sizes)]
            views = [[replace(v, hidden=x) for v, x in zip(*pair)] for pair in zip(views, offered)]
        pairs = self.images.select_with_text(views, self._told(layout, embeds), sizes)
        rows = [[replace(seen, answer=own) for seen, (own, _) in zip(*pair)] for pair in zip(rows, pairs)]
        return rows, [[tokens for _, tokens in row] for row in pairs]

    def _told(self, layout: Layout, embeds: Tensor) -> list[dict]:
        """What each sample's views see of its text or answer key, by field of ImageView."""
        told: list[dict] = [{} for _ in embeds]
        if self.pruner.reads_text:
            for own, text in zip(told, _texts(layout, embeds)):
                own["text"] = text
        if self.pruner.reads_question:
            for own, x, columns, question in zip(told, embeds, layout.columns, self._asked()):
                after = x[int(columns[-1]) + 1 :] if len(columns) else x
                own.update(question=question, text_after=after)
        hints = self.pruner.hints if self.pruner.answer_key else None
        if hints is not None:
            if len(hints) != len(told):
                raise RuntimeError(f"{self.pruner.name}: {len(hints)} hints for {len(told)} samples")
            for own, hint in zip(told, hints):
                own["hint"] = hint
        return told

    def _asked(self) -> list:
        """The question of each sample; the beams of one share it. Raises RuntimeError if their number does
        not fit."""
        batch = len(self._ids)
        if self.questions is None:
            return questions.of(self._given, self._ids, self._mask)
        beams, rest = divmod(batch, len(self.questions) or batch + 1)
        if rest or not beams:
            raise RuntimeError(f"{len(self.questions)} questions were given for a batch of {batch}")
        return [question for question in self.questions for _ in range(beams)]

    def _positions(
        self, given: Tensor | None, rows: list[list[_Seen]], after: Layout, move: Move
    ) -> tuple[Tensor, Tensor]:
        """Positions of the columns that are left, and [B] of the first decoded token."""
        adapter, before = self.adapter, self._prompt.layout
        smaller = any(seen.grid != seen.view.grid for row in rows for seen in row)
        self._renumbered = self.pruner.positions == "renumbered" if adapter.renumbers else smaller
        if not self._renumbered:
            return adapter.moved(given, before, after, move), self._prompt.next
        if adapter.renumbers:
            return after.positions, after.ends
        grids = [[(seen.grid, seen.view.grid) for seen in row] for row in rows]
        positions = adapter.moved(adapter.shrunk(given, before, grids), before, after, move)
        return positions, adapter.following(after, positions)

    def _deal(self, seen: Sequence[_Seen] | None) -> list[list[_Seen]]:
        """What was seen of each image, dealt to the samples in order of the placeholders; the beams of a
        sample share its images. Raises RuntimeError if the numbers do not fit."""
        images = [len(row) for row in self._prompt.sizes]
        beams, rest = divmod(sum(images), len(seen or [1]))
        if seen is None or rest:
            raise RuntimeError(
                f"the prompt has places for {sum(images)} images, {len(seen or [])} were seen under the "
                "pruner; have the image features computed inside of the `with`, anew for each prompt"
            )
        supply = iter(seen)
        rows: list[list[_Seen]] = []
        for n in images[::beams]:
            rows += [[next(supply) for _ in range(n)]] * beams
        return rows

    def _decode_arguments(self, kwargs: dict, cache) -> dict:
        """The language model's mask and positions for a new token behind a prompt that `select` shortened."""
        if not self._shortened:
            return {}
        layout = self._prompt.layout
        new = cache.get_seq_length() + 1 - layout.width
        positions = kwargs.get("position_ids")
        if self._renumbered or not self._positions_given:  # a model would count by the short cache
            positions = (self._prompt.next + (new - 1))[:, None]
        return {"attention_mask": layout.valid_with(new), "position_ids": positions}

    # ---- inside the language model

    def _on_layer(self, i: int, module, args, kwargs):
        given = args[0] if args else kwargs["hidden_states"]
        if self._is_prefill and i == 0:
            self._cache = kwargs.get("past_key_values")  # the model makes one where the caller gave none
        if self._rest is not None and i == self._rest.layers:
            given, kwargs = self._rest.joined(self.adapter, given, kwargs)
        cuts = len(self.stages.stages)
        hidden, changed = (
            self.stages.enter(i, given, kwargs, self._is_prefill, self._step) if cuts else (given, {})
        )
        if self._is_prefill:
            self._trace(i, hidden, cut_here=hidden is not given)
        if not changed:
            return None
        if args:
            return (hidden, *args[1:]), {**kwargs, **changed}
        return args, {**kwargs, **changed, "hidden_states": hidden}

    def _trace(self, i: int, hidden: Tensor, cut_here: bool) -> None:
        layout = self.stages.layout
        below = self._rest is not None and i < self._rest.layers
        if hidden.shape[1] != layout.width and not below:
            raise RuntimeError(f"layer {i} has {hidden.shape[1]} columns where {layout.width} were expected")
        self.trace.layer(i, layout.visual)
        if i == len(self.adapter.layers) - 1:
            check_budget(self.pruner, self._prompt.sizes, layout.visual)
        if cut_here:
            self._note(layout, self.stages.cuts)

    def _note(self, after: Layout, cuts: Sequence[Cut]) -> None:
        for noted, kept in zip(self.trace.kept, after.kept):
            noted.append(kept)
        for noted, cut_ in zip(self.trace.cuts, cuts):
            noted.append(cut_)


def _of_sample(answers: Sequence[Selection], sizes: Sequence[int]) -> Cut:
    """The answers about a sample's images, of so many tokens each, as one cut of the sample."""
    if len(answers) == 1:
        return Cut(answers[0].kept, answers[0].merged, sizes[0])
    kept, merged, start, place = [], [], 0, 0
    for answer, n in zip(answers, sizes):
        kept.append(torch.where(answer.kept < 0, answer.kept, answer.kept + start))
        own = answer.kept.new_full((n,), -1)
        if answer.merged is not None:
            own[: len(answer.merged)] = torch.where(answer.merged < 0, -1, answer.merged + place)
        merged.append(own)
        start, place = start + n, place + len(answer.kept)
    empty = torch.empty(0, dtype=torch.long)
    return Cut(torch.cat(kept) if kept else empty, torch.cat(merged) if merged else None, start)


def _refuse_labels(module, args, kwargs) -> None:
    if kwargs.get("labels") is not None:
        raise RuntimeError(
            "labels= is not supported while a pruner is on: logits have the length that is left of the "
            "prompt; take the loss of `logits` and the labels of the text yourself"
        )


def _is_static(cache) -> bool:
    return getattr(cache, "is_compileable", False)


def _texts(layout: Layout, embeds: Tensor) -> list[Tensor]:
    """The text rows [T, D] of each sample of embeds [B, W, D]."""
    texts = []
    for own, columns, length in zip(embeds, layout.columns, layout.lengths):
        is_text = torch.ones(layout.width, dtype=torch.bool, device=embeds.device)
        is_text[columns] = False
        is_text[: layout.width - length] = False
        texts.append(
            own[is_text.to(torch.int8).argsort(descending=True, stable=True)[: length - len(columns)]]
        )
    return texts
