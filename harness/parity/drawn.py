"""Random models and inputs of recordings, drawn again from their seed instead of stored.

The small models and the images that released code was recorded on come from torch's generator on the CPU.
Where `NAME.drawn.json` stands beside `NAME.safetensors`, or in its place, `read` draws the tensors that it
describes:

    recipe    a key of `MODELS` or `IMAGES`
    seed      of the generator
    sha256    of the tensors (`digest`), as recorded
    ...       the recipe's own arguments

torch's generator gives the same bits everywhere; its logarithm and cosine, behind normal numbers, the same
last digits on every x86 processor with AVX2 or later. `tests/methods/test_drawn.py` holds the tensors to
their digests there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from methods.errors import UserError

SUFFIX = ".drawn.json"


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of a recording: stored in `path`, described beside it, or some of both.

    Raises:
        UserError: neither is there, or one of them cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    described = path.with_name(path.stem + SUFFIX)
    try:
        stored = load_file(path) if path.exists() or not described.exists() else {}
        return {**stored, **(draw(described) if described.exists() else {})}
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def draw(described: Path) -> dict[str, Tensor]:
    """The tensors that a `NAME.drawn.json` describes. Raises what reading it raises, or KeyError."""
    recipe = {key: value for key, value in json.loads(described.read_text()).items() if key != "sha256"}
    name = recipe.pop("recipe")
    if name in MODELS:
        part = recipe.pop("part")
        return dict(MODELS[name](described.with_name("config.json").read_text(), **recipe)[part])
    return IMAGES[name](**recipe)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes, by name."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return sha.hexdigest()


class _Weights:
    """Draws a model's weights one after another."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: dict[str, Tensor] = {}

    def normal(self, name: str, *shape: int, std: float = 1.0) -> None:
        self.drawn[name] = torch.empty(shape).normal_(0.0, std, generator=self.generator)

    def linear(self, name: str, rows: int, *columns: int, gain: float = 1.0, bias: bool = True) -> None:
        self.normal(f"{name}.weight", rows, *columns, std=gain / math.sqrt(math.prod(columns)))
        if bias:
            self.normal(f"{name}.bias", rows, std=0.05)

    def norm(self, name: str, width: int, bias: bool = False) -> None:
        self.drawn[f"{name}.weight"] = torch.empty(width).uniform_(0.8, 1.2, generator=self.generator)
        if bias:
            self.normal(f"{name}.bias", width, std=0.05)

    def llama(self, config: Mapping, bias: bool) -> None:
        """The layers of a Llama or a Qwen2; queries and keys are larger, so that attention is not flat."""
        width, heads = config["hidden_size"], config["num_attention_heads"]
        keys = width // heads * config["num_key_value_heads"]
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            self.linear(f"{layer}.self_attn.q_proj", width, width, gain=1.8, bias=bias)
            self.linear(f"{layer}.self_attn.k_proj", keys, width, gain=1.8, bias=bias)
            self.linear(f"{layer}.self_attn.v_proj", keys, width, bias=bias)
            self.linear(f"{layer}.self_attn.o_proj", width, width, bias=False)
            for name in ("gate_proj", "up_proj"):
                self.linear(f"{layer}.mlp.{name}", config["intermediate_size"], width, bias=False)
            self.linear(f"{layer}.mlp.down_proj", width, config["intermediate_size"], bias=False)
            self.norm(f"{layer}.input_layernorm", width)
            self.norm(f"{layer}.post_attention_layernorm", width)
        self.norm("model.norm", width)
        self.linear("lm_head", config["vocab_size"], width, bias=False)

    def starting(self, prefix: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.drawn.items() if name.startswith(prefix)}


