"""The trainers' short cuts equal the ordinary model: same tower features, same loss for packed questions."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel

from harness.pocket.data import documents
from harness.pocket.data.scenes import render, sample_scene
from harness.pocket.recipe import train_language, train_vision
from harness.pocket.recipe.optim import Muon
from harness.pocket.recipe.shapes import llava_config, vision_config
from harness.pocket.recipe.tokenizer import INSTRUCTIONS, PROMPT_HEAD, PROMPT_TAIL, build_tokenizer
from harness.pocket.recipe.vision_labels import NAMES, SIDE, label_image, label_patches


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
    ids_of = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    drills = []
    for i in range(2):
        scene, rng = sample_scene("train", 0, i), np.random.default_rng(i)
        tasks = ("gqa", "mmbench_cn", "pope")[: 3 - i]
        drills.append([train_language.asked(t, documents.MAKERS[t](scene, rng)[0]) for t in tasks])
    head = torch.tensor(tokenizer.encode(PROMPT_HEAD))
    packs = [[questions._encode(drill) for drill in pack] for pack in drills]
    packed = train_language.collate_packs(packs, tokenizer.pad_token_id)
    loss, score = train_language.forward(model, head, features, None, packed)
    total, wanted, thoughts = 0.0, 0, 0
    for i, pack in enumerate(drills):
        for drill in pack:
            question = "".join(text for text, _ in drill.pieces)
            reply = [*ids_of(" " + drill.pieces[-1][1]), tokenizer.eos_token_id]
            ids = tokenizer.encode(f"{PROMPT_HEAD}{'<image>' * 576}{question}") + reply
            start = len(ids) - len(reply) - len(ids_of(question))
            labels, at = {}, start
            for text, thought in drill.pieces[:-1]:
                at += len(ids_of(text))
                if thought is not None:
                    labels[at - 1] = ids_of(" " + thought)[0]
            thoughts += len(labels)
            labels |= {len(ids) - len(reply) - 1 + k: token for k, token in enumerate(reply)}
            given = torch.tensor([ids])
            logits = model(
                input_ids=given, attention_mask=torch.ones_like(given), pixel_values=pixels[i : i + 1]
            ).logits[0]
            expected = torch.tensor(list(labels.values()))
            total += float(torch.nn.functional.cross_entropy(logits[list(labels)], expected, reduction="sum"))
            wanted += len(labels)
    assert thoughts >= 2
    assert float(loss) == pytest.approx(total / wanted, abs=1e-4)
    assert sum(n for _, n in score.values()) == 5


@pytest.mark.parametrize("task", train_language.LETTERED)
def test_lettered_questions_are_the_harness_s_with_a_thought_an_option(task, tokenizer):
    ids_of = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    seen = 0
    for index in range(30):
        for row in documents.MAKERS[task](sample_scene("train", 1, index), np.random.default_rng(index)):
            drill, answer = train_language.asked(task, row), documents.target(task, row)
            question = "\n" + documents.prompt(task, row) + PROMPT_TAIL
            assert "".join(text for text, _ in drill.pieces) == question
            assert [i for text, _ in drill.pieces for i in ids_of(text)] == ids_of(question)
            options = [thought for text, thought in drill.pieces[:-1] if text[2:4] == ". "]
            letter = documents.LETTERS.index(answer)
            assert options == ["no"] * letter + [answer] + ["no"] * (len(options) - letter - 1)
            assert drill.pieces[-1][1] == answer
            seen += 1
    assert seen > 20


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
