"""The selection policy: input encoder, memory with a stop slot, and a pointer decoder (Sec. 3.2).

Sizes: B samples, N visual tokens (of the largest sample; the others are padded), T text tokens, d width of
the vision tower, D width of the language model, S decoding steps. The stop action is slot N, the last one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of a policy. The paper gives two encoder blocks, their direction, and what a decoder layer is
    made of; every other value is open in our copy of it, and ours.

    width, text_width: d and D, from the model. max_steps: K_max. text: whether the encoder reads the prompt.
    The comments give the reason of a choice.
    """

    method: ClassVar[str] = "stepprune"

    width: int
    text_width: int
    encoder_layers: int = 2
    causal_encoder: bool = False
    #: open. One layer conditions on the chosen set; each further one costs 16 d^2 weights per step.
    decoder_layers: int = 1
    #: open. None: heads of about 64 channels, as in CLIP.
    heads: int | None = None
    #: open. `projection`: one head of full width reads the decoder's output; `attention`: the mean over heads
    #: of the last layer's cross-attention logits, whose values and feed-forward part then do not exist.
    pointer: Literal["projection", "attention"] = "projection"
    #: open. Logits start with unit variance over the tokens; at 1 the softmax over 577 slots is then nearly
    #: flat, and tokens never chosen collect more score than chosen ones, which leave the race (Eq. 11).
    temperature: float = 0.2
    #: open. About three times the mean K wanted, so that crowded images have room.
    max_steps: int = 192
    #: open. An empty selection is of no use; the stop action is masked for so many steps.
    min_tokens: int = 1
    text: bool = True

    def __post_init__(self):
        if self.width % self.head_count:
            raise ValueError(f"width {self.width} is no multiple of {self.head_count} heads")

    @property
    def head_count(self) -> int:
        return self.heads or heads_of(self.width)

    def build(self) -> Policy:
        return Policy(self)

    def described(self) -> dict[str, object]:
        """JSON-able. Without `text` where it is on, as from before there was such a choice: a policy's digest
        stays what it was."""
        found = asdict(self)
        if self.text:
            del found["text"]
        return found


