"""Multiply-accumulates (MAC) of the language model by formula, from a configuration's numbers alone: no
torch, no tracing. Those of a family's tower and projector are its own (`backbones.families.family.Family`).

Conventions as in `harness.costs.macs`. A configuration is a Hugging Face one or any object with the same
attributes (`backbones.shapes`).
"""

from __future__ import annotations


def closed_form_layer(config, n: int, causal: bool = False, feed_forward: int = 3) -> int:
    """MAC of one Llama-like decoder layer on n tokens: n(2d² + 2d·d_kv + 3dm) + 2n²d (d: query width).

    causal: half of the attention, the pairs that a causal mask leaves. feed_forward: matrices counted of the
    three.
    """
    d, m = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or d // config.num_attention_heads
    query, kv = head * config.num_attention_heads, head * config.num_key_value_heads
    attention = (1 if causal else 2) * n * n * query
    return n * (2 * d * query + 2 * d * kv + feed_forward * d * m) + attention


def closed_form_head(config) -> int:
    """MAC of the language model's head at one position."""
    return config.hidden_size * config.vocab_size
