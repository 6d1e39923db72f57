"""Multiply-accumulates (MAC) by formula, from a configuration's numbers alone: no torch, no tracing.

Conventions as in `harness.costs.macs`, where fvcore and torch's counter are held against these formulas. A
configuration is a Hugging Face one or any object with the same attributes (`harness.costs.shapes`).
"""

from __future__ import annotations


def closed_form_layer(config, n: int) -> int:
    """MAC of one Llama-like decoder layer on n tokens: n(2d² + 2d·d_kv + 3dm) + 2n²d (d: query width)."""
    d, m = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or d // config.num_attention_heads
    query, kv = head * config.num_attention_heads, head * config.num_key_value_heads
    return n * (2 * d * query + 2 * d * kv + 3 * d * m) + 2 * n * n * query


def closed_form_head(config) -> int:
    """MAC of the language model's head at one position."""
    return config.hidden_size * config.vocab_size


def closed_form_tower(config, height: int, width: int) -> int:
    """MAC of a CLIP tower: patch convolution, then per layer n(4d² + 2dm) + 2n²d with n = patches + CLS."""
    d, m, p = config.hidden_size, config.intermediate_size, config.patch_size
    patches = (height // p) * (width // p)
    n = patches + 1
    layer = n * (4 * d * d + 2 * d * m) + 2 * n * n * d
    return patches * config.num_channels * p * p * d + config.num_hidden_layers * layer


def closed_form_projector(config, n: int) -> int:
    """MAC of LLaVA-1.5's two linear maps on n visual tokens: n(dD + D²)."""
    d, text = config.vision_config.hidden_size, config.text_config.hidden_size
    return n * (d * text + text * text)


def windows(config, height: int, width: int) -> list[int]:
    """Patches in each attention window of a Qwen2.5-VL tower on an image of that many pixels.

    Windows are squares of window_size pixels laid from the top left; those at the far edges are cut.
    """
    unit = config.patch_size * config.spatial_merge_size
    side = config.window_size // unit

    def spans(length: int) -> list[int]:
        merged = length // unit
        return [min(side, merged - start) for start in range(0, merged, side)]

    return [h * w * config.spatial_merge_size**2 for h in spans(height) for w in spans(width)]


def closed_form_window_tower(config, height: int, width: int) -> int:
    """MAC of a Qwen2.5-VL tower without its merger: patch convolution (each image stands twice, as two
    frames), then per block n(4d² + 3dm) + 2Σs²d over its windows of s patches, or s = n in full blocks.
    """
    d, m, p = config.hidden_size, config.intermediate_size, config.patch_size
    n = (height // p) * (width // p)
    full = len(config.fullatt_block_indexes)
    inside = sum(s * s for s in windows(config, height, width))
    attention = 2 * d * (full * n * n + (config.depth - full) * inside)
    linear = config.depth * n * (4 * d * d + 3 * d * m)
    return n * config.in_channels * config.temporal_patch_size * p * p * d + linear + attention


def closed_form_merger(config, n: int) -> int:
    """MAC of Qwen2.5-VL's merger for n merged tokens: n(w² + wD), w the width of four patches together."""
    vision = config.vision_config
    wide = vision.hidden_size * vision.spatial_merge_size**2
    return n * (wide * wide + wide * vision.out_hidden_size)
