"""The trainers' short cuts equal the ordinary Qwen2.5-VL: same tower, same loss for packed questions."""

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from harness.pocket.data import documents
from harness.pocket.data.scenes import render, sample_scene
from harness.pocket.recipe import train_language as llava_language
from harness.pocket.recipe.drills import drills
from harness.pocket.recipe.qwen import train_language, train_vision, warm_start
from harness.pocket.recipe.qwen.dense_tower import run
from harness.pocket.recipe.qwen.export import export
from harness.pocket.recipe.qwen.shapes import image_processor, qwen_config, vision_config
from harness.pocket.recipe.qwen.tokenizer import (
    CHAT_TEMPLATE,
    IMAGE_END,
    PROMPT_HEAD,
    PROMPT_TAIL,
    build_tokenizer,
    special_ids,
)
from harness.pocket.recipe.vision_labels import NAMES


def scenes(canvas, number=2, **more):
    return [sample_scene("train", 0, i, canvas=canvas, **more) for i in range(number)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


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


def test_tokenizer_extends_pocket_llavas(tokenizer):
    old = warm_start.pocket_llava_tokenizer()
    vocabulary = tokenizer.get_vocab()
    assert all(vocabulary[token] == i for token, i in old.get_vocab().items())
    for text in (PROMPT_HEAD, IMAGE_END, PROMPT_TAIL):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(PROMPT_HEAD)) == 3 and len(tokenizer.encode(PROMPT_TAIL)) == 4
    content = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=CHAT_TEMPLATE,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert asked == f"{PROMPT_HEAD}<|image_pad|>{IMAGE_END}Why?{PROMPT_TAIL}"


@torch.no_grad()
@pytest.mark.parametrize("shown", [None, 5])
def test_packed_questions_equal_single_turn_conversations(tokenizer, shown):
    model = small_model(tokenizer)
    canvas = (231, 300)
    found = scenes(canvas, fewest=5)
    groups = train_language.Groups(tokenizer, 0, 0, torch.ones(()))
    asked = []
    for i, scene in enumerate(found):
        rng = np.random.default_rng(i)
        tasks = ("gqa", "mmbench_cn", "pope")[: 3 - i]
        own = [llava_language.asked(t, documents.MAKERS[t](scene, rng)[0]) for t in tasks]
        asked.append(own + drills(scene, rng, 1))
    packed = llava_language.collate_packs(
        [[groups._encode(drill) for drill in own] for own in asked], tokenizer.pad_token_id
    )
    patches, grid = train_vision.prepared(found)
    assert grid == (11, 8)
    fine, _ = run(model.model.visual, patches, grid)
    keep = None if shown is None else torch.tensor([[3, 11, 40, 41, 87], [0, 1, 2, 60, 86]])
    prompt = train_language.Prompt(tokenizer)
    loss, score = train_language.forward(model, prompt, fine, grid, keep, packed)
    total, wanted = 0.0, 0
    for i, own in enumerate(asked):
        for drill in own:
            logits, labels = ordinary(model, tokenizer, found[i], drill, None if keep is None else keep[i])
            expected = torch.tensor(list(labels.values()))
            total += float(torch.nn.functional.cross_entropy(logits[list(labels)], expected, reduction="sum"))
            wanted += len(labels)
    assert float(loss) == pytest.approx(total / wanted, abs=2e-4)
    assert sum(n for _, n in score.values()) == 7


def ordinary(model, tokenizer, scene, drill, keep):
    """Logits [L, V] of one question by Hugging Face's own forward, and the wanted token at each place."""
    pieces = [(text.replace(" ASSISTANT:", PROMPT_TAIL), thought) for text, thought in drill.pieces]
    question = "".join(text for text, _ in pieces).removeprefix("\n")
    reply = tokenizer.encode(f" {pieces[-1][1]}<|im_end|>")
    inputs = image_processor()(images=render(scene), return_tensors="pt")
    tokens = int(inputs["image_grid_thw"].prod()) // 4
    ids = tokenizer.encode(f"{PROMPT_HEAD}{'<|image_pad|>' * tokens}{IMAGE_END}{question}") + reply
    given = torch.tensor([ids])
    visual = given == model.config.image_token_id
    full, _ = model.model.get_rope_index(
        given, mm_token_type_ids=visual.int(), image_grid_thw=inputs["image_grid_thw"]
    )
    features = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    x = model.model.language_model.embed_tokens(given)
    x[visual] = features
    column = torch.ones(len(ids), dtype=torch.bool)
    if keep is not None:
        column[visual[0]] = torch.zeros(tokens, dtype=torch.bool).index_fill(0, keep, True)
        logits = model(
            inputs_embeds=x[:, column],
            position_ids=full[:, :, column],
            attention_mask=torch.ones(1, int(column.sum())),
        ).logits[0]
    else:
        logits = model(
            input_ids=given, mm_token_type_ids=visual.int(), attention_mask=torch.ones_like(given), **inputs
        ).logits[0]
    labels, at = {}, len(logits)
    at -= len(reply)
    labels |= {at - 1 + k: token for k, token in enumerate(reply)}
    for text, thought in reversed(pieces):
        if thought is not None and at < len(logits) - len(reply):
            labels[at - 1] = tokenizer.encode(f" {thought}")[0]
        at -= len(tokenizer.encode(text))
    return logits, labels


def small_model(tokenizer):
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    config = qwen_config(len(tokenizer), special_ids(tokenizer))
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.text_config.initializer_range = 0.2
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    train_vision.initialise(model.model.visual)
    return model


@torch.no_grad()
def test_warm_start_speaks_as_pocket_llava_and_exports(tokenizer, tower, tmp_path):
    from safetensors.torch import save_file

    import backbones

    for folder in ("vision", "language"):
        (tmp_path / "build" / folder).mkdir(parents=True)
    save_file(tower.state_dict(), tmp_path / "build" / "vision" / "tower.safetensors")
    model = warm_start.build_model(tokenizer, tmp_path / "build" / "vision" / "tower.safetensors").eval()
    llava = warm_start.pocket_llava()
    warm_start.inherit(model, llava, tokenizer)
    ids = torch.tensor([warm_start.pocket_llava_tokenizer().encode("USER: Is a cat an animal? ASSISTANT:")])
    theirs = llava(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    ours = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs, atol=1e-4, rtol=1e-4)

    before = model.model.visual.merger.mlp[2].weight.clone()
    assert warm_start.align(model, llava, 0, scenes=8) < 1
    assert not torch.equal(before, model.model.visual.merger.mlp[2].weight)

    parts = {
        "merger": model.model.visual.merger,
        "language": model.model.language_model,
        "head": model.lm_head,
    }
    for name, module in parts.items():
        save_file(module.state_dict(), tmp_path / "build" / "language" / f"{name}.safetensors")
    folder = export(tmp_path / "build", tmp_path / "pocket-qwen")
    assert sum(f.stat().st_size for f in folder.iterdir()) < 40e6
    backbone = backbones.load(str(folder))
    image = render(scenes((300, 231))[0])
    inputs = backbone.inputs([image], ["Why?"])
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 11 * 8
    ids = backbone.model.generate(**inputs, max_new_tokens=2)
    assert ids.shape[1] <= inputs["input_ids"].shape[1] + 2
