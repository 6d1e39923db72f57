"""Answer several questions about one image from one prefill of what they share: the words ahead of the image
and the image's tokens.

In these prompts the image stands before the question, so for an unpruned model, and for every method that
chooses without the question and before the language model, the keys and values up to the image's last token
are the same whatever is asked. `read` computes them once per image; `generate` runs each question's own
tokens behind a copy of them, and decodes greedily. Methods that read the text or cut inside the language
model are answered in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    """

    cache: object
    valid: Tensor | None
    next: Tensor
    visual_tokens: Tensor
    kept: list[list[Tensor]]
    cuts: list[list[Cut]]


def can_share(model: nn.Module, pruner: Pruner) -> bool:
    """Whether answers under `pruner` may be computed so, with the model's own settings of generate()."""
    settings = model.generation_config
    plain = all(getattr(settings, name, None) in neutral for name, neutral in _NEUTRAL.items())
    return plain and pruner.independent_of_text


def split(
    inputs: Mapping[str, Tensor], rows: Sequence[int], image_token_id: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Full prompts into what is shared and what is not.

    Args:
        inputs: of the model, left-padded [B, n], one image per prompt.
        rows: of the prompts whose prefixes are wanted, one for each distinct image.
        image_token_id: of the places of visual tokens.

    Returns:
        Inputs of the prefixes, left-padded [m, n'], each ending with its image's last token; and for each of
        the B prompts the token ids behind its image, int64 [n_i].
    """
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    ends = [int(own.nonzero()[-1]) + 1 for own in ids == image_token_id]
    texts = [own[end:] for own, end in zip(ids, ends)]
    starts = [int(own.int().argmax()) for own in valid]
    width = max(ends[r] - starts[r] for r in rows)
    prefix = {}
    for name, value in inputs.items():
        if value.shape == ids.shape:
            own = [value[r, starts[r] : ends[r]] for r in rows]
            prefix[name] = torch.stack([torch.nn.functional.pad(x, (width - len(x), 0)) for x in own])
        elif len(value) == len(ids):
            prefix[name] = value[list(rows)]
        else:  # patches of all images one after the other
            parts = value.split(inputs["image_grid_thw"].prod(1).tolist())
            prefix[name] = torch.cat([parts[r] for r in rows])
    return prefix, texts


def read(model: nn.Module, pruner: Pruner, inputs: Mapping[str, Tensor]) -> Prefix:
    """Prefill the prefixes of m prompts under `pruner`.

    Args:
        inputs: of the model, left-padded [m, n], each row ending with its image's last token.
    """
    engine = Engine(model, pruner)
    with torch.inference_mode(), engine as trace:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        layout, following = engine.behind
        left = trace.visual_tokens, trace.kept, trace.cuts
        return Prefix(out.past_key_values, layout.valid, following, *left)


def generate(
    model: nn.Module, prefix: Prefix, rows: Sequence[int], texts: Sequence[Tensor], max_new_tokens: int
) -> Tensor:
    """Greedy tokens of each question, int64 [B, at most max_new_tokens], padded as generate() pads.

    Uses up `prefix`, whose cache grows.

    Args:
        rows: B row numbers of `prefix`: which image each question is about.
        texts: B tensors int64 [n_i] of token ids, each question's prompt behind its image.
    """
    device = prefix.next.device
    adapter = adapter_for(model)
    chosen = torch.tensor(rows, device=device)
    cache, width = prefix.cache, prefix.cache.get_seq_length()
    if list(rows) != list(range(len(prefix.next))):
        cache.batch_select_indices(chosen)
    longest = max(len(t) for t in texts)
    lengths = torch.tensor([len(t) for t in texts], device=device)
    ids = torch.zeros(len(texts), longest, dtype=torch.long, device=device)
    for row, text in zip(ids, texts):
        row[longest - len(text) :] = text.to(device)
    ahead = torch.ones(len(texts), width, dtype=torch.bool, device=device)
    if prefix.valid is not None:
        ahead = prefix.valid[chosen]
    place = torch.arange(longest, device=device) - (longest - lengths)[:, None]
    mask = torch.cat([ahead, place >= 0], 1)
    positions = prefix.next[chosen][:, None] + place.clamp(min=0)
    end = torch.tensor(_ends(model), device=device)
    pad = model.generation_config.pad_token_id
    pad = int(end[0]) if pad is None else pad
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    done = torch.zeros(len(texts), dtype=torch.bool, device=device)
    found: list[Tensor] = []
    with torch.inference_mode():
        while len(found) < max_new_tokens:
            out = adapter.language_model(
                inputs_embeds=embed(ids),
                attention_mask=None if bool(mask.all()) else mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            token = head(out.last_hidden_state[:, -1]).float().argmax(-1)
            token = torch.where(done, pad, token)
            found.append(token)
            done |= torch.isin(token, end)
            if bool(done.all()):
                break
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(texts), 1)], 1)
    return torch.stack(found, 1)


def _ends(model: nn.Module) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [-1] if ends is None else [ends] if isinstance(ends, int) else list(ends)
