"""User turns to token ids. What a user writes stays text, also where it spells a special token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tokenised(processor, images: Sequence[Sequence], prompts: Sequence[str]) -> dict[str, Tensor]:
    """The processor's output for one user turn each, left-padded. images: of each turn, ahead of its text."""
    special = special_tokens(processor)
    if any(token in prompt for prompt in prompts for token in special):
        turns = zip(images, prompts)
        return _together(processor, [_with_text_kept(processor, *turn, special) for turn in turns])
    return dict(_called(processor, images, [_rendered(processor, *turn) for turn in zip(images, prompts)]))


def special_tokens(processor) -> list[str]:
    """Texts that the tokenizer or the processor would take for something else than text."""
    known = {str(t) for t in processor.tokenizer.added_tokens_decoder.values() if t.special}
    named = (getattr(processor, f"{kind}_token", None) for kind in ("image", "video"))
    return sorted(known | {token for token in named if token})


def _rendered(processor, images: Sequence, prompt: str) -> str:
    content = [*[{"type": "image"}] * len(images), {"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def _called(processor, images: Sequence[Sequence], texts: Sequence[str]):
    pictures = [image for own in images for image in own] or None
    padded = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    return processor(images=pictures, text=list(texts), **padded)


def _with_text_kept(processor, images: Sequence, prompt: str, special: Sequence[str]) -> dict[str, Tensor]:
    """One turn whose text spells a special token: the template goes through the processor with a token in the
    text's place that it does not hold itself, and the text's own ids are put there."""
    tokenizer = processor.tokenizer
    bare = _rendered(processor, images, "")
    taken = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video")}
    held = set(tokenizer(bare).input_ids)
    place = next(
        t
        for t in special
        if t not in bare and t not in taken and tokenizer.convert_tokens_to_ids(t) not in held
    )
    batch = _called(processor, [images], [_rendered(processor, images, place)])
    (column,) = (batch["input_ids"][0] == tokenizer.convert_tokens_to_ids(place)).nonzero()[:, 0].tolist()
    ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids
    of_text = {"input_ids": torch.tensor([ids], dtype=torch.long), "attention_mask": torch.ones(1, len(ids))}
    found = dict(batch)
    for key in _per_token(batch):
        value = batch[key]
        inner = of_text.get(key, torch.zeros(1, len(ids))).to(value.dtype)
        found[key] = torch.cat([value[:, :column], inner, value[:, column + 1 :]], 1)
    return found


def _per_token(batch) -> list[str]:
    """Names of what holds a number per token."""
    shape = batch["input_ids"].shape
    names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return [key for key in names if key in batch and batch[key].shape == shape]


def _together(processor, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of single turns, padded on the left."""
    width = max(row["input_ids"].shape[1] for row in rows)
    found: dict[str, list[Tensor]] = {}
    for row in rows:
        for key in row:
            value = row[key]
            if key in _per_token(row):
                fill = processor.tokenizer.pad_token_id if key == "input_ids" else 0
                value = torch.nn.functional.pad(value, (width - value.shape[1], 0), value=fill)
            found.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in found.items()}
