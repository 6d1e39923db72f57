"""Multiply-accumulates (MAC) of a pruned prefill: fvcore per layer at the measured lengths, plus the method's
own work.

Conventions, the same for all methods and stated in every table: 1 MAC = 2 FLOPs; matrix products,
convolutions and attention count, norms, activations, softmax and RoPE do not; attention is counted in full (n
x n, not halved for causality); the language model's head at one position; the text length is the same for all
methods. The vision tower (with its unused last layer, which really runs) and the projector are in.

fvcore counts 1 for a MAC and lacks scaled-dot-product attention: `_attention_macs` supplies it, grouped heads
included (the heads are the query's). `torch.utils.flop_counter` counts 2 for a MAC; it serves here to measure
the method's own work around a real prefill. The tests hold both, and formulas, against each other to the last
MAC.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from backbones import families
from backbones.families.family import with_sdpa


def _attention_macs(inputs, outputs) -> int:
    """fvcore handler of aten::scaled_dot_product_attention: q [B, H, n, d], k [B, Hkv, m, d], v [B, Hkv, m,
    dv].
    """
    q, k, v = (x.type().sizes() for x in inputs[:3])
    return q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def traced_macs(module: nn.Module, *inputs: torch.Tensor) -> int:
    """MAC of one call by fvcore (jit trace; works on meta tensors).

    Raises ArithmeticError if an operator that multiplies matrices was skipped for want of a handler.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates jit; fvcore has nothing else
        from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(module.eval(), inputs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    # fvcore counts norms by element (torch's counter and the papers do not)
    analysis.set_op_handle("aten::layer_norm", lambda inputs, outputs: 0)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        total = int(analysis.total())
        skipped = analysis.unsupported_ops()
    missed = [
        op
        for op in skipped
        if any(w in op for w in ("mm", "matmul", "conv", "attention", "linear", "einsum"))
    ]
    if missed:
        raise ArithmeticError(f"fvcore has no count for {', '.join(missed)}")
    return total


class _DecoderLayer(nn.Module):
    """A decoder layer with the calling convention of a prefill without padding, for the tracer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, cos, sin):
        out = self.layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
        return out[0] if isinstance(out, tuple) else out


class ModelCounter:
    """Counts the parts of a model from its shapes alone (a model on the meta device will do).

    Raises UserError for a model of no known family.
    """

    def __init__(self, model: nn.Module):
        self.model, self.config = model, model.config
        self.family = families.of_type(model.config.model_type)
        self.text = model.config.get_text_config()
        self._decoder = _DecoderLayer(with_sdpa(type(model.model.language_model.layers[0]), self.text, 0))
        self.head_dim = (
            getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads
        )
        self.head = self.text.hidden_size * self.text.vocab_size

    @functools.cache  # noqa: B019  one counter a run
    def decoder_layer(self, n: int) -> int:
        """One LLM layer on n tokens, nothing cached."""
        hidden = torch.empty(1, n, self.text.hidden_size, device="meta")
        cos = torch.empty(1, n, self.head_dim, device="meta")
        return traced_macs(self._decoder, hidden, cos, cos)

    def llm(self, visual_tokens: Sequence[int], text_tokens: int) -> int:
        """The LLM's prefill; visual_tokens: those entering each layer [L]. The head is applied at one
        position.
        """
        return sum(self.decoder_layer(int(v) + text_tokens) for v in visual_tokens) + self.head

    @functools.cache  # noqa: B019
    def tower(self, height: int, width: int) -> int:
        """The vision tower on one image of that many pixels: patch convolution and every layer."""
        parts, rest = self.family.tower_parts(self.model, height, width)
        return rest + sum(part.times * traced_macs(part.module, *part.inputs) for part in parts)

    @functools.cache  # noqa: B019
    def projector(self, n: int) -> int:
        """The projector (or the tower's merger) for n visual tokens out of it."""
        part = self.family.projector_part(self.model)
        return n * part.times * traced_macs(part.module, *part.inputs)


@dataclass(frozen=True)
class PrefillCount:
    """MAC of one real prefill, by part.

    Attributes:
        tower, projector, llm: of the model's parts, at the lengths they really ran at.
        selection: the method's own work: what torch's counter saw beyond those parts.
        text_tokens: of the prompt.
        visual_tokens: entering each of the LLM's layers [L].
    """

    tower: int
    projector: int
    llm: int
    selection: int
    text_tokens: int
    visual_tokens: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.tower + self.projector + self.llm + self.selection


def prefill(model, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Vision tower and LLM prefill to the first token's logits [B, 1, vocab], the way generate() does it.

    Image features are computed apart from the forward, as generate() of transformers 5 does; the head runs at
    one position.
    """
    features = model.model.get_image_features(**image_arguments(model, inputs))
    return first_token(model, inputs, features).logits


def first_token(model, inputs: Mapping[str, torch.Tensor], features):
    """The second half of a prefill: the model's output, with logits [B, 1, vocab] and the cache."""
    return model(
        **prompt_arguments(inputs), mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1
    )


def image_arguments(model, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of `inputs` that describe the images."""
    return {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}


def prompt_arguments(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of `inputs` that the forward pass needs when it is given the images' features: all but the
    pixels (M-RoPE positions follow from the token types and the images' sizes)."""
    return {k: v for k, v in inputs.items() if k != "pixel_values"}


def count_prefill(
    counter: ModelCounter, backbone, pruner, inputs: Mapping[str, torch.Tensor]
) -> PrefillCount:
    """Run one real pruned prefill (B = 1) and count its parts.

    Raises ArithmeticError if torch's counter saw less than the parts, which would mean that a part was
    skipped or the trace is wrong.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = backbone.model
    seen = _InputShapes(model, counter.family)
    with torch.no_grad(), pruner(model) as trace, seen, FlopCounterMode(display=False) as meter:
        prefill(model, inputs)
        rows = trace.visual_tokens.tolist()
    if len(rows) != 1:
        raise ValueError("count_prefill takes one sample")
    total, odd = divmod(meter.get_total_flops(), 2)
    places = int((inputs["input_ids"] == model.config.image_token_id).sum())
    text = int(inputs["attention_mask"].sum()) - places
    tower = sum(counter.tower(h, w) for h, w in seen.images)
    projector = sum(counter.projector(n) for n in seen.projected)
    llm = counter.llm(rows[0], text)
    selection = total - tower - projector - llm
    if odd or selection < 0:
        raise ArithmeticError(f"torch counted {total} MAC, the parts alone need {tower + projector + llm}")
    return PrefillCount(tower, projector, llm, selection, text, tuple(rows[0]))


class _InputShapes(contextlib.AbstractContextManager):
    """Notes the image sizes that the tower ran on, and the tokens that the projector gave."""

    def __init__(self, model: nn.Module, family: families.Family):
        self._model, self._family = model, family
        self.images: list[tuple[int, int]] = []
        self.projected: list[int] = []

    def __enter__(self):
        def tower(module, args, kwargs):
            pixels = args[0] if args else kwargs["pixel_values"]
            self.images += self._family.pixels_seen(self._model.config, kwargs, pixels)

        def projector(module, args, output):
            self.projected.append(output.shape[:-1].numel())

        inner, family = self._model.model, self._family
        self._handles = [
            family.tower_of(inner).register_forward_pre_hook(tower, with_kwargs=True),
            family.projector_of(inner).register_forward_hook(projector),
        ]
        return self

    def __exit__(self, *exc):
        for handle in self._handles:
            handle.remove()


def mean_llm(counter: ModelCounter, rows: Sequence[tuple[Sequence[int], int]], text_tokens: int) -> float:
    """Mean MAC of the LLM over documents; rows: (per-layer visual tokens, number of documents) as in the
    records.
    """
    total = sum(n for _, n in rows)
    return sum(counter.llm(layers, text_tokens) * n for layers, n in rows) / total


logging.getLogger("fvcore").setLevel(logging.ERROR)
