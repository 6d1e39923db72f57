"""Where pocket-qwen's second stage starts: pocket-llava's language model, and a merger that speaks to it.

Qwen2.5-VL's decoder is Llama's with biases on queries, keys and values and with M-RoPE, which is plain RoPE
on text: pocket-llava's weights go in as they are, with biases of zero. What visual tokens have to look like
is then read off pocket-llava: the merger's last layer is fitted, by least squares, to what pocket-llava's
projector makes of the same scenes' patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
)

from harness.pocket.data.scenes import Scene, sample_scene
from harness.pocket.recipe import train_vision as llava_vision
from harness.pocket.recipe.export import CHECKPOINT
from harness.pocket.recipe.qwen.dense_tower import run
from harness.pocket.recipe.qwen.shapes import MERGE, qwen_config
from harness.pocket.recipe.qwen.tokenizer import special_ids
from harness.pocket.recipe.qwen.train_vision import SEED_OFFSET, label_tokens, prepared
from harness.pocket.recipe.vision_labels import label_patches

#: Scenes (of pocket-llava's size) that the merger is fitted on, the weight of a token with nothing on it,
#: and the ridge, as a share of the mean squared activation.
SCENES, BACKGROUND_WEIGHT, RIDGE = 320, 0.2, 1e-4
#: Whose place in pocket-llava's prompt a new token takes: as an input, and as an answer.
STAND_INS = {
    "<|im_start|>": "<s>",
    "user\n": "USER",
    "<|vision_start|>": ":",
    "<|vision_end|>": "Ċ",  # a line's end
    "<|im_end|>": "</s>",
    "assistant\n": ":",
}
ANSWERS = {"<|im_end|>": "</s>"}


def build_model(tokenizer: PreTrainedTokenizerFast, tower: Path) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained pocket-qwen around stage 1's vision tower, of which only the merger may still learn."""
    model = Qwen2_5_VLForConditionalGeneration(qwen_config(len(tokenizer), special_ids(tokenizer)))
    visual = model.model.visual
    visual.load_state_dict(load_file(tower))
    visual.requires_grad_(False)
    visual.merger.requires_grad_(True)
    return model


def pocket_llava() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def pocket_llava_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@torch.no_grad()
def inherit(
    model: Qwen2_5_VLForConditionalGeneration,
    llava: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Copies pocket-llava's language model into the model's."""
    language, old = model.model.language_model, llava.model.language_model
    weights = old.state_dict()
    embeddings = weights.pop("embed_tokens.weight")
    missing = language.load_state_dict(weights, strict=False).missing_keys
    for name in missing:
        if name != "embed_tokens.weight":
            language.get_parameter(name).zero_()  # the biases
    known = len(embeddings)
    vocabulary, old_ids = tokenizer.get_vocab(), pocket_llava_tokenizer().get_vocab()
    tables = (
        (language.embed_tokens.weight, embeddings, STAND_INS),
        (
            model.lm_head.weight,
            llava.lm_head.weight,
            ANSWERS,
        ),
    )
    for table, inherited, stand_ins in tables:
        table.zero_()
        table[:known] = inherited
        for token, other in stand_ins.items():
            table[vocabulary[token]] = inherited[old_ids[other]]


def _wanted(scene: Scene, projected: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of a scene's visual tokens: the embeddings pocket-llava would have them be, [N, d], and their weights.

    projected: what its projector makes of the 576 patches. A token gets the mean of all patches of the thing
    it belongs to, or of all patches on nothing.
    """
    owner = torch.from_numpy(label_patches(scene)["owner"])
    tokens = label_tokens(scene, grid)["owner"]
    means = [projected[owner == i].mean(0) for i in (*range(len(scene.things)), -1)]
    weights = torch.where(tokens >= 0, 1.0, BACKGROUND_WEIGHT)
    means = torch.stack(means)
    weights[means[tokens].isnan().any(-1)] = 0  # a thing no patch belongs to
    return means[tokens].nan_to_num(), weights


def _pairs(
    model: Qwen2_5_VLForConditionalGeneration, llava: LlavaForConditionalGeneration, seed: int, scenes: range
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each scene: what its visual tokens are inside of the merger (and a 1), and `_wanted` of them."""
    merger = model.model.visual.merger
    for first in range(scenes.start, scenes.stop, 16):
        numbers = range(first, min(first + 16, scenes.stop))
        drawn = [sample_scene("train", seed + SEED_OFFSET + 2, i, fewest=4) for i in numbers]
        images = torch.stack([llava_vision.drawn(s) for s in drawn])
        features = llava_vision.hidden_states(llava.model.vision_tower, images, None)[0][:, 1:]
        projected = llava.model.multi_modal_projector(features)
        patches, grid = prepared(drawn)
        fine, _ = run(model.model.visual, patches, grid)
        inner = merger.mlp[1](merger.mlp[0](merger.ln_q(fine).unflatten(1, (-1, MERGE**2)).flatten(2)))
        inner = torch.cat([inner, torch.ones_like(inner[..., :1])], -1)
        for x, scene, theirs in zip(inner, drawn, projected):
            y, weights = _wanted(scene, theirs, grid)
            yield x.double(), y.double(), weights.double()


@torch.no_grad()
def align(
    model: Qwen2_5_VLForConditionalGeneration,
    llava: LlavaForConditionalGeneration,
    seed: int,
    scenes: int = SCENES,
) -> float:
    """Fits the merger's last layer to pocket-llava's visual tokens on some scenes.

    Returns the share of the variance of tokens on things that it explains on others, a tenth as many.
    """
    last = model.model.visual.merger.mlp[2]
    gram = cross = 0.0
    for x, y, weights in _pairs(model, llava, seed, range(scenes)):
        gram = gram + x.T * weights @ x
        cross = cross + x.T * weights @ y
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram + ridge, cross)
    last.weight.copy_(solution[:-1].T)
    last.bias.copy_(solution[-1])
    held_out = range(scenes, scenes + -(-scenes // 10))
    found = [(x @ solution, y, w == 1) for x, y, w in _pairs(model, llava, seed, held_out)]
    ours, theirs = (torch.cat([pair[i][pair[2]] for pair in found]) for i in (0, 1))
    return 1 - float((ours - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum())
