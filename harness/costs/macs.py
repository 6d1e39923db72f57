"""Multiply-accumulates (MAC) of a pruned prefill: fvcore per layer at the measured lengths, plus the method's
own work.

Conventions, the same for all methods and stated in every table: 1 MAC = 2 FLOPs; matrix products,
convolutions and attention count, norms, activations, softmax and RoPE do not; attention is counted in full (n
x n, not halved for causality); the language model's head at one position; the text length is the same for all
methods. The vision tower (with its unused last layer, which really runs) and the projector are in.

fvcore counts 1 for a MAC and lacks scaled-dot-product attention: `_attention_macs` supplies it, grouped heads
included (the heads are the query's). `torch.utils.flop_counter` counts 2 for a MAC; it serves here to measure
the method's own work around a real prefill. `harness.costs.closed_form` is the third, independent count; the
tests hold all three against each other to the last MAC.
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

from harness.costs.closed_form import windows
from methods.errors import UserError


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


class _EncoderLayer(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden):
        out = self.layer(hidden, attention_mask=None)
        return out[0] if isinstance(out, tuple) else out


class ModelCounter:
    """Counts the parts of a model from its shapes alone (a model on the meta device will do).

    This class knows LLaVA's family; `counter_for` finds the one for any supported model.
    """

    def __init__(self, model: nn.Module):
        self.text = model.config.get_text_config()
        self.vision = model.config.vision_config
        with torch.device("meta"):
            self._decoder = _DecoderLayer(type(model.model.language_model.layers[0])(_sdpa(self.text), 0))
            self._add_vision(model.model)
        self.layers = self.text.num_hidden_layers
        self.head_dim = (
            getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads
        )
        self.head = self.text.hidden_size * self.text.vocab_size

    def _add_vision(self, inner: nn.Module) -> None:
        self._encoder = _EncoderLayer(type(inner.vision_tower.encoder.layers[0])(_sdpa(self.vision)))
        self._projector = inner.multi_modal_projector

    @staticmethod
    def tower_of(inner: nn.Module) -> nn.Module:
        """The vision tower of the family's multimodal model."""
        return inner.vision_tower

    @staticmethod
    def projector_of(inner: nn.Module) -> nn.Module:
        """The projector of the family's multimodal model."""
        return inner.multi_modal_projector

    def seen(self, pixels: torch.Tensor, shapes: torch.Tensor | None = None) -> list[tuple[int, int]]:
        """(height, width) of each image, from the tower's arguments."""
        return [tuple(pixels.shape[-2:])] * len(pixels)

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
        """The vision tower on one image of that many pixels: patch convolution and every encoder layer."""
        p, d = self.vision.patch_size, self.vision.hidden_size
        patches = (height // p) * (width // p)
        hidden = torch.empty(1, patches + 1, d, device="meta")  # + CLS
        convolution = patches * self.vision.num_channels * p * p * d
        return convolution + self.vision.num_hidden_layers * traced_macs(self._encoder, hidden)

    @functools.cache  # noqa: B019
    def projector(self, n: int) -> int:
        """The projector on n visual tokens."""
        first = next(m for m in self._projector.modules() if isinstance(m, nn.Linear))
        row = traced_macs(
            self._projector,
            torch.empty(1, 1, first.in_features, device=first.weight.device, dtype=first.weight.dtype),
        )
        return n * row


class _WindowBlock(nn.Module):
    """A block of Qwen2.5-VL's tower over attention windows of known sizes, for the tracer."""

    def __init__(self, block: nn.Module, sizes: Sequence[int]):
        super().__init__()
        self.block = block
        # on the host: the block splits by their values, which meta tensors have not
        self.ends = torch.tensor([0, *sizes], device="cpu").cumsum(0)

    def forward(self, hidden, cos, sin):
        return self.block(hidden, cu_seqlens=self.ends, position_embeddings=(cos, sin))


class WindowTowerCounter(ModelCounter):
    """Qwen2.5-VL: grouped heads in the LLM, a tower with windowed attention, and its 2 x 2 merger as the
    projector."""

    def _add_vision(self, inner: nn.Module) -> None:
        self._block = type(inner.visual.blocks[0])(_sdpa(self.vision))
        self._merger = inner.visual.merger

    @staticmethod
    def tower_of(inner: nn.Module) -> nn.Module:
        return inner.visual

    @staticmethod
    def projector_of(inner: nn.Module) -> nn.Module:
        return inner.visual.merger

    def seen(self, pixels: torch.Tensor, shapes: torch.Tensor | None = None) -> list[tuple[int, int]]:
        size = self.vision.patch_size
        return [(rows * size, columns * size) for _, rows, columns in shapes.tolist()]

    @functools.cache  # noqa: B019
    def tower(self, height: int, width: int) -> int:
        """Patch convolution and every block, windowed or full, on one image of that many pixels."""
        v = self.vision
        n = (height // v.patch_size) * (width // v.patch_size)
        hidden = torch.empty(n, v.hidden_size, device="meta")
        cos = torch.empty(n, v.hidden_size // v.num_heads, device="meta")
        full = len(v.fullatt_block_indexes)
        inside, all_of_it = (
            traced_macs(_WindowBlock(self._block, sizes), hidden, cos, cos)
            for sizes in (windows(v, height, width), [n])
        )
        # by hand: torch 2.15 cannot trace a convolution on the meta device
        convolution = n * v.in_channels * v.temporal_patch_size * v.patch_size**2 * v.hidden_size
        return convolution + (v.depth - full) * inside + full * all_of_it

    @functools.cache  # noqa: B019
    def projector(self, n: int) -> int:
        """The merger, for n visual tokens out of it."""
        patches, like = self.vision.spatial_merge_size**2, next(self._merger.parameters())
        token = torch.empty(patches, self.vision.hidden_size, device=like.device, dtype=like.dtype)
        return n * traced_macs(self._merger, token)


def counter_for(model: nn.Module) -> ModelCounter:
    """The counter of a model's family. Raises UserError if there is none."""
    counters = {"llava": ModelCounter, "qwen2_5_vl": WindowTowerCounter}
    kind = model.config.model_type
    if kind not in counters:
        raise UserError(f"FLOPs of family {kind!r} cannot be counted; known: {', '.join(counters)}")
    return counters[kind](model)


def _sdpa(config):
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = "sdpa"
    return config


@dataclass(frozen=True)
class PrefillCount:
    """MAC of one real prefill, by part. `selection` is the method's own work: what torch's counter saw beyond
    the tower, the projector and the LLM at the lengths they really ran at."""

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
    seen = _Shapes(model.model, counter)
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


class _Shapes(contextlib.AbstractContextManager):
    """Notes the image sizes that the tower ran on, and the tokens that the projector gave."""

    def __init__(self, inner: nn.Module, counter: ModelCounter):
        self._inner, self._counter = inner, counter
        self.images: list[tuple[int, int]] = []
        self.projected: list[int] = []

    def __enter__(self):
        def tower(module, args, kwargs):
            pixels = args[0] if args else kwargs["pixel_values"]
            self.images += self._counter.seen(pixels, kwargs.get("grid_thw"))

        def projector(module, args, output):
            self.projected.append(output.shape[:-1].numel())

        inner, counter = self._inner, self._counter
        self._handles = [
            counter.tower_of(inner).register_forward_pre_hook(tower, with_kwargs=True),
            counter.projector_of(inner).register_forward_hook(projector),
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
