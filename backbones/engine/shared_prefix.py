"""Answer several questions about one image from one prefill of what they share: the words ahead of the image
and the image's tokens.

In these prompts the image stands before the question, so for an unpruned model, and for every method that
chooses without the question and before the language model, the keys and values up to the image's last token
are the same whatever is asked. `read` computes them once per image; `generate` runs each question's own
tokens behind a copy of them, and decodes greedily. Of methods that cut inside the language model, what lies
below the first cut is shared so (`backbones.engine.below_cut`). Methods that read the text before the
language model are answered in full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backbones.engine.below_cut import Below, join
from backbones.engine.hooks import Engine
from backbones.engine.trace import Cut
from backbones.families import adapter_for
from methods.base import Pruner

#: settings of generate() that change greedy logits, and the values at which they do nothing
_NEUTRAL = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "num_beams": (None, 1),
}


@dataclass(frozen=True)
class Prefix:
    """What the language model holds of m prompts up to their images' last tokens.

    Attributes:
        cache: keys and values, m rows of W columns, left-padded.
        valid: bool [m, W], False at padding; None if there is none.
        next: int64 [m], position of the first token behind.
        visual_tokens: int64 [m, L], entering each layer.
        kept, cuts: by row, what the method left (`Trace.kept`, `Trace.cuts`).
        pruner: the method.
        below: of a method that cuts inside the language model; all three above are the unpruned
            model's then. None: the method has been applied.
    """

    cache: object
    valid: Tensor | None
    next: Tensor
    visual_tokens: Tensor
    kept: list[list[Tensor]]
    cuts: list[list[Cut]]
    pruner: Pruner
    below: Below | None = None


@dataclass(frozen=True)
class Answers:
    """Of B questions.

    Attributes:
        tokens: int64 [B, at most max_new_tokens], padded as generate() pads.
        visual_tokens: int64 [B, L], entering each layer.
        kept, cuts: by question, what the method left (`Trace.kept`, `Trace.cuts`).
    """

    tokens: Tensor
    visual_tokens: Tensor
    kept: list[list[Tensor]]
    cuts: list[list[Cut]]


def can_share(model: nn.Module, pruner: Pruner) -> bool:
    """Whether answers under `pruner` may be computed so, with the model's own settings of generate()."""
    settings = model.generation_config
    plain = all(getattr(settings, name, None) in neutral for name, neutral in _NEUTRAL.items())
    return plain and (pruner.independent_of_text or pruner.cuts_only)


@dataclass(frozen=True)
class Apart:
    """B full prompts, taken apart.

    Attributes:
        prefixes: model inputs, left-padded [m, n'], one row for each distinct image, ending with its last
            token.
        rows: which of them each question is about.
        texts: B tensors int64 [n_i] of token ids, behind the image.
    """

    prefixes: Mapping[str, Tensor]
    rows: Sequence[int]
    texts: Sequence[Tensor]


def split(model: nn.Module, inputs: Mapping[str, Tensor], images: Sequence[object]) -> Apart:
    """Full prompts into what is shared and what is not.

    Args:
        inputs: of the model, left-padded [B, n], one image per prompt.
        images: B identities, equal for equal images.
    """
    adapter = adapter_for(model)
    first = {image: place for place, image in reversed(list(enumerate(images)))}
    distinct = list(dict.fromkeys(images))
    places = [first[image] for image in distinct]
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    ends = [int(own.nonzero()[-1]) + 1 for own in ids == adapter.image_token_id]
    texts = [own[end:] for own, end in zip(ids, ends)]
    starts = [int(own.int().argmax()) for own in valid]
    width = max(ends[r] - starts[r] for r in places)
    prefixes = {}
    for name, value in inputs.items():
        if value.shape == ids.shape:
            own = [value[r, starts[r] : ends[r]] for r in places]
            prefixes[name] = torch.stack([torch.nn.functional.pad(x, (width - len(x), 0)) for x in own])
        elif len(value) == len(ids):
            prefixes[name] = value[places]
    if "pixel_values" not in prefixes:  # patches of all images one after the other
        pictures = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
        parts = adapter.images(pictures).parts
        prefixes["pixel_values"] = torch.cat([parts[r] for r in places])
    return Apart(prefixes, [distinct.index(image) for image in images], texts)


def read(model: nn.Module, pruner: Pruner, inputs: Mapping[str, Tensor]) -> Prefix:
    """Prefill the prefixes of m prompts under `pruner`; of a method that cuts inside the language model, the
    layers ahead of its first cut.

    Args:
        inputs: of the model, left-padded [m, n], each row ending with its image's last token.
    """
    if pruner.cuts_only:
        return _read_below(model, pruner, inputs)
    engine = Engine(model, pruner)
    with torch.inference_mode(), engine as trace:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        layout, following = engine.behind
        left = trace.visual_tokens, trace.kept, trace.cuts
        return Prefix(out.past_key_values, layout.valid, following, *left, pruner)


class _Reached(Exception):
    """Ends a forward pass at the layer of the first cut."""