@functools.cache
def _llava(config: str, seed: int) -> dict[str, dict[str, Tensor]]:
    """CLIP's vision tower, Llama and the projector, by the name of their file."""
    told = json.loads(config)
    clip, llama = told["clip"], told["llama"]
    width, side = clip["hidden_size"], clip["patch_size"]
    weights = _Weights(seed)
    top = "vision_model"
    # embeddings are drawn once like every matrix, and once more at the end
    weights.normal(f"{top}.embeddings.class_embedding", width)
    weights.linear(f"{top}.embeddings.patch_embedding", width, 3, side, side, bias=False)
    places = (clip["image_size"] // side) ** 2 + 1
    weights.normal(f"{top}.embeddings.position_embedding.weight", places, width)
    weights.norm(f"{top}.pre_layrnorm", width, bias=True)
    for i in range(clip["num_hidden_layers"]):
        layer = f"{top}.encoder.layers.{i}"
        for name, gain in (("k_proj", 1.8), ("v_proj", 1.0), ("q_proj", 1.8), ("out_proj", 1.0)):
            weights.linear(f"{layer}.self_attn.{name}", width, width, gain=gain)
        weights.norm(f"{layer}.layer_norm1", width, bias=True)
        weights.linear(f"{layer}.mlp.fc1", clip["intermediate_size"], width)
        weights.linear(f"{layer}.mlp.fc2", width, clip["intermediate_size"])
        weights.norm(f"{layer}.layer_norm2", width, bias=True)
    weights.norm(f"{top}.post_layernorm", width, bias=True)
    weights.normal("model.embed_tokens.weight", llama["vocab_size"], llama["hidden_size"])
    weights.llama(llama, bias=False)
    weights.normal(f"{top}.embeddings.class_embedding", width)
    weights.normal(f"{top}.embeddings.position_embedding.weight", places, width)
    weights.normal("model.embed_tokens.weight", llama["vocab_size"], llama["hidden_size"])
    weights.linear("0", llama["hidden_size"], width)
    weights.linear("2", llama["hidden_size"], llama["hidden_size"], gain=2.0)
    return {
        "clip_vision": weights.starting(top),
        "llama": {**weights.starting("model."), **weights.starting("lm_head")},
        "projector": {**weights.starting("0."), **weights.starting("2.")},
    }


@functools.cache
def _qwen(
    config: str, seed: int, qkv: float, query_key: float, embeddings: int
) -> dict[str, dict[str, Tensor]]:
    """Qwen2.5-VL, under transformers 4's names.

    qkv: gain of the vision tower's attention. query_key: factor on its queries and keys, afterwards.
    embeddings: how often the token embeddings were drawn; the last draw counts.
    """
    told = json.loads(config)
    vision = told["vision_config"]
    width, inner, side = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    weights = _Weights(seed)
    patch = (vision["in_channels"], vision["temporal_patch_size"], side, side)
    weights.linear("visual.patch_embed.proj", width, *patch, bias=False)
    for i in range(vision["depth"]):
        block = f"visual.blocks.{i}"
        weights.norm(f"{block}.norm1", width)
        weights.norm(f"{block}.norm2", width)
        weights.linear(f"{block}.attn.qkv", 3 * width, width, gain=qkv)
        weights.drawn[f"{block}.attn.qkv.weight"][: 2 * width] *= query_key
        weights.linear(f"{block}.attn.proj", width, width)
        weights.linear(f"{block}.mlp.gate_proj", inner, width)
        weights.linear(f"{block}.mlp.up_proj", inner, width)
        weights.linear(f"{block}.mlp.down_proj", width, inner)
    merged = width * vision["spatial_merge_size"] ** 2
    weights.norm("visual.merger.ln_q", width)
    weights.linear("visual.merger.mlp.0", merged, merged)
    weights.linear("visual.merger.mlp.2", vision["out_hidden_size"], merged)
    for _ in range(embeddings):
        weights.normal("model.embed_tokens.weight", told["vocab_size"], told["hidden_size"])
    weights.llama(told, bias=True)
    return {"model": weights.drawn}


def _scenes(
    seed: int, sizes: Sequence[Sequence[int]], boxes: Sequence[int], ids: Sequence[int], form: str
) -> dict[str, Tensor]:
    """Noise with textured boxes: `pixel_values.{i}` [3, height, width], or [patches, 3 · 14 · 14] for Qwen.

    sizes: height and width of each image. boxes: how many each has. ids: how many token ids were drawn after
    each. form: llava or qwen.
    """
    generator = torch.Generator().manual_seed(seed)
    images = {}
    for i, ((height, width), count, tokens) in enumerate(zip(sizes, boxes, ids, strict=True)):
        octaves = [torch.randn(1, 3, side, side, generator=generator)[0] for side in (6, 24, 84)]
        coarse, middle, fine = (_bilinear(octave, height, width, form == "qwen") for octave in octaves)
        texture = coarse + 0.6 * middle + 0.3 * fine
        plain = torch.randn(1, generator=generator)
        image = plain + 0.05 * torch.randn(3, height, width, generator=generator)
        for _ in range(count):
            top, left, tall, wide = _box(generator, height, width, form)
            place = slice(top, top + tall), slice(left, left + wide)
            image[:, place[0], place[1]] = texture[:, place[0], place[1]]
        torch.randint(2, (tokens,), generator=generator)
        images[f"pixel_values.{i}"] = _patches(image) if form == "qwen" else image
    return images


def _box(generator: torch.Generator, height: int, width: int, form: str) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box."""

    def below(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    if form == "qwen":
        return below(0, height - 100), below(0, width - 100), below(40, 100), below(40, 100)
    left, top, wide, tall = below(0, width - 96), below(0, height - 96), below(40, 96), below(40, 96)
    return top, left, tall, wide


def _bilinear(image: Tensor, height: int, width: int, fused: bool) -> Tensor:
    """[3, h, w] -> [3, height, width], to the last digit as torch's kernel for several threads had it.

    With one thread torch takes another kernel, whose last digits differ. fused: the place in the source was
    computed with one rounding, as other builds of torch do.
    """
    for dim, size in ((2, width), (1, height)):
        length = image.shape[dim]
        places = torch.arange(size) + 0.5
        scale = torch.tensor(length / size)
        source = (places.double() * scale.double() - 0.5).float() if fused else places * scale - 0.5
        source = source.clamp(min=0)
        low = source.long()
        high = (low + 1).clamp(max=length - 1)
        shape = [-1 if d == dim else 1 for d in range(3)]
        right = (source - low).view(shape)
        left = 1 - right
        second = (right * image.index_select(dim, high)).double()
        image = (left.double() * image.index_select(dim, low).double() + second).float()
    return image


def _patches(image: Tensor) -> Tensor:
    """[3, h, w] -> [patches, 3 · 14 · 14] in Qwen2.5-VL's order: the four of a merged token in a row."""
    channels, height, width = image.shape
    cut = image.view(channels, height // 28, 2, 14, width // 28, 2, 14)
    return cut.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, channels * 14 * 14)


def _noise(seed: int, patches: Sequence[int], ids: Sequence[int], kept: Sequence[int]) -> dict[str, Tensor]:
    """`pixel_values.{i}` [patches, 1176]: normal numbers, every patch with a strength of its own, 0 to 1.5.

    patches: how many each image has. ids: how many token ids were drawn after each. kept: images to return.
    """
    generator = torch.Generator().manual_seed(seed)
    images = {}
    for i, (count, tokens) in enumerate(zip(patches, ids, strict=True)):
        numbers = torch.randn(count, 1176, generator=generator)
        numbers *= 1.5 * torch.rand(count, 1, generator=generator)
        torch.randint(2, (tokens,), generator=generator)
        if i in kept:
            images[f"pixel_values.{i}"] = numbers
    return images


#: of models, from the text of their config.json; `part` names the file
MODELS = {"llava": _llava, "qwen": _qwen}
#: of inputs
IMAGES = {"scenes": _scenes, "noise": _noise}
