"""Loading checkpoints and making inputs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

import backbones
from methods.errors import UserError


def test_inputs_are_left_padded_with_one_image_each(backbone):
    images = [Image.new("RGB", (60, 40), "red"), Image.new("L", (30, 90))]
    batch = backbone.inputs(images, ["Is it red?", "A rather longer question: is there anything red in it?"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert batch["pixel_values"].shape == (2, 3, 112, 112)
    assert mask[1].all() and not mask[0, 0] and mask[:, -1].all()
    assert (ids == backbone.model.config.image_token_id).sum(1).tolist() == [64, 64]
    text = backbone.processor.tokenizer.decode(ids[0][mask[0].bool()], skip_special_tokens=True)
    assert text.startswith("USER:") and "Is it red?" in text and text.endswith("ASSISTANT:")
    with pytest.raises(ValueError, match="1 images for 2 prompts"):
        backbone.inputs(images[:1], ["a", "b"])


def test_facts(backbone):
    assert (backbone.num_visual_tokens, backbone.num_layers, backbone.family.model_type) == (64, 6, "llava")
    told = backbone.describe()
    assert (
        told["attention"] == "sdpa" and told["dtype"] == "float32" and told["image_padding"] == "centre crop"
    )
    assert "/" not in json.dumps(told), "no path of this machine in a record"


def test_description_follows_the_checkpoint(tiny_checkpoint, tmp_path, backbone):
    copy = tmp_path / backbone.name
    shutil.copytree(tiny_checkpoint, copy)
    assert backbones.load(str(copy)).describe() == backbone.describe()
    assert backbones.load(str(copy), dtype="bfloat16").describe()["dtype"] == "bfloat16"
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("USER", "HUMAN"))
    changed = backbones.load(str(copy)).describe()
    assert {k for k in changed if changed[k] != backbone.describe()[k]} == {"chat_template"}
    model = backbones.load(str(copy)).model
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(copy)
    assert backbones.load(str(copy)).describe()["weights"] != changed["weights"]


def test_missing_checkpoints(tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"unknown backbone 'llava-9'.*pocket-llava"):
        backbones.load("llava-9")
    copy = tmp_path / "c"
    shutil.copytree(tiny_checkpoint, copy)
    with pytest.raises(UserError, match="dtype 'float31'"):
        backbones.load(str(copy), dtype="float31")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vision_feature_select_strategy": "full"}))
    with pytest.raises(UserError, match="vision_feature_select_strategy=default"):
        backbones.load(str(copy))
    (copy / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        backbones.load(str(copy))
    for weights in copy.glob("*.safetensors"):
        weights.rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors"):
        backbones.load(str(copy))


def test_other_models_are_refused(backbone):
    from methods.random import Random

    with (
        pytest.raises(UserError, match="cannot be pruned; use a generative model of: llava"),
        Random(4)(torch.nn.Linear(1, 1)),
    ):
        pass
    with pytest.raises(UserError, match="budget 65 must leave 1 to 64"), Random(65)(backbone.model):
        pass
