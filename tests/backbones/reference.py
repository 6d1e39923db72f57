"""An independent decoder for the engine's tests: plain tensors, one sample, no padding, no cache, full
recomputation of every token, none of transformers' modules. Methods' own functions choose; everything else is
done by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from methods.base import PromptView, Stage, StageView


class Reference:
    """model: a LlavaForConditionalGeneration whose language model is Llama, float32."""

    def __init__(self, model):
        text = model.model.language_model
        self.w, self.head, c = text.state_dict(), model.lm_head.weight, text.config
        self.heads, self.kv_heads, self.layers = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.num_hidden_layers,
        )
        self.dim, self.eps = c.hidden_size // c.num_attention_heads, c.rms_norm_eps
        self.frequencies = 1.0 / c.rope_parameters["rope_theta"] ** (
            torch.arange(0, self.dim, 2).float() / self.dim
        )

    def norm(self, i, name, x):
        return (
            self.w[f"layers.{i}.{name}.weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        )

    def heads_of(self, i, name, x, count):
        x = (
            F.linear(x, self.w[f"layers.{i}.self_attn.{name}.weight"])
            .view(len(x), count, self.dim)
            .transpose(0, 1)
        )
        return x.repeat_interleave(self.heads // count, 0)

    def rotate(self, x, positions):
        angle = positions[:, None].float() * self.frequencies
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def attention(self, i, h, positions):
        """[H, n, n]"""
        x = self.norm(i, "input_layernorm", h)
        q = self.rotate(self.heads_of(i, "q_proj", x, self.heads), positions)
        k = self.rotate(self.heads_of(i, "k_proj", x, self.kv_heads), positions)
        logits = q @ k.transpose(1, 2) / self.dim**0.5
        return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), float("-inf")).softmax(-1)

    def layer(self, i, h, attention):
        v = self.heads_of(i, "v_proj", self.norm(i, "input_layernorm", h), self.kv_heads)
        mixed = (attention @ v).transpose(0, 1).flatten(1)
        h = h + F.linear(mixed, self.w[f"layers.{i}.self_attn.o_proj.weight"])
        x = self.norm(i, "post_attention_layernorm", h)
        gate, up, down = (self.w[f"layers.{i}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        return h + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def forward(self, prompt, positions, visual, generated, stages: list[Stage]):
        """Logits [V] behind prompt [n, D] + generated [t, D]; visual: int64 columns of the prompt's visual
        tokens.

        positions: [n + t]. Returns also what each stage kept.
        """
        h, n, at = torch.cat([prompt, generated]), len(prompt), {s.layer: s for s in stages}
        kept, identity, found, previous, total = [], torch.arange(len(visual)), [], None, len(visual)
        text_after = prompt[visual[-1] + 1 :]
        for i in range(self.layers):
            if i in at:
                s = at[i]
                rows = (
                    torch.tensor([-1]) if s.rows is None else s.rows(PromptView(prompt[visual], text_after))
                )
                source = previous if s.attention == "previous" else self.attention(i, h, positions)
                view = StageView(
                    source[:, n + rows][..., found[-1] if found else visual],
                    identity,
                    total,
                    1,
                    h[:n],
                    found[-1] if found else visual,
                    s.count,
                )
                columns = found[-1] if found else visual
                answer = s.select(view)
                identity = torch.where(answer.kept < 0, answer.kept, identity[answer.kept.clamp(min=0)])
                kept.append(identity)
                tokens = h[columns[answer.kept]] if answer.tokens is None else answer.tokens
                first, last = int(columns[0]), int(columns[-1])
                own = positions[columns[answer.kept.clamp(min=0)]] if len(columns) else positions[:0]
                h = torch.cat([h[:first], tokens, h[last + 1 :]])
                positions = torch.cat([positions[:first], own, positions[last + 1 :]])
                if s.positions == "renumbered":
                    positions = torch.arange(len(h))
                n = n - len(columns) + len(tokens)
                found.append(first + torch.arange(len(tokens)))
            previous = self.attention(i, h, positions)
            h = self.layer(i, h, previous)
        h = self.w["norm.weight"] * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return F.linear(h[-1], self.head), kept

    def greedy(self, prompt, positions, visual, stages, steps):
        """Tokens [steps], logits [steps, V], kept of each stage."""
        tokens, logits, embed = [], [], self.w["embed_tokens.weight"]
        kept = []
        for _ in range(steps):
            new = embed[torch.tensor(tokens, dtype=torch.long)]
            where = torch.cat([positions, positions[-1] + 1 + torch.arange(len(new))])
            out, kept = self.forward(prompt, where, visual, new, stages)
            tokens.append(int(out.argmax()))
            logits.append(out)
        return torch.tensor(tokens), torch.stack(logits), kept
