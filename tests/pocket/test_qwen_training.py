"""The trainers' short cuts equal the ordinary Qwen2.5-VL: same tower, same loss for packed questions."""

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from backbones.pocket.qwen import train_vision
from backbones.pocket.qwen.dense_tower import run
from backbones.pocket.qwen.shapes import UNIT, image_processor, vision_config
from backbones.pocket.vision_labels import NAMES
from harness.pocket8.scenes import render, sample_scene


def scenes(canvas, number=2, **more):
    return [sample_scene("train", 0, i, canvas=canvas, **more) for i in range(number)]


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    tower = Qwen2_5_VisionTransformerPretrainedModel(vision_config()).eval()
    train_vision.initialise(tower)
    for block in tower.blocks:  # biases and norms that are not neutral
        block.attn.qkv.bias.data.normal_(0, 0.1)
        block.norm1.weight.data.uniform_(0.8, 1.2)
    return tower


@pytest.mark.parametrize("canvas", [(224, 224), (300, 231), (251, 448)], ids=str)
@torch.no_grad()
def test_dense_tower_equals_hugging_faces(tower, canvas):
    drawn = scenes(canvas)
    patches, grid = train_vision.prepared(drawn)
    fine, merged = run(tower, patches, grid)
    inputs = image_processor()(images=[render(s) for s in drawn], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, grid[0] * 2, grid[1] * 2]] * 2
    theirs = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    torch.testing.assert_close(merged.flatten(0, 1), theirs.pooler_output, atol=3e-5, rtol=1e-4)
    assert fine.shape == (2, 4 * grid[0] * grid[1], 192)
    again = tower.merger(fine.flatten(0, 1))
    torch.testing.assert_close(again, theirs.pooler_output, atol=3e-5, rtol=1e-4)


def test_labels_of_tokens_and_patches_name_what_lies_there():
    drawn = scenes((300, 420), fewest=8)
    _, (rows, columns), of_patches, of_tokens = train_vision.labelled(drawn)
    assert (rows, columns) == (15, 11)
    for b, scene in enumerate(drawn):
        for i, thing in enumerate(scene.things):
            x, y = thing.centre[0] * columns / 300, thing.centre[1] * rows / 420
            token = int(y) * columns + int(x)
            assert of_tokens["owner"][b, token] == i
            assert NAMES[of_tokens["name"][b, token]] == thing.name
            centre = of_tokens["offset"][b, token] + torch.tensor(
                [token % columns + 0.5, token // columns + 0.5]
            )
            assert np.allclose(centre, (x, y), atol=1e-4)
            down, right = int(2 * (y % 1)), int(2 * (x % 1))
            assert NAMES[of_patches["name"][b, 4 * token + 2 * down + right]] == thing.name
    assert UNIT == 28
