"""Loading a Qwen2.5-VL checkpoint folder, and what its inputs and records hold."""

from __future__ import annotations

import json

import pytest
import tiny_qwen
import torch
from PIL import Image

import backbones
from methods.errors import UserError


def test_inputs_of_different_sizes(qwen):
    images = [Image.new("RGB", (28 * 7, 28 * 5)), Image.new("L", (60, 90)), Image.new("RGB", (1000, 400))]
    batch = qwen.inputs(images, ["What is it?", "A rather longer question: is there anything red?", "?"])
    sizes = [int(n) // 4 for n in batch["image_grid_thw"].prod(1)]
    assert sizes[0] == 35 and len(set(sizes)) == 3 and max(sizes) <= tiny_qwen.MAX_TOKENS
    is_image = batch["input_ids"] == qwen.model.config.image_token_id
    assert is_image.sum(1).tolist() == sizes and torch.equal(is_image, batch["mm_token_type_ids"] == 1)
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"].all()
    assert len(batch["pixel_values"]) == 4 * sum(sizes)


def test_several_images_in_one_prompt(qwen):
    image = Image.new("RGB", (56, 84))
    batch = qwen.inputs([[image, image], image], ["Same?", "What?"])
    assert (batch["input_ids"] == qwen.model.config.image_token_id).sum(1).tolist() == [12, 6]
    assert len(batch["image_grid_thw"]) == 3


def test_facts(qwen):
    assert (qwen.family.model_type, qwen.num_layers) == ("qwen2_5_vl", tiny_qwen.LAYERS)
    assert qwen.num_visual_tokens == tiny_qwen.MAX_TOKENS, "the most an image can have"
    told = qwen.describe()
    assert (told["min_pixels"], told["max_pixels"]) == (4 * 28**2, 48 * 28**2)
    assert told["attention"] == "sdpa" and "/" not in json.dumps(told)


def test_pixel_limits_are_only_said_where_they_are(backbone):
    assert not {"min_pixels", "max_pixels"} & backbone.describe().keys()


def test_sliding_windows_are_refused(tiny_qwen_checkpoint, tmp_path):
    import shutil

    copy = tmp_path / "c"
    shutil.copytree(tiny_qwen_checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"] |= {"layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 3}
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="sliding-window"):
        backbones.load(str(copy))
