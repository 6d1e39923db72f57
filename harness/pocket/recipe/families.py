"""What differs between the two pocket backbones, as the one recipe sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
)

from harness.drawings.v2.paint import render
from harness.drawings.v2.scenes import SQUARE, Scene, varied_canvas
from harness.pocket.recipe import dense_tower
from harness.pocket.recipe.labels import label_cells, label_image
from harness.pocket.recipe.sizes import (
    CLIP,
    FEATURE_LAYER,
    LANGUAGE,
    MERGE,
    PATCH,
    PIXEL_MEAN,
    PIXEL_STD,
    QWEN_VISION,
    llava_config,
    qwen_config,
    qwen_image_processor,
)
from harness.pocket.recipe.tokenizer import llava_ids, llava_tokenizer, qwen_ids, qwen_tokenizer

Labels = dict[str, Tensor]


@dataclass(frozen=True)
class Reading:
    """What the read-outs of stage 1 see: tokens float [B, N, d], pooled [B, d], labels of both."""

    name: str
    tokens: Tensor
    pooled: Tensor
    labels: Labels


def drawn(scene: Scene) -> Tensor:
    """The scene's pixels, uint8 [3, height, width]."""
    return torch.from_numpy(np.asarray(render(scene)).transpose(2, 0, 1).copy())


def stacked(found: list[dict]) -> Labels:
    return {k: torch.stack([torch.as_tensor(labels[k]) for labels in found]) for k in found[0]}


