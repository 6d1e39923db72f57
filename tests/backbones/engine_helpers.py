"""A tiny model whose attention is not flat, and prompts of different length.

In float64: these tests compare ways to one result whose matrix products have different shapes, and in float32
those differ by more than a tight bound, on some CPUs and not on others.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def model(backbone):
    """The tiny checkpoint with larger query and key weights, so that attention (and every choice) is
    decided."""
    import copy

    model = copy.deepcopy(backbone.model).double()
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            p.data.normal_(0, 1.5 / p[0].numel() ** 0.5, generator=generator)
        if "q_proj.weight" in name or "k_proj.weight" in name:
            p.data.mul_(1.7)
        if "embed_tokens" in name or "position_embedding" in name:
            p.data.normal_(0, 1.0, generator=generator)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [model.config.image_token_id]
    return model


def make_inputs(model, lengths, seed=0):
    """A left-padded batch, one image per sample; lengths: (text tokens before, after) of each."""
    generator = torch.Generator().manual_seed(seed)
    places, image, size = (
        model.config.image_seq_length,
        model.config.image_token_id,
        model.config.vision_config.image_size,
    )
    width = max(a + b for a, b in lengths) + places
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (before, after) in enumerate(lengths):
        text = torch.randint(5, image if image > 5 else 300, (before + after,), generator=generator)
        text[text == image] += 1
        prompt = torch.cat([text[:before], torch.full((places,), image), text[before:]])
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    pixels = torch.randn(len(lengths), 3, size, size, generator=generator).to(model.dtype)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def alone(batch, row):
    """One sample of a batch without its padding."""
    valid = batch["attention_mask"][row].bool()
    return {
        "input_ids": batch["input_ids"][row, valid][None],
        "attention_mask": batch["attention_mask"][row, valid][None],
        "pixel_values": batch["pixel_values"][row][None],
    }


@pytest.fixture(scope="session")
def batch(model):
    return make_inputs(model, [(5, 9), (2, 14), (11, 4)])


GENERATE = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)


@torch.inference_mode()
def generate(model, inputs, pruner=None, **options):
    """New tokens [B, t], their logits [B, t, V], and the trace (None without pruner)."""
    import contextlib

    with pruner(model) if pruner is not None else contextlib.nullcontext() as trace:
        made = model.generate(**inputs, **GENERATE, **options)
    new = made.sequences[:, inputs["input_ids"].shape[1] :]
    return new, torch.stack(made.logits, 1).to(model.dtype), trace