def _read_below(model: nn.Module, pruner: Pruner, inputs: Mapping[str, Tensor]) -> Prefix:
    engine, found = Engine(model, Pruner()), {}
    adapter, device = engine.adapter, inputs["input_ids"].device

    def begins(module, args, kwargs) -> None:
        found.update(embeds=kwargs["inputs_embeds"], positions=kwargs.get("position_ids"))

    def reached(module, args, kwargs) -> None:
        found.update(entry=args[0] if args else kwargs["hidden_states"], cache=kwargs["past_key_values"])
        raise _Reached

    with torch.inference_mode(), engine as trace, contextlib.ExitStack() as hooks:
        places = (inputs["input_ids"][0] == adapter.image_token_id).sum()
        layer = pruner.stages(int(places), len(adapter.layers))[0].layer
        for module, hook in ((adapter.language_model, begins), (adapter.layers[layer], reached)):
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        with contextlib.suppress(_Reached):
            model(**inputs, use_cache=True, logits_to_keep=1)
        layout, following = engine.behind
        positions = found.pop("positions")
        if positions is None:
            positions = torch.arange(layout.width, device=device)[None]
        positions = positions[-3:] if positions.ndim == 3 else positions
        positions = positions.expand(*positions.shape[:-2], len(layout.lengths), -1)
        below = Below(layer, layout, inputs["input_ids"], positions=positions, **found)
        left = trace.visual_tokens, trace.kept, trace.cuts
        return Prefix(below.cache, layout.valid, following, *left, pruner, below)


def generate(
    model: nn.Module, prefix: Prefix, rows: Sequence[int], texts: Sequence[Tensor], max_new_tokens: int
) -> Answers:
    """Greedy answers.

    Uses up `prefix`, whose cache grows.

    Args:
        rows: B row numbers of `prefix`: which image each question is about.
        texts: B tensors int64 [n_i] of token ids, each question's prompt behind its image.
    """
    device = prefix.next.device
    adapter = adapter_for(model)
    longest = max(len(t) for t in texts)
    lengths = torch.tensor([len(t) for t in texts], device=device)
    ids = torch.zeros(len(texts), longest, dtype=torch.long, device=device)
    for row, text in zip(ids, texts):
        row[longest - len(text) :] = text.to(device)
    with torch.inference_mode():
        if prefix.below is not None:
            rest = join(adapter, prefix.below, rows, ids, lengths, prefix.next)
            engine = Engine(model, prefix.pruner)
            with engine as trace:
                engine.resume(rest)
                begin = _Begin(
                    rest.embeds[:, rest.ahead :],
                    rest.mask,
                    rest.positions[..., rest.ahead :],
                    rest.following,
                    rest.cache,
                )
                tokens = _decode(model, adapter, begin, max_new_tokens)
                return Answers(tokens, trace.visual_tokens, trace.kept, trace.cuts)
        chosen = torch.tensor(rows, device=device)
        cache, width = prefix.cache, prefix.cache.get_seq_length()
        if list(rows) != list(range(len(prefix.next))):
            cache.batch_select_indices(chosen)
        ahead = torch.ones(len(texts), width, dtype=torch.bool, device=device)
        if prefix.valid is not None:
            ahead = prefix.valid[chosen]
        place = torch.arange(longest, device=device) - (longest - lengths)[:, None]
        mask = torch.cat([ahead, place >= 0], 1)
        positions = prefix.next[chosen][:, None] + place.clamp(min=0)
        begin = _Begin(
            model.get_input_embeddings()(ids),
            None if bool(mask.all()) else mask,
            positions,
            positions[:, -1] + 1,
            cache,
        )
        tokens = _decode(model, adapter, begin, max_new_tokens)
    kept, cuts = ([own[r] for r in rows] for own in (prefix.kept, prefix.cuts))
    return Answers(tokens, prefix.visual_tokens[rows], kept, cuts)


@dataclass
class _Begin:
    """The rest of a prefill: [B, T, D]; mask [B, W + T], None if nothing is padded; positions of the T
    columns and of the first decoded token; the cache of the W columns ahead."""

    embeds: Tensor
    mask: Tensor | None
    positions: Tensor
    following: Tensor
    cache: object


def _decode(model: nn.Module, adapter, begin: _Begin, max_new_tokens: int) -> Tensor:
    """Greedy tokens, int64 [B, at most max_new_tokens]."""
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    embeds, mask, positions, following = begin.embeds, begin.mask, begin.positions, begin.following[:, None]
    end = torch.tensor(_ends(model), device=embeds.device)
    pad = model.generation_config.pad_token_id
    pad = int(end[0]) if pad is None else pad
    done = torch.zeros(len(embeds), dtype=torch.bool, device=embeds.device)
    found: list[Tensor] = []
    while len(found) < max_new_tokens:
        out = adapter.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=begin.cache,
            use_cache=True,
        )
        token = head(out.last_hidden_state[:, -1]).float().argmax(-1)
        token = torch.where(done, pad, token)
        found.append(token)
        done |= torch.isin(token, end)
        if bool(done.all()):
            break
        embeds, positions, following = embed(token[:, None]), following, following + 1
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.stack(found, 1)


def _ends(model: nn.Module) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [-1] if ends is None else [ends] if isinstance(ends, int) else list(ends)
