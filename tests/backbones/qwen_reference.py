"""An independent Qwen2.5-VL for the engine's tests: plain tensors, one sample, no padding, no cache, none of
transformers' modules. The tower never leaves raster order (windows are a mask over coordinates), positions
are made by hand, every token is computed anew at every step. Methods' own functions choose."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from methods.base import ImageView, PromptView, StageView


def rms(x, weight, eps=1e-6):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def half_turned(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


class QwenReference:
    """model: a Qwen2_5_VLForConditionalGeneration, float32."""

    def __init__(self, model):
        self.w = {k.removeprefix("model."): v for k, v in model.state_dict().items()}
        self.vision, self.text = model.config.vision_config, model.config.get_text_config()
        self.image = model.config.image_token_id
        self.heads, self.kv_heads = self.text.num_attention_heads, self.text.num_key_value_heads
        self.dim = self.text.hidden_size // self.heads

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    # ---- the tower

    def see(self, patches, grid):
        """One image [4 N, p] of `grid` visual tokens: merged [N, D], attention of the last layer [H, 4 N,
        4 N], its rotated keys [H, 4 N, d_head]."""
        v, (rows, columns) = self.vision, grid
        token = torch.arange(rows * columns).repeat_interleave(4)
        inner = torch.arange(4).repeat(rows * columns)
        y, x = token // columns * 2 + inner // 2, token % columns * 2 + inner % 2
        side = v.window_size // v.patch_size  # patches
        window = y // side * 1000 + x // side
        same = window[:, None] == window[None]
        h = F.linear(patches, self.w["visual.patch_embed.proj.weight"].flatten(1))
        width = v.hidden_size // v.num_heads
        rate = 1.0 / 10000.0 ** (torch.arange(0, width // 2, 2) / (width // 2))
        angle = torch.cat([y[:, None] * rate, x[:, None] * rate], -1).repeat(1, 2)
        for i in range(v.depth):
            block = f"visual.blocks.{i}"
            qkv = self.linear(f"{block}.attn.qkv", rms(h, self.w[f"{block}.norm1.weight"]))
            q, k, value = qkv.view(len(h), 3, v.num_heads, width).permute(1, 2, 0, 3)
            q, k = (t * angle.cos() + half_turned(t) * angle.sin() for t in (q, k))
            logits = q @ k.mT / width**0.5
            if i not in v.fullatt_block_indexes:
                logits = logits.masked_fill(~same, float("-inf"))
            attention = logits.softmax(-1)
            h = h + self.linear(f"{block}.attn.proj", (attention @ value).transpose(0, 1).flatten(1))
            z, mlp = rms(h, self.w[f"{block}.norm2.weight"]), f"{block}.mlp"
            gated = F.silu(self.linear(f"{mlp}.gate_proj", z)) * self.linear(f"{mlp}.up_proj", z)
            h = h + self.linear(f"{mlp}.down_proj", gated)
        four = rms(h, self.w["visual.merger.ln_q.weight"]).view(rows * columns, -1)
        return (
            self.linear("visual.merger.mlp.2", F.gelu(self.linear("visual.merger.mlp.0", four))),
            attention,
            k,
        )

    def view(self, patches, grid, wanted, text=None, after=None):
        """What a method gets to see of an image."""
        merged, attention, keys = self.see(patches, grid)
        signals = {}
        for s in wanted:
            assert s.layer == -1
            if s.kind == "received":
                signals[s] = attention.mean((0, 1)).view(-1, 4).sum(1)
            elif s.kind == "keys":
                signals[s] = keys.unflatten(1, (-1, 4)).mean(2).transpose(0, 1).flatten(1)
            else:
                signals[s] = None  # the tower's own order: only the released form of HoloV reads it
        heads = self.vision.num_heads
        return ImageView(merged, grid, heads, patches, lambda x: x, signals, text, False, after)

    # ---- the prompt

    def positions(self, ids, grids):
        """M-RoPE [3, n]: text counts up on all axes, an image its rows and columns from where it starts."""
        out, now, grids, i = [], 0, iter(grids), 0
        while i < len(ids):
            if ids[i] == self.image:
                rows, columns = next(grids)
                out += [(now, now + r, now + c) for r in range(rows) for c in range(columns)]
                now += max(rows, columns)
                i += rows * columns
            else:
                out.append((now, now, now))
                now += 1
                i += 1
        return torch.tensor(out).T

    # ---- the decoder

    def rotate(self, x, positions):
        rate = 1.0 / self.text.rope_parameters["rope_theta"] ** (torch.arange(0, self.dim, 2) / self.dim)
        axis = torch.repeat_interleave(
            torch.arange(3), torch.tensor(self.text.rope_parameters["mrope_section"])
        )
        angle = (positions[axis].T * rate).repeat(1, 2)
        return x * angle.cos() + half_turned(x) * angle.sin()

    def keys(self, i, h, positions):
        layer = f"language_model.layers.{i}"
        x = rms(h, self.w[f"{layer}.input_layernorm.weight"])
        k = self.linear(f"{layer}.self_attn.k_proj", x).view(len(x), -1, self.dim).transpose(0, 1)
        return self.rotate(k, positions)

    def attention(self, i, h, positions):
        layer = f"language_model.layers.{i}"
        x = rms(h, self.w[f"{layer}.input_layernorm.weight"])
        q = self.linear(f"{layer}.self_attn.q_proj", x).view(len(x), -1, self.dim).transpose(0, 1)
        k = self.keys(i, h, positions).repeat_interleave(self.heads // self.kv_heads, 0)
        logits = self.rotate(q, positions) @ k.mT / self.dim**0.5
        return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), float("-inf")).softmax(-1)

    def layer(self, i, h, attention):
        layer = f"language_model.layers.{i}"
        x = rms(h, self.w[f"{layer}.input_layernorm.weight"])
        value = self.linear(f"{layer}.self_attn.v_proj", x).view(len(x), -1, self.dim).transpose(0, 1)
        mixed = attention @ value.repeat_interleave(self.heads // self.kv_heads, 0)
        h = h + self.linear(f"{layer}.self_attn.o_proj", mixed.transpose(0, 1).flatten(1))
        x, mlp = rms(h, self.w[f"{layer}.post_attention_layernorm.weight"]), f"{layer}.mlp"
        gated = F.silu(self.linear(f"{mlp}.gate_proj", x)) * self.linear(f"{mlp}.up_proj", x)
        return h + self.linear(f"{mlp}.down_proj", gated)

    def forward(self, h, n, positions, visual, sizes, after, stages):
        """Logits behind the n prompt tokens and what was generated, and what each stage kept.

        h: [n + t, D]. positions: [3, n + t]. visual: columns of visual tokens, of images of `sizes`. after:
        the text behind them [T, D].
        """
        at = {stage.layer: stage for stage in stages}
        first, total, identity, kept = h[visual], len(visual), torch.arange(len(visual)), []
        previous = keys = None
        for i in range(self.text.num_hidden_layers):
            if i in at:
                s = at[i]
                rows = torch.tensor([-1]) if s.rows is None else s.rows(PromptView(first, after))
                source = previous if s.attention == "previous" else self.attention(i, h, positions)
                view = StageView(
                    source[:, n + rows][..., visual], identity, total, len(sizes), h[:n], visual, s.count,
                    tuple(sizes), n, keys[:, :n].transpose(0, 1).flatten(1),
                    lambda x: rms(x, self.w["language_model.norm.weight"]),
                )  # fmt: skip
                answer = s.select(view)
                places = visual[own_places(answer)]
                tokens = h[places] if answer.tokens is None else answer.tokens
                identity = torch.where(answer.kept < 0, answer.kept, identity[answer.kept.clamp(min=0)])
                kept.append(identity)
                is_text = torch.ones(len(h), dtype=torch.bool)
                is_text[visual] = False
                # survivors stand where they stood; with made tokens (one image only) from the first place on
                slots = places if answer.tokens is None else visual[: len(tokens)]
                order = torch.cat([is_text.nonzero()[:, 0], slots]).sort().indices
                h = torch.cat([h[is_text], tokens])[order]
                positions = torch.cat([positions[:, is_text], positions[:, places]], 1)[:, order]
                visual = (order >= is_text.sum()).nonzero()[:, 0]
                n -= total_dropped(is_text, len(tokens))
            previous, keys = self.attention(i, h, positions), self.keys(i, h, positions)
            h = self.layer(i, h, previous)
        return F.linear(rms(h[-1], self.w["language_model.norm.weight"]), self.w["lm_head.weight"]), kept

    def greedy(self, model_inputs, grids, pruner, steps):
        """Tokens [steps], logits [steps, V], kept of each stage, for one sample without padding.

        model_inputs: of the processor, with one row. grids: (rows, columns) of each image's visual tokens.
        """
        ids = model_inputs["input_ids"][0]
        embeds, is_image = self.w["language_model.embed_tokens.weight"][ids], ids == self.image
        positions, n_of = self.positions(ids.tolist(), grids), [r * c for r, c in grids]
        parts = model_inputs["pixel_values"].split([4 * n for n in n_of])
        wanted = pruner.reads(has_cls=False)
        behind = embeds[int(is_image.nonzero()[-1]) + 1 :] if grids else None
        views = [self.view(p, g, wanted, embeds[~is_image], behind) for p, g in zip(parts, grids)]
        pieces, where, columns, kept = [], [], [], []
        for view, own in zip(views, is_image.nonzero()[:, 0].split(n_of)):
            tokens, places, name = view.features, torch.arange(len(own)), torch.arange(len(own))
            if pruner.selects:
                (answer,) = pruner.select_all([view])
                name = answer.kept
                places = own_places(answer)
                tokens = view.features[name] if answer.tokens is None else answer.tokens
            pieces.append(tokens)
            where.append(positions[:, own[places]])
            columns.append(own[: len(tokens)])
            kept.append(name)
        columns = torch.cat(columns) if columns else torch.empty(0, dtype=torch.long)
        order = torch.cat([(~is_image).nonzero()[:, 0], columns]).sort().indices
        prompt = torch.cat([embeds[~is_image], *pieces])[order]
        positions = torch.cat([positions[:, ~is_image], *where], 1)[:, order]
        visual = (order >= (~is_image).sum()).nonzero()[:, 0]
        after = prompt[int(visual[-1]) + 1 :] if len(visual) else prompt
        stages = []
        if pruner.acts:
            of_each = [pruner.stages(n, self.text.num_hidden_layers) for n in n_of]
            stages = [_together(same) for same in zip(*of_each)]
        tokens, logits, by_stage = [], [], []
        for _ in range(steps):
            new = self.w["language_model.embed_tokens.weight"][torch.tensor(tokens, dtype=torch.long)]
            further = positions[:, -1:] + 1 + torch.arange(len(new))
            out, by_stage = self.forward(
                torch.cat([prompt, new]), len(prompt), torch.cat([positions, further], 1), visual, n_of,
                after, stages,
            )  # fmt: skip
            logits.append(out.clone())
            out[self.image] = -torch.inf  # never generated
            tokens.append(int(out.argmax()))
        if pruner.selects and kept:
            by_stage = [torch.cat(kept), *(torch.cat(kept)[own] for own in by_stage)]
        return torch.tensor(tokens), torch.stack(logits), by_stage


class Qwen2VLReference(QwenReference):
    """model: a Qwen2VLForConditionalGeneration. Its tower: no windows, LayerNorm, two linear maps."""

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)

    def see(self, patches, grid):
        v, (rows, columns) = self.vision, grid
        token = torch.arange(rows * columns).repeat_interleave(4)
        inner = torch.arange(4).repeat(rows * columns)
        y, x = token // columns * 2 + inner // 2, token % columns * 2 + inner % 2
        h = F.linear(patches, self.w["visual.patch_embed.proj.weight"].flatten(1))
        width = v.embed_dim // v.num_heads
        rate = 1.0 / 10000.0 ** (torch.arange(0, width // 2, 2) / (width // 2))
        angle = torch.cat([y[:, None] * rate, x[:, None] * rate], -1).repeat(1, 2)
        for i in range(v.depth):
            block = f"visual.blocks.{i}"
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", h))
            q, k, value = qkv.view(len(h), 3, v.num_heads, width).permute(1, 2, 0, 3)
            q, k = (t * angle.cos() + half_turned(t) * angle.sin() for t in (q, k))
            attention = (q @ k.mT / width**0.5).softmax(-1)
            h = h + self.linear(f"{block}.attn.proj", (attention @ value).transpose(0, 1).flatten(1))
            z = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", h))
            h = h + self.linear(f"{block}.mlp.fc2", z * torch.sigmoid(1.702 * z))
        four = self.norm("visual.merger.ln_q", h).view(rows * columns, -1)
        four = F.gelu(self.linear("visual.merger.mlp.0", four))
        return self.linear("visual.merger.mlp.2", four), attention, k


def own_places(answer):
    """Whose position each token takes: its own, a made one that of its number unless the method says."""
    if answer.places is not None:
        return answer.places
    return torch.where(answer.kept < 0, torch.arange(len(answer.kept)), answer.kept)


def total_dropped(is_text, left):
    """Columns lost at a cut that leaves `left` visual tokens."""
    return int((~is_text).sum()) - left


def _together(stages):
    """One stage for several images: the counts add up."""
    from dataclasses import replace

    counts = [s.count for s in stages]
    return replace(stages[0], count=None if None in counts else sum(counts))
