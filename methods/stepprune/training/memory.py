"""What a training step holds in memory, computed from shapes: the trainer's own code runs on tensors without
values (the meta device), and what autograd keeps of it is counted. The policy is taken to run in float32, so
that mixed precision needs less.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods import learned
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.training.objective import IGNORE, Batch, Step
from methods.stepprune.training.options import TrainOptions

#: bytes of a trained parameter: itself, its gradient, and AdamW's two moments, float32 each
TRAINED = 16
#: bytes of one logit: as computed, in float32, its log-softmax, and its gradient
LOGIT = 16
#: for what comes and goes: gradients on their way, the vision tower, the allocator
SLACK = 1.1


@dataclass(frozen=True)
class Sizes:
    """Of one sample.

    Attributes:
        visual: its visual tokens.
        text: tokens around them, the answer's included.
        answer: of the answer.
    """

    visual: int
    text: int
    answer: int


@dataclass(frozen=True)
class Need:
    """Bytes.

    Attributes:
        frozen: weights that are not trained.
        trained: policy and denoiser with gradients and AdamW's moments.
        policy: what autograd keeps of them, a sample.
        layer: the same of one layer of the language model.
        hidden: one layer's input, a sample.
        logits: of an answer.
        layers: their number.
    """

    frozen: int
    trained: int
    policy: int
    layer: int
    hidden: int
    logits: int
    layers: int

    def activations(self, samples: int, checkpointing: bool) -> int:
        """What autograd keeps of a step of so many samples, at most at one time."""
        layers = self.layers * self.hidden + self.layer if checkpointing else self.layers * self.layer
        return samples * (self.policy + layers + self.logits)

    def total(self, samples: int, checkpointing: bool) -> float:
        """The whole, slack included."""
        return SLACK * (self.frozen + self.trained + self.activations(samples, checkpointing))

    def most(self, budget: float, checkpointing: bool) -> int:
        """How many samples fit in so many bytes; 0: not one."""
        left = budget / SLACK - self.frozen - self.trained
        return max(0, math.floor(left / self.activations(1, checkpointing)))


def need(model: nn.Module, adapter, options: TrainOptions, sizes: Sizes) -> Need:
    """Of a training on a model.

    Args:
        model: Hugging Face's, on the meta device, in the type of its weights.
        adapter: what is known of its family (`backbones.families.family.Adapter`).
        options: of the training.
        sizes: of its samples.
    """
    text = model.config.get_text_config()
    width = adapter.family.feature_width(model.config.vision_config)
    n = min(options.slots or sizes.visual, sizes.visual) + sizes.text
    objective, policy = _policy(width, text.hidden_size, options, sizes)
    return Need(
        frozen=sum(p.numel() * p.element_size() for p in model.parameters()),
        trained=TRAINED * sum(p.numel() for p in objective.parameters()),
        policy=policy,
        layer=_layer(model, adapter, n),
        hidden=n * text.hidden_size * model.dtype.itemsize,
        logits=LOGIT * sizes.answer * text.vocab_size,
        layers=len(adapter.layers),
    )


class _Shapes:
    """What the objective asks of the frozen model, as shapes."""

    def __init__(self, width: int, text_width: int, words: int):
        self.width, self.text_width, self._words = width, text_width, words

    def words(self, batch: Batch) -> tuple[Tensor, Tensor]:
        embedded = torch.empty(len(batch), self._words, self.text_width, device="meta")
        return embedded, torch.ones(embedded.shape[:2], dtype=torch.bool, device="meta")

    def loss(self, batch: Batch, tokens: Tensor, places=None, valid=None) -> tuple[Tensor, Tensor]:
        return tokens.sum(), tokens.detach().sum()


def _policy(width: int, text_width: int, options: TrainOptions, sizes: Sizes) -> tuple[nn.Module, int]:
    """The objective of one sample, and what autograd keeps of it, the language model left out."""
    method = learned.find(options.method)
    with torch.device("meta"):
        policy = method.shape(options, width, text_width, sizes.visual).build()
        denoiser = LocalDenoiser(width)
        frozen = _Shapes(width, text_width, sizes.text - sizes.answer)
        objective = method.objective(options, policy, denoiser, frozen)
        ids = torch.zeros(1, sizes.text, dtype=torch.long)
        batch = Batch(
            torch.empty(1, sizes.visual, width), ids[0, :1], ids, ids.clone().fill_(IGNORE), ids[0, :1],
            ids[0, :1],
            torch.zeros(1, 1, sizes.visual + sizes.text, dtype=torch.long),
            evidence=torch.ones(1, sizes.visual, dtype=torch.bool),
        )  # fmt: skip
        step = Step(1.0, options.sharpness, options.length_weight or 0.0, float(options.tokens), 0)
        return objective, kept(lambda: objective(batch, step).loss, objective)


def _layer(model: nn.Module, adapter, n: int) -> int:
    """What autograd keeps of one layer of the language model over n tokens."""
    hidden = torch.empty(
        1, n, model.config.get_text_config().hidden_size, dtype=model.dtype, device="meta", requires_grad=True
    )
    rows = len(adapter.prompt_positions(1, (1, 1), 1))  # M-RoPE has three
    positions = torch.zeros((1, n) if rows == 1 else (rows, 1, n), dtype=torch.long, device="meta")
    rotary = adapter.language_model.rotary_emb(hidden, positions)
    layer = adapter.layers[0]
    return kept(lambda: layer(hidden, attention_mask=None, position_embeddings=rotary), model)


def kept(run: Callable[[], object], module: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `run()`, without the module's own tensors."""
    own = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in own:
            found[storage] = tensor  # held, so that no other storage gets its address
        return tensor

    with fused_attention(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


class _Fused(torch.autograd.Function):
    """Keeps what fused attention keeps: queries, keys, values and what comes out."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise NotImplementedError("shapes alone")


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention of tensors without values is the fused one; torch would take the plain one."""
    real = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, *rest, **more) -> Tensor:
        return _Fused.apply(q, k, v) if q.is_meta else real(q, k, v, *rest, **more)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield
