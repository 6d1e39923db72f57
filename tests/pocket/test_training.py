"""The trainers' short cuts equal the ordinary model: same tower features, same loss for packed questions."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel

from backbones.pocket import train_language, train_vision
from backbones.pocket.optim import Muon
from backbones.pocket.shapes import llava_config, vision_config
from backbones.pocket.tokenizer import INSTRUCTIONS, PROMPT_HEAD, PROMPT_TAIL, build_tokenizer
from backbones.pocket.vision_labels import NAMES, SIDE, label_image, label_patches
from harness.pocket8 import documents
from harness.pocket8.scenes import render, sample_scene


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "<s>", "</s>", "<pad>")]
    config = llava_config(len(tokenizer), *ids)
    config.text_config.num_hidden_layers = 2
    config.text_config.initializer_range = 0.2
    model = LlavaForConditionalGeneration(config).eval()
    train_vision.initialise(model.model.vision_tower)
    return model


@pytest.fixture(scope="module")
def images():
    return torch.stack(
        [
            torch.from_numpy(np.asarray(render(sample_scene("train", 0, i))).transpose(2, 0, 1).copy())
            for i in range(2)
        ]
    )


@torch.no_grad()
def test_tower_with_all_patches_equals_clip(images):
    tower = CLIPVisionModel(vision_config()).eval()
    train_vision.initialise(tower)
    features, pooled = train_vision.hidden_states(tower, images, None)
    theirs = tower(pixel_values=train_vision.normalise(images), output_hidden_states=True)
    torch.testing.assert_close(features, theirs.hidden_states[-2], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(pooled, theirs.pooler_output, atol=2e-5, rtol=1e-4)
    some = torch.arange(SIDE * SIDE).expand(2, -1)
    torch.testing.assert_close(
        train_vision.hidden_states(tower, images, some)[0], features, atol=2e-5, rtol=1e-4
    )


@torch.no_grad()
def test_packed_questions_equal_single_turn_conversations(model, tokenizer, images):
    pixels = train_vision.normalise(images)
    features = train_vision.hidden_states(model.model.vision_tower, images, None)[0][:, 1:]
    questions = train_language.Questions(tokenizer, 0, 0, torch.ones(()))
    packs, texts = [], []
    for i in range(2):
        scene, rng = sample_scene("train", 0, i), np.random.default_rng(i)
        rows = [
            (task, documents.MAKERS[task](scene, rng)[0]) for task in ("gqa", "mmbench_cn", "pope")[: 3 - i]
        ]
        packs.append(
            [
                questions._encode(
                    task, "\n" + documents.prompt(task, row) + PROMPT_TAIL, documents.target(task, row)
                )
                for task, row in rows
            ]
        )
        texts.append([(documents.prompt(task, row), documents.target(task, row)) for task, row in rows])
    head = torch.tensor(tokenizer.encode(PROMPT_HEAD))
    packed = train_language.collate_packs(packs, tokenizer.pad_token_id)
    loss, score = train_language.forward(model, head, features, None, packed)
    total, asked = 0.0, 0
    for i, conversation in enumerate(texts):
        for prompt, answer in conversation:
            reply = [*tokenizer.encode(" " + answer, add_special_tokens=False), tokenizer.eos_token_id]
            text = f"{PROMPT_HEAD}{'<image>' * 576}\n{prompt}{PROMPT_TAIL}"
            ids = torch.tensor([tokenizer.encode(text) + reply])
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels[i : i + 1]
            ).logits[0, -len(reply) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(reply), reduction="sum"))
            asked += len(reply)
    assert float(loss) == pytest.approx(total / asked, abs=1e-4)
    assert sum(n for _, n in score.values()) == 5


def test_labels_name_the_thing_under_each_patch():
    scene = sample_scene("train", 0, 3, fewest=6)
    labels = label_patches(scene)
    for thing in scene.things:
        left, top, width, height = thing.box
        patch = int((top + height / 2) // 14) * SIDE + int((left + width / 2) // 14)
        assert NAMES[labels["name"][patch]] == thing.name
        column, row = patch % SIDE + 0.5, patch // SIDE + 0.5
        centre = labels["offset"][patch] + (column, row)
        assert np.allclose(centre * 14, thing.centre)
    assert (labels["name"] == len(NAMES)).sum() > 200
    assert label_image(scene)["count"] == len(scene.things)
    assert label_image(scene)["presence"].sum() == len(
        {(t.kind, t.name, t.colour if not t.is_text else "") for t in scene.things}
    )


def test_tokenizer(tokenizer):
    for text in ("Is the star red?", "图中写的是什么单词？", "naïve — 12 ½\n\tx"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    for text in (*INSTRUCTIONS, " red", " A", " yes", " 7", "猫"):
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 1
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id
    again = build_tokenizer()
    assert again.get_vocab() == tokenizer.get_vocab()


def test_muon_step_is_orthogonal_and_lowers_the_loss():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(24, 40) * 0.1)
    before, target = weight.detach().clone(), torch.randn(24, 40)
    optimiser = Muon([weight], lr=0.01)
    (weight - target).square().sum().backward()
    optimiser.step()
    update = before - weight.detach()
    singular = torch.linalg.svdvals(update / (0.01 * 0.2 * 40**0.5))
    assert singular.min() > 0.5 and singular.max() < 1.3
    assert (weight - target).square().sum() < (before - target).square().sum()