class PocketFamily(ABC):
    """One of the two backbones. `model` is the ordinary Hugging Face one; every short cut here is tested to
    be equal to its own forward."""

    name: str
    #: read-outs of stage 1 by name: width of what they read
    reads: ClassVar[dict[str, int]]
    #: parts of the names of the tower's weight matrices
    tower_hidden: tuple[str, ...]
    #: text around the image and behind a question
    head: str
    image_end: str
    lead: str
    tail: str
    seed_offset: int

    @cached_property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerFast: ...

    @abstractmethod
    def untrained(self) -> nn.Module:
        """The model with the starting values of stage 1."""

    @abstractmethod
    def tower(self, model: nn.Module) -> nn.Module:
        """What stage 1 trains."""

    @abstractmethod
    def connector(self, model: nn.Module) -> nn.Module:
        """What stage 2 trains of the vision side."""

    def start_connector(self, model: nn.Module, scale: float) -> None:
        """Starting values for features of that root mean square, where stage 1 has not trained it."""
        return None

    @abstractmethod
    def canvas(self, seed: int, step: int, small: bool) -> tuple[int, int]:
        """Width and height of the images of a step."""

    @abstractmethod
    def seen(self, scenes: list[Scene]) -> tuple[Tensor, tuple[int, int]]:
        """Images of one size as the tower takes them, and the grid (rows, columns) of visual tokens."""

    @abstractmethod
    def labels(self, scenes: list[Scene], grid: tuple[int, int]) -> dict[str, Labels]:
        """By read-out."""

    @abstractmethod
    def read(
        self,
        model: nn.Module,
        pixels: Tensor,
        grid: tuple[int, int],
        labels: dict[str, Labels],
        seed: int | None,
    ) -> list[Reading]:
        """Stage 1's forward pass. seed: see only some of the patches, drawn with it; None: all."""

    @abstractmethod
    def features(self, model: nn.Module, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the connector reads, [B, ...]."""

    @abstractmethod
    def visual(self, model: nn.Module, features: Tensor) -> Tensor:
        """Visual tokens [B, N, D]."""

    @abstractmethod
    def positions(
        self, grid: tuple[int, int], keep: Tensor, offset: Tensor, renumbered: bool = False
    ) -> Tensor:
        """Rotary positions of a packed sequence: the head, the kept visual tokens, the image's end, the
        questions. keep: int64 [B, K]. offset: place of each text token within its question, [B, M].
        renumbered: where the family's pruning methods do it, the kept tokens follow each other, and the text
        follows them. Returns [B, L], or [3, B, L]."""

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    @cached_property
    def head_ids(self) -> Tensor:
        return torch.tensor(self.tokenizer.encode(self.head))

    @cached_property
    def end_ids(self) -> Tensor:
        return torch.tensor(self.ids(self.image_end), dtype=torch.long)


class PocketLlava(PocketFamily):
    name, seed_offset = "llava", 0
    reads: ClassVar = {"patch": CLIP["hidden_size"]}
    tower_hidden = ("self_attn", "mlp")
    head, image_end, lead, tail = "USER: ", "", "\n", " ASSISTANT:"
    #: background patches that a sparse step of stage 1 sees
    BACKGROUND = 56

    @cached_property
    def tokenizer(self):
        return llava_tokenizer()

    def untrained(self):
        model = LlavaForConditionalGeneration(llava_config(len(self.tokenizer), llava_ids(self.tokenizer)))
        start_clip(model.model.vision_tower)
        return model

    def tower(self, model):
        return model.model.vision_tower

    def connector(self, model):
        return model.model.multi_modal_projector

    def start_connector(self, model, scale):
        for linear, gain in (
            (self.connector(model).linear_1, 1 / scale),
            (self.connector(model).linear_2, 1),
        ):
            nn.init.xavier_uniform_(linear.weight, gain=gain)
            nn.init.zeros_(linear.bias)

    def canvas(self, seed, step, small):
        return SQUARE

    def seen(self, scenes):
        side = CLIP["image_size"] // PATCH
        return torch.stack([drawn(s) for s in scenes]), (side, side)

    def labels(self, scenes, grid):
        return {"patch": stacked([label_cells(s, grid) | label_image(s) for s in scenes])}

    def read(self, model, pixels, grid, labels, seed):
        own, keep = labels["patch"], None
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            on_thing = own["owner"] >= 0
            k = min(on_thing.shape[1], int(on_thing.sum(1).max()) + self.BACKGROUND)
            keep = (on_thing + torch.rand(on_thing.shape, generator=generator)).topk(k, 1).indices
            own = {
                key: value.gather(1, keep if value.ndim == 2 else keep[..., None].expand(-1, -1, 2))
                if value.shape[1:2] == on_thing.shape[1:] and key != "presence"
                else value
                for key, value in own.items()
            }
        features, pooled = clip_states(self.tower(model), pixels, keep)
        return [Reading("patch", features[:, 1:], pooled, own)]

    def features(self, model, pixels, grid):
        return clip_states(self.tower(model), pixels, None)[0][:, 1:]

    def visual(self, model, features):
        return self.connector(model)(features)

    def positions(self, grid, keep, offset, renumbered=False):
        start, rows, tokens = len(self.head_ids), len(keep), grid[0] * grid[1]
        if renumbered:
            tokens = keep.shape[1]
            keep = torch.arange(tokens).expand(rows, -1)
        return torch.cat([torch.arange(start).expand(rows, -1), start + keep, start + tokens + offset], 1)


class PocketQwen(PocketFamily):
    name, seed_offset = "qwen", 100
    reads: ClassVar = {"token": LANGUAGE["hidden_size"], "patch": QWEN_VISION["hidden_size"]}
    tower_hidden = ("blocks",)
    head, image_end, lead = "<|im_start|>user\n<|vision_start|>", "<|vision_end|>", ""
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    #: a visual token belongs to a thing that covers at least this share of it
    LEAST_COVER = 0.08
    #: sides of the canvases of the first part of stage 1, which are fuller and cost less
    SMALL_SIDES = (168, 280)

    @cached_property
    def tokenizer(self):
        return qwen_tokenizer()

    def untrained(self):
        model = Qwen2_5_VLForConditionalGeneration(qwen_config(len(self.tokenizer), qwen_ids(self.tokenizer)))
        start_window_tower(model.model.visual)
        return model

    def tower(self, model):
        return model.model.visual

    def connector(self, model):
        return model.model.visual.merger

    def canvas(self, seed, step, small):
        return varied_canvas(seed, step, self.SMALL_SIDES) if small else varied_canvas(seed, step)

    def seen(self, scenes):
        images = [drawn(s) for s in scenes]
        inputs = qwen_image_processor(fewest_tokens=1)(images=images, return_tensors="pt")
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        patches = dense_tower.one_frame(inputs["pixel_values"]).unflatten(0, (len(scenes), -1))
        return patches, (rows // MERGE, columns // MERGE)

    def labels(self, scenes, grid):
        rows, columns = grid
        fine = (rows * MERGE, columns * MERGE)
        raster = torch.arange(fine[0] * fine[1]).view(rows, MERGE, columns, MERGE)
        order = raster.transpose(1, 2).flatten().numpy()  # the four patches of a token stand together
        whole = [label_image(s) for s in scenes]
        return {
            "token": stacked(
                [label_cells(s, grid, self.LEAST_COVER, own_centre=True) | w for s, w in zip(scenes, whole)]
            ),
            "patch": stacked(
                [{k: v[order] for k, v in label_cells(s, fine).items()} | w for s, w in zip(scenes, whole)]
            ),
        }

    def read(self, model, pixels, grid, labels, seed):
        fine, tokens = dense_tower.run(self.tower(model), pixels, grid)
        return [
            Reading("token", tokens, tokens.mean(1), labels["token"]),
            Reading("patch", fine, fine.mean(1), labels["patch"]),
        ]

    def features(self, model, pixels, grid):
        return dense_tower.run(self.tower(model), pixels, grid)[0]

    def visual(self, model, features):
        return self.connector(model)(features).unflatten(0, (len(features), -1))

    def positions(self, grid, keep, offset, renumbered=False):
        rows, start = len(keep), len(self.head_ids)  # M-RoPE's positions are never renumbered
        places = torch.cartesian_prod(*map(torch.arange, (1, *grid))).T[:, None].expand(-1, rows, -1)
        places = places.gather(2, keep.expand(3, -1, -1))
        end = start + max(grid)
        return torch.cat(
            [
                torch.arange(start).expand(3, rows, -1),
                start + places,
                (end + torch.arange(len(self.end_ids))).expand(3, rows, -1),
                (end + len(self.end_ids) + offset).expand(3, -1, -1),
            ],
            2,
        )


FAMILIES: dict[str, type[PocketFamily]] = {"llava": PocketLlava, "qwen": PocketQwen}


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32, CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (PIXEL_MEAN, PIXEL_STD))
    return (images.float() - mean) / std


def clip_states(tower, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """A CLIP tower's feature layer [B, 1 + K, d] and pooled CLS [B, d], of the kept patches only.

    images: uint8 [B, 3, 336, 336]. keep: int64 [B, K] patch indices, or None for all.
    """
    embeddings = tower.embeddings
    patches = F.unfold(normalise(images), PATCH, stride=PATCH).transpose(1, 2)
    positions = embeddings.position_embedding.weight
    if keep is None:
        places = positions[1:].expand(len(images), -1, -1)
    else:
        patches = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
        places = positions[1:][keep]
    x = patches @ embeddings.patch_embedding.weight.flatten(1).T + places
    cls = (embeddings.class_embedding + positions[0]).expand(len(images), 1, -1)
    x = tower.pre_layrnorm(torch.cat([cls, x], 1))
    layers = tower.encoder.layers
    for i, layer in enumerate(layers):
        x = layer(x, attention_mask=None)
        x = x[0] if isinstance(x, tuple) else x
        if i == len(layers) + FEATURE_LAYER:
            features = x
    return features, tower.post_layernorm(x[:, 0])


def start_clip(tower) -> None:
    """Smooth 2-D sinusoidal positions, and queries equal to keys, so that attention begins local.

    Only starting values (compare "mimetic initialisation", Trockman & Kolter 2023); everything is trained.
    """
    width, side = CLIP["hidden_size"], CLIP["image_size"] // PATCH
    omega = torch.logspace(np.log10(1.6), np.log10(0.06), width // 4)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [f(p.reshape(-1, 1) * omega) for p in (rows, columns) for f in (torch.sin, torch.cos)]
    with torch.no_grad():
        embeddings = tower.embeddings
        embeddings.position_embedding.weight[1:] = 0.5 * torch.cat(waves, 1)
        embeddings.position_embedding.weight[0] = 0
        embeddings.class_embedding.normal_(0, 0.3)
        embeddings.patch_embedding.weight.normal_(0, 0.6 / (3 * PATCH**2) ** 0.5)
        for layer in tower.encoder.layers:
            attention = layer.self_attn
            attention.k_proj.weight.normal_(0, 0.8 / width**0.5)
            attention.q_proj.weight.copy_(attention.k_proj.weight)
            for linear in (attention.v_proj, attention.out_proj, layer.mlp.fc1, layer.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight, gain=0.7)


def start_window_tower(tower) -> None:
    """Queries equal to keys, so that attention begins with what is alike and near; as `start_clip`."""
    width, frames = QWEN_VISION["hidden_size"], QWEN_VISION["temporal_patch_size"]
    with torch.no_grad():
        embedding = tower.patch_embed.proj.weight
        one = torch.randn_like(embedding[:, :, 0]) * 1.2 / embedding[0, :, 0].numel() ** 0.5
        embedding.copy_((one / frames)[:, :, None].expand_as(embedding))
        for block in tower.blocks:
            queries, keys, values = block.attn.qkv.weight.chunk(3)
            keys.normal_(0, 0.8 / width**0.5)
            queries.copy_(keys)
            block.attn.qkv.bias.zero_()
            mlp = block.mlp
            for weight in (values, block.attn.proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight):
                nn.init.xavier_uniform_(weight, gain=0.7)
            nn.init.xavier_uniform_(mlp.down_proj.weight, gain=0.7)
        for linear in (tower.merger.mlp[0], tower.merger.mlp[2]):
            nn.init.xavier_uniform_(linear.weight)
            linear.bias.zero_()