def heads_of(width: int) -> int:
    """As many as have about 64 channels each, as in CLIP."""
    return next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, n, d] -> [B, heads, n, d / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


def widened(x: Tensor) -> Tensor:
    """In float32 at least: logits of half precision tie."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class EncoderBlock(nn.Module):
    """A pre-norm ViT block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = feed_forward(width)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """x: [B, n, d]. mask: bool, broadcast to [B, 1, n, n], True where a row may look; None: everywhere
        (or, with `causal`, backwards)."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(self.norm_attention(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)
        x = x + self.out(join_heads(seen))
        return x + self.mlp(self.norm_mlp(x))


class InputEncoder(nn.Module):
    """The encoder of Eq. 3: blocks over [V ; alpha E W_p + e], of which the N image rows are kept.

    e, one learned vector added to every text row, is ours: a pre-norm block is blind to the scale of a row,
    so that without it any alpha above zero would act like 1. The closing norm is ours too; it gives the
    memory's rows a scale that does not depend on the vision tower. A policy that reads no text has neither
    W_p nor e, and its blocks see V alone.
    """

    def __init__(self, config):
        """config: with `width`, `text_width`, `text`, `encoder_layers`, `head_count` and, where the encoder
        may be causal, `causal_encoder`."""
        super().__init__()
        self.causal = getattr(config, "causal_encoder", False)
        if config.text:
            self.text = nn.Linear(config.text_width, config.width, bias=False)
            self.text_offset = nn.Parameter(torch.randn(config.width))
        else:
            self.text = None
        self.blocks = nn.ModuleList(
            EncoderBlock(config.width, config.head_count) for _ in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self,
        visual: Tensor,
        text: Tensor | None,
        visual_valid: Tensor | None,
        text_valid: Tensor | None,
        alpha: float,
    ) -> Tensor:
        """visual: [B, N, d]; text: [B, T, D], None for a policy that reads none; *_valid: bool [B, N] and
        [B, T], False at padding (on the right), None without any. Returns H [B, N, d]."""
        n = visual.shape[1]
        if self.text is None:
            x, text, text_valid = visual, visual[:, :0], None
        else:
            x = torch.cat([visual, alpha * self.text(text) + self.text_offset], 1)
        mask = self._mask(visual, text, visual_valid, text_valid)
        for block in self.blocks:
            x = block(x, mask, self.causal)
        return self.norm(x[:, :n])

    def _mask(self, visual, text, visual_valid, text_valid) -> Tensor | None:
        if visual_valid is None and text_valid is None:
            return None
        valid = [
            torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if given is None else given
            for x, given in ((visual, visual_valid), (text, text_valid))
        ]
        mask = torch.cat(valid, 1)[:, None, None]
        if self.causal:
            length = mask.shape[-1]
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        return mask


@dataclass(frozen=True)
class Memory:
    """M of Eq. 4 and all that the decoder reads of it, projected once.

    rows: [B, N + 1, d], the last one s_stop. keys, values: one [B, heads, N + 1, d / heads] a decoder layer
    (values None where a layer only points). pointer_keys: [B, N + 1, d], None if the last layer's
    cross-attention points. bias: float32 [B, N + 1], added to the pointer logits: -inf at padding, the
    calibrated stop bias at ⊥, else 0. valid: bool [B, 1, 1, N + 1], False at padding; None without any.
    """

    rows: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor | None, ...]
    pointer_keys: Tensor | None
    bias: Tensor
    valid: Tensor | None = None

    @property
    def stop(self) -> int:
        """Index of the stop action, N."""
        return self.rows.shape[1] - 1


class DecoderLayer(nn.Module):
    """Causal self-attention over what was chosen, cross-attention to the memory, feed-forward; pre-norm.

    points: the layer's cross-attention logits are the pointer's, and nothing follows them.
    """

    def __init__(self, width: int, heads: int, points: bool):
        super().__init__()
        self.heads, self.points = heads, points
        self.norm_self, self.norm_cross = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out_self = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        if not points:
            self.value, self.out_cross = nn.Linear(width, width), nn.Linear(width, width)
            self.norm_mlp, self.mlp = nn.LayerNorm(width), feed_forward(width)

    def remember(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keys and values of the memory's rows [B, N + 1, d]."""
        values = None if self.points else split_heads(self.value(rows), self.heads)
        return split_heads(self.key(rows), self.heads), values

    def forward(
        self, x: Tensor, memory: Memory, i: int, past: tuple[Tensor, Tensor] | None, at: int
    ) -> Tensor:
        """Inputs of all steps [B, S, d], each seeing itself and those before it; or, given `past`, buffers
        for keys and values [B, heads, S, d / heads], of the n inputs from number `at` on alone [B, n, d],
        which are written to them and see each other. This is layer i, which tells its part of the memory.

        Returns the same shape, or with `points` the logits [B, S or n, N + 1].
        """
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(self.norm_self(x)).chunk(3, -1))
        if past is not None:
            end = at + x.shape[1]
            for buffer, new in zip(past, (k, v)):
                buffer[:, :, at:end] = new
            k, v = (buffer[:, :, :end] for buffer in past)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=past is None and x.shape[1] > 1)
        x = x + self.out_self(join_heads(seen))
        query = split_heads(self.query(self.norm_cross(x)), self.heads)
        if self.points:
            return widened((query @ memory.keys[i].transpose(-1, -2)).mean(1)) * query.shape[-1] ** -0.5
        read = F.scaled_dot_product_attention(query, memory.keys[i], memory.values[i], attn_mask=memory.valid)
        x = x + self.out_cross(join_heads(read))
        return x + self.mlp(self.norm_mlp(x))


@dataclass(frozen=True)
class Choices:
    """What the pointer decided. order: int64 [B, S], the token taken at each step; the stop action's index
    from the step on at which it was taken. count: int64 [B], K, the tokens taken before it."""

    order: Tensor
    count: Tensor

    @property
    def running(self) -> Tensor:
        """bool [B, S]: the step was taken, the one that stops included."""
        steps = torch.arange(self.order.shape[1], device=self.order.device)
        return steps <= self.count[:, None]

    def kept(self) -> list[Tensor]:
        """Each sample's S in spatial order, int64 [K]. Costs one device synchronisation, for the counts."""
        return [row[:n].sort().values for row, n in zip(self.order, self.count.tolist())]


class Policy(nn.Module):
    """pi(i_1, i_2, ... | V, E) of Eq. 2. All of it is trained; vision tower and language model are not."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        d, heads, layers = config.width, config.head_count, config.decoder_layers
        by_attention = config.pointer == "attention"
        self.encoder = InputEncoder(config)
        self.stop = nn.Parameter(torch.randn(d))
        self.start = nn.Parameter(torch.randn(d))
        self.decoder = nn.ModuleList(
            DecoderLayer(d, heads, by_attention and i == layers - 1) for i in range(layers)
        )
        if not by_attention:
            self.norm = nn.LayerNorm(d)
            self.pointer_query, self.pointer_key = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
            for linear in (self.pointer_query, self.pointer_key):
                nn.init.normal_(linear.weight, std=d**-0.5)
        # Not trained: the calibrated scalar of one-checkpoint operation (ours).
        self.register_buffer("stop_bias", torch.zeros(()))
        self.register_buffer("step_codes", step_codes(config.max_steps, d), persistent=False)

    # ---- encoder and memory

    def remember(
        self,
        visual: Tensor,
        text: Tensor | None,
        visual_valid: Tensor | None = None,
        text_valid: Tensor | None = None,
        alpha: float = 1.0,
    ) -> Memory:
        """Eqs. 3 and 4. visual: [B, N, d]; text: [B, T, D]; masks as for `InputEncoder`."""
        encoded = self.encoder(visual, text, visual_valid, text_valid, alpha)
        rows = torch.cat([encoded, self.stop.to(encoded.dtype).expand(len(encoded), 1, -1)], 1)
        pairs = [layer.remember(rows) for layer in self.decoder]
        bias, valid = torch.zeros(rows.shape[:2], dtype=torch.float32, device=rows.device), None
        if visual_valid is not None:
            bias[:, :-1].masked_fill_(~visual_valid, -math.inf)
            valid = (bias == 0)[:, None, None]
        bias[:, -1] = self.stop_bias.float()
        pointer_keys = self.pointer_key(rows) if self.config.pointer == "projection" else None
        return Memory(rows, tuple(k for k, _ in pairs), tuple(v for _, v in pairs), pointer_keys, bias, valid)

    # ---- decoder

    def logits(self, x: Tensor, memory: Memory, past=None, at: int = 0) -> Tensor:
        """Pointer logits of Eq. 5 before mask and temperature, float32 [B, S, N + 1].

        x: inputs q_1..q_S [B, S, d], or with `past` (one pair of buffers per layer) those from number `at`
        on, [B, n, d]. A fixed code of the step's number is added to each (open; ours): without it
        self-attention over a set could hardly tell how many were chosen.
        """
        x = x + self.step_codes[at : at + x.shape[1]].to(x.dtype)
        for i, layer in enumerate(self.decoder):
            x = layer(x, memory, i, None if past is None else past[i], at)
        if memory.pointer_keys is not None:
            query = self.pointer_query(self.norm(x))
            x = widened(query @ memory.pointer_keys.transpose(1, 2)) * query.shape[-1] ** -0.5
        return x + memory.bias[:, None]

    def buffers_for(self, memory: Memory, steps: int) -> list[tuple[Tensor, Tensor]]:
        """Empty key and value buffers of the decoder's self-attention, one pair a layer."""
        shape = (len(memory.rows), self.config.head_count, steps, memory.keys[0].shape[-1])
        return [tuple(memory.rows.new_empty(shape) for _ in range(2)) for _ in self.decoder]

    @torch.no_grad()
    def decode(self, memory: Memory, tokens_per_step: int = 1) -> Choices:
        """The selection loop, Eqs. 5 to 8, with cached keys and values: the hard choices.

        tokens_per_step (ours): a step takes so many, those with the highest logits down to ⊥, and the next
        one is told of all of them. The first takes them all even if ⊥ is among them.

        Every tensor has the same shape in every call, and nothing is read back to the host inside the loop on
        a GPU: a sample that has stopped keeps stepping, and chooses ⊥ again and again. On the CPU, where
        reading costs nothing, the loop ends when all samples have.
        """
        steps = self.steps(memory)
        state = self.begin(memory, steps)
        for at in range(0, steps, tokens_per_step):
            self.step(memory, state, at, take=tokens_per_step)
            if not memory.rows.is_cuda and bool(state.done.all()):
                break
        return state.choices(memory.stop)

    def steps(self, memory: Memory) -> int:
        """How many steps there can be: K_max, or all N tokens and ⊥."""
        return min(self.config.max_steps, memory.stop + 1)

    def begin(self, memory: Memory, steps: int) -> LoopState:
        """The loop's state before step 0: nothing chosen, q_1 = s_start."""
        rows = memory.rows
        return LoopState(
            self.start.to(rows.dtype).expand(len(rows), 1, -1).clone(),
            torch.zeros_like(memory.bias),
            torch.zeros(len(rows), dtype=torch.bool, device=rows.device),
            torch.full((len(rows), steps), memory.stop, device=rows.device),
            self.buffers_for(memory, steps),
        )

    def step(self, memory: Memory, state: LoopState, at: int, may_stop: bool = True, take: int = 1) -> Tensor:
        """A step, in place, that takes number `at` (0-based) and the `take - 1` behind it, as far as there is
        room for them. Returns the masked logits, [B, N + 1]. Argmax needs no softmax and no temperature."""
        first = at - state.query.shape[1] + 1  # input 0 is s_start, input t the token taken as number t - 1
        logits = self.logits(state.query, memory, state.past, first)[:, -1] + state.mask
        may_stop = may_stop and at >= self.config.min_tokens
        allowed = logits if may_stop else logits[:, : memory.stop]
        take = min(take, state.order.shape[1] - at, memory.stop)
        choice = allowed.argmax(1, keepdim=True) if take == 1 else best(allowed, take, memory.stop)
        choice = choice.masked_fill(state.done[:, None], memory.stop)
        state.order[:, at : at + take] = choice
        state.done.logical_or_(choice[:, -1] == memory.stop)
        state.mask.scatter_(1, choice, -math.inf)
        index = choice[..., None].expand(-1, -1, memory.rows.shape[2])
        if take == state.query.shape[1]:
            torch.gather(memory.rows, 1, index, out=state.query)
        else:
            state.query = memory.rows.gather(1, index)
        return logits

    @torch.no_grad()
    def explore(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """A trajectory that never stops: order, int64 [B, S], and by how much the stop logit falls short of
        being chosen at each step, the margins, [B, S].

        What is chosen before the stop does not depend on the stop bias. So K at a further bias b is the
        number of steps before the first whose margin is below b, for all b at once (see `cut_at`).
        """
        steps = self.steps(memory)
        state = self.begin(memory, steps)
        logits = [self.step(memory, state, at, may_stop=False) for at in range(steps)]
        together = torch.stack(logits, 1)
        margins = together[..., :-1].amax(-1) - together[..., -1]
        margins[:, : self.config.min_tokens] = math.inf
        return state.order, margins

    @property
    def bias(self) -> Tensor:
        """What calibration sets: the stop bias."""
        return self.stop_bias

    def margins(
        self,
        visual: Tensor,
        text: Tensor | None,
        visual_valid: Tensor | None = None,
        text_valid: Tensor | None = None,
    ) -> Tensor:
        """Those of `explore`, all that calibration needs, [B, S]. Arguments as for `remember`."""
        return self.explore(self.remember(visual, text, visual_valid, text_valid))[1]

    def replay(self, memory: Memory, choices: Choices, chain: int | None = 1, log: bool = False) -> Tensor:
        """The pointer distributions p_t of a trajectory, or with `log` their logarithms, with gradient:
        [B, S, N + 1] (Eq. 6).

        The choices are known, hence so are the forward values of all inputs q_t, and all steps are computed
        at once, like a transformer's training pass. What remains is the gradient through the straight-through
        inputs, q_{t+1} = sg(M[i_t] - p_t' M) + p_t' M, a chain of S links: `chain` of them are followed, by
        so many further passes; None follows all, which is the paper's gradient exactly, at S passes. (Ours:
        truncation, and the parallel pass.)
        """
        order = choices.order
        hard = memory.rows.detach().gather(
            1, order[:, :-1, None].expand(-1, -1, memory.rows.shape[2])
        )  # q_2..q_S
        start = self.start.to(hard.dtype).expand(len(hard), 1, -1)
        mask = self._taken(order, memory.stop)
        inputs = hard
        for link in range((order.shape[1] - 1 if chain is None else chain) + 1):
            if link:
                soft = p[:, :-1].to(hard.dtype) @ memory.rows  # noqa: F821  set by the pass before
                inputs = straight_through(hard, soft)
            logits = self.logits(torch.cat([start, inputs], 1), memory) + mask
            p = (logits / self.config.temperature).softmax(-1)
        return (logits / self.config.temperature).log_softmax(-1) if log else p

    def _taken(self, order: Tensor, stop: int) -> Tensor:
        """m_1..m_S of Eqs. 5 and 8, float32 [B, S, N + 1]: -inf for visual tokens taken before."""
        taken = F.one_hot(order, stop + 1).cumsum(1)
        taken = torch.cat([torch.zeros_like(taken[:, :1]), taken[:, :-1]], 1)
        taken[..., stop] = 0
        taken[:, : self.config.min_tokens, stop] = 1
        return torch.zeros(taken.shape, device=order.device).masked_fill_(taken > 0, -math.inf)


@dataclass
class LoopState:
    """What changes from step to step. query: the inputs not yet read, [B, n, d]. mask: float32 [B, N + 1],
    m_t. done: bool [B]. order: int64 [B, S]. past: see `Policy.buffers_for`."""

    query: Tensor
    mask: Tensor
    done: Tensor
    order: Tensor
    past: list[tuple[Tensor, Tensor]]

    def choices(self, stop: int) -> Choices:
        return Choices(self.order, (self.order != stop).sum(1))


def best(logits: Tensor, take: int, stop: int) -> Tensor:
    """The `take` highest of each row, highest first, int64 [B, take]; ⊥ where none is left, and from ⊥ on."""
    value, choice = logits.topk(take, 1)
    choice.masked_fill_(value == -math.inf, stop)
    return choice.masked_fill((choice == stop).cumsum(1) > 0, stop)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Forward value of `hard`, gradient of `soft` (below Eq. 8)."""
    return (hard - soft).detach() + soft


def step_codes(steps: int, width: int) -> Tensor:
    """Sinusoids of the step's number, float32 [steps, width], the shortest period 8 steps (what matters is
    roughly how many, not which one)."""
    rate = torch.logspace(math.log10(2 * math.pi / 8), math.log10(2 * math.pi / 4096), (width + 1) // 2)
    angle = torch.arange(steps)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


def counts(margins: Tensor, bias: float) -> Tensor:
    """K of each sample if `bias` is added to the stop logit, int64 [B]."""
    return (margins >= bias).long().cumprod(1).sum(1)


def cut_at(order: Tensor, margins: Tensor, stop: int) -> Choices:
    """What `Policy.decode` would choose, of what `Policy.explore` gave. stop: index of the stop action."""
    count = counts(margins, 0.0)
    steps = torch.arange(order.shape[1], device=order.device)
    return Choices(order.masked_fill(steps >= count[:, None], stop), count)


def trimmed(choices: Choices) -> Choices:
    """Without the steps that no sample takes (one device synchronisation). Training alone uses it."""
    if choices.count.is_meta:  # no values, as where memory is estimated: nobody knows
        return choices
    longest = min(choices.order.shape[1], int(choices.count.max()) + 1)
    return replace(choices, order=choices.order[:, :longest])
