"""The recipe: its short cuts equal the ordinary models, it learns, and a stopped training ends as another."""

import csv
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

import backbones
from harness.drawings import wording
from harness.drawings.v2.paint import render
from harness.drawings.v2.scenes import sample_scene
from harness.pocket.recipe import dense_tower, families, language, packing, sizes, tower
from harness.pocket.recipe.drills import LETTERED, Lessons, picks
from harness.pocket.recipe.families import FAMILIES
from harness.pocket.recipe.labels import NAMES, TEXTS, label_cells, label_image
from harness.pocket.recipe.optim import Muon, Optimiser
from harness.pocket.recipe.run import TrainingPlan, train
from harness.pocket.recipe.tokenizer import INSTRUCTIONS

FULL = [(table, dict(table)) for table in (sizes.LANGUAGE, sizes.CLIP, sizes.QWEN_VISION)]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]()


@pytest.fixture(scope="module", autouse=True)
def small():
    """Both backbones with two layers each."""
    patch = pytest.MonkeyPatch()
    patch.setitem(sizes.LANGUAGE, "num_hidden_layers", 2)
    patch.setitem(sizes.CLIP, "num_hidden_layers", 2)
    patch.setitem(sizes.QWEN_VISION, "depth", 2)
    patch.setitem(sizes.QWEN_VISION, "fullatt_block_indexes", [1])
    yield
    patch.undo()


def lessons_on(scenes):
    return [Lessons(s, np.random.default_rng(i)) for i, s in enumerate(scenes)]


@torch.no_grad()
def test_the_clip_tower_with_all_patches_equals_hugging_faces():
    torch.manual_seed(0)
    clip = CLIPVisionModel(sizes.clip_config()).eval()
    families.start_clip(clip)
    images = torch.stack([families.drawn(sample_scene("train", 0, i)) for i in range(2)])
    features, pooled = families.clip_states(clip, images, None)
    theirs = clip(pixel_values=families.normalise(images), output_hidden_states=True)
    torch.testing.assert_close(features, theirs.hidden_states[-2], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(pooled, theirs.pooler_output, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("canvas", [(224, 224), (300, 231), (251, 448)], ids=str)
@torch.no_grad()
def test_the_dense_window_tower_equals_hugging_faces(canvas):
    torch.manual_seed(0)
    tower = Qwen2_5_VisionTransformerPretrainedModel(sizes.qwen_vision_config()).eval()
    families.start_window_tower(tower)
    for block in tower.blocks:  # biases and norms that are not neutral
        block.attn.qkv.bias.data.normal_(0, 0.1)
        block.norm1.weight.data.uniform_(0.8, 1.2)
    scenes = [sample_scene("train", 0, i, canvas=canvas) for i in range(2)]
    patches, grid = FAMILIES["qwen"]().seen(scenes)
    fine, merged = dense_tower.run(tower, patches, grid)
    inputs = sizes.qwen_image_processor()(images=[render(s) for s in scenes], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, grid[0] * 2, grid[1] * 2]] * 2
    theirs = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    torch.testing.assert_close(merged.flatten(0, 1), theirs.pooler_output, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(tower.merger(fine.flatten(0, 1)), theirs.pooler_output, atol=3e-5, rtol=1e-4)


@torch.no_grad()
def test_packed_questions_equal_conversations_of_one_turn(family, tmp_path):
    """The loss over questions dealt to several rows is that of the exported model asked one at a time."""
    from harness.pocket.recipe.export import export

    torch.manual_seed(0)
    model = family.untrained().eval()
    for name, parameter in model.model.language_model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.2 if "embed" in name else 0.1)
    canvas = family.canvas(0, 3, small=False)
    scenes = [sample_scene("train", 0, i, "medium", canvas) for i in range(2)]
    asked = [
        [d for task in ("gqa", "mmbench_cn", "pope", "textvqa") for d in own.questions(task, 1)]
        for own in lessons_on(scenes)
    ]
    encoded = [[language.encode(family, d) for d in own] for own in asked]
    packs = packing.collate(encoded, family.tokenizer.pad_token_id)
    assert packs.ids.shape[1] > 1
    pixels, grid = family.seen(scenes)
    features = family.features(model, pixels, grid)
    loss, score = language.answer_loss(family, model, features, grid, None, packs)
    model.half().float()  # what a checkpoint keeps
    loss_kept, _ = language.answer_loss(
        family, model, family.features(model, pixels, grid), grid, None, packs
    )
    backbone = backbones.load(str(export(family, model, tmp_path / "checkpoint")))
    total, wanted = 0.0, 0
    for scene, own in zip(scenes, asked):
        for drill in own:
            question = "".join(text for text, _ in drill.pieces)
            inputs = backbone.inputs([render(scene)], [question])
            start = inputs["input_ids"].shape[1]
            reply = torch.tensor([*family.ids(f" {drill.pieces[-1][1]}"), family.tokenizer.eos_token_id])
            labels = {start - 1 + k: int(token) for k, token in enumerate(reply)}
            at = start - len(family.ids(family.lead + question + family.tail))
            for i, (text, thought) in enumerate(drill.pieces[:-1]):
                at += len(family.ids(family.lead * (i == 0) + text))
                if thought is not None:
                    labels[at - 1] = family.ids(f" {thought}")[0]
            more = {"attention_mask": torch.ones(1, start + len(reply), dtype=torch.long)}
            more["input_ids"] = torch.cat([inputs["input_ids"], reply[None]], 1)
            if "mm_token_type_ids" in inputs:
                more["mm_token_type_ids"] = (more["input_ids"] == model.config.image_token_id).int()
            logits = backbone.model(**{**inputs, **more}).logits[0]
            expected = torch.tensor(list(labels.values()))
            total += float(torch.nn.functional.cross_entropy(logits[list(labels)], expected, reduction="sum"))
            wanted += len(labels)
    assert sum(n for _, n in score.values()) == sum(map(len, asked)) >= 5
    assert float(loss_kept) == pytest.approx(total / wanted, abs=3e-3)
    assert float(loss) == pytest.approx(float(loss_kept), abs=3e-2)


def test_lettered_questions_are_the_harness_s_with_a_thought_an_option(family):
    seen = 0
    for own in lessons_on([sample_scene("train", 1, i) for i in range(9)]):
        for drill in [
            *(d for t in LETTERED for d in own.questions(t, 1)),
            *own.chooses(4),
            *picks(own.rng, 2),
        ]:
            answer = drill.pieces[-1][1]
            options = [t for text, t in drill.pieces[:-1] if text[2:4] == ". "]
            letter = wording.LETTERS.index(answer)
            assert options == ["no"] * letter + [answer] + ["no"] * (len(options) - letter - 1)
            text = family.lead + "".join(t for t, _ in drill.pieces) + family.tail
            _, ids, targets, *_ = language.encode(family, drill)
            assert [i for i, t in zip(ids, targets) if t == language.IGNORE] == family.ids(text)
            seen += 1
    assert seen > 30


def test_labels_name_the_thing_under_each_cell_and_what_is_written_on_it():
    scene = sample_scene("train", 0, 2)
    assert any(t.host >= 0 for t in scene.things)
    labels, side = label_cells(scene, (24, 24)), 14
    for thing in scene.alone:
        x, y = thing.centre
        cell = int(y // side) * 24 + int(x // side)
        assert NAMES[labels["name"][cell]] == thing.name
        written = [t.name for t in scene.things if t.host >= 0 and scene.things[t.host] == thing]
        if written:
            assert [TEXTS[labels["written"][cell]]] == written
        centre = labels["offset"][cell] + (cell % 24 + 0.5, cell // 24 + 0.5)
        assert np.allclose(centre * side, thing.centre, atol=1e-3)
    assert label_image(scene)["presence"].sum() == len(
        {(t.name, "" if t.is_text else t.colour) for t in scene.things}
    )


def test_tokenizers(family):
    for text in ("Is the star red?", "图中写的是什么单词？", "naïve — 12 ½\n\tx"):
        assert family.tokenizer.decode(family.ids(text)) == text
    for text in (*INSTRUCTIONS, " red", " A", " yes", " 7", " bottom", "猫"):
        assert len(family.ids(text)) == 1
    content = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    from harness.pocket.recipe.export import processor_of

    said = processor_of(family).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    image = "<image>" if family.name == "llava" else "<|image_pad|>"
    assert said == f"{family.head}{image}{family.image_end}{family.lead}Why?{family.tail}"


def test_some_visual_tokens_are_shown_of_every_thing():
    owner = torch.tensor([[0, 0, 0, 1, 1, -1, -1, -1], [0, 1, 2, 2, -1, -1, -1, -1]])
    keep = language.keep_some(owner, 1, 2, seed=3)
    for row, own in zip(keep, owner):
        assert set(own[row].tolist()) >= set(own.tolist()) - {-1}
    assert torch.equal(keep, language.keep_some(owner, 1, 2, seed=3))


def test_a_drill_carries_the_things_that_hold_its_answer(family):
    """Else heads would be taught to look elsewhere."""
    seen = 0
    for scene in (sample_scene("train", 1, i) for i in range(9)):
        lessons = Lessons(scene, np.random.default_rng(0))
        for drill in lessons.drills(40):
            own = [scene.alone[i] for look in drill.looks for i in look]
            ask, answer = drill.pieces[-1]
            if drill.kind in ("hop1", "lookup"):
                (thing,) = own
                said = {thing.name, thing.colour, thing.texture}
                named = (said - {answer}) & set(ask.split())
                assert answer in said and len(named) == (1 if drill.kind == "hop1" else 2)
                seen += 1
            elif drill.kind == "count":
                assert len(own) == int(answer)
        for drill in lessons.questions("gqa", 3):
            assert drill.looks and frozenset.union(*drill.looks) <= set(range(len(scene.alone)))
    assert seen > 30


def test_heads_are_taught_to_look_at_the_tokens_of_the_evidence(family):
    """Two questions of one image that is shown with two tokens of thing 1 and one of 2; the second question
    is about nothing that is shown."""
    encoded = [
        ("hop1", [5, 6], [language.IGNORE, 6], [language.IGNORE] * 2, (frozenset({1}), frozenset({2}))),
        ("hop1", [5, 7, 8], [language.IGNORE] * 2 + [8], [language.IGNORE] * 3, (frozenset({3}),)),
    ]
    packs = packing.collate([encoded], 0)
    owner = torch.tensor([[0, 1, 1, 2, -1]])
    gaze = language.gaze_of(packs, owner, visual=1, prefix=7, depth=8)
    (place,) = (packs.segment[0].flatten() == 1).nonzero()[0]
    assert gaze.asked.tolist() == [7 + int(place)] and gaze.layers == range(2, 6)
    assert gaze.evidence.tolist() == [[[0, 0.5, 0.5, 0, 0]], [[0, 0, 0, 1, 0]]]
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 4, 7 + packs.ids[0].numel(), 8)
    gaze.look(1, q, k, 0.3)
    gaze.look(2, q, k, 0.3)
    shares = (0.3 * torch.einsum("hd,hld->hl", q[0, :2, gaze.asked[0]], k[0, :2, 1:6])).softmax(-1)
    expected = -(shares[0, 1:3].log().mean() + shares[1, 3].log()) / 2
    torch.testing.assert_close(torch.stack(gaze.losses), expected[None])


def test_a_scene_that_no_benchmark_asks_about_is_asked_drills(family):
    """A training stopped three quarters through the stage at the first lone word."""
    scenes = (sample_scene("train", 3, i, "sparse") for i in range(400))
    lone = next(s for s in scenes if len(s.things) == 1 and s.things[0].is_text)
    groups = language.Groups(family, "questions", 0, 0, 100, 1)
    pack = groups.pack(Lessons(lone, np.random.default_rng(0)), 0.9)
    assert pack and packing.collate([pack], 0).ids.shape[1] == 1


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


@pytest.fixture
def one_thread():
    """Split over threads, a product may differ in its last bits from call to call (see docs/pocket.md)."""
    with language.one_thread():
        yield


def test_a_stopped_training_ends_with_the_same_weights_and_log(family, tmp_path, one_thread):
    plan = TrainingPlan(2, 2, 2, 2, tower_batch=1, language_batch=1, align_scenes=8, align_steps=2)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert train(family.name, whole, whole / "checkpoint", plan=plan)
    stops = 0
    while not train(family.name, pieces, pieces / "checkpoint", plan=plan, minutes=0):
        stops += 1
    assert stops == 4, "stopped after every step but the last of each stage"
    a, b = (load_file(x / "checkpoint" / "model.safetensors") for x in (whole, pieces))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for name in ("tower.csv", "drills.csv", "questions.csv", "depth.csv"):
        logs = [list(csv.DictReader((x / name).open())) for x in (whole, pieces)]
        assert [{k: v for k, v in row.items() if k != "seconds"} for row in logs[0]] == [
            {k: v for k, v in row.items() if k != "seconds"} for row in logs[1]
        ]
    with pytest.raises(ValueError, match="steps"):
        train(family.name, pieces, pieces / "checkpoint", plan=TrainingPlan(4, 2, 2, 2, 1, 1))


def test_both_stages_learn(family):
    """On one batch asked again and again, both losses fall fast."""
    torch.manual_seed(0)
    model = family.untrained()
    heads = tower.heads_of(family)
    _, pixels, grid, labels = next(iter(tower.Batches(family, 0, 0, 100, 2)))

    def seeing():
        found = family.read(model, pixels, grid, labels, 1)
        return sum(heads[r.name](r.tokens, r.pooled, r.labels)[0] for r in found)

    optimiser = Optimiser({"tower": family.tower(model), "heads": heads}, family.tower_hidden, 2e-3)
    assert fallen(seeing, optimiser) < 0.8
    language.start(model)
    pixels, grid, owner, packs = language.Groups(family, "questions", 0, 0, 100, 1).drawn(0)
    features = family.features(model, pixels, grid).detach()
    keep = language.keep_some(owner, 4, 16, seed=0)

    def answering():
        return language.answer_loss(family, model, features, grid, keep, packs[0][0])[0]

    modules = {"language": model.model.language_model, "head": model.lm_head}
    assert fallen(answering, Optimiser(modules, ("layers",), 2e-3)) < 0.75


def test_a_step_has_the_gradients_of_all_its_images_at_once(family):
    """Threads that take an image each must not change what is trained, nor what the log says."""
    torch.manual_seed(0)
    model = family.untrained()
    language.start(model)
    family.tower(model).requires_grad_(False)
    pixels, grid, owner, packs = language.Groups(family, "drills", 0, 0, 100, 3).drawn(0)
    features = family.features(model, pixels, grid).detach()
    keep = language.keep_some(owner, 1, 4, seed=0)
    with ThreadPoolExecutor(2) as threads:
        loss, report = language.step_gradients(threads, family, model, features, grid, keep, packs[0])
    stepped = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    one = [
        language.answer_loss(family, model, features[i : i + 1], grid, keep[i : i + 1], own)
        for i, own in enumerate(packs[0])
    ]
    answers = torch.tensor([float((own.wanted != packing.IGNORE).sum()) for own in packs[0]])
    whole = sum(found * n for (found, _), n in zip(one, answers)) / answers.sum()
    whole.backward()
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(stepped[name], p.grad, rtol=1e-3, atol=1e-5)
    asked = sum(score["hop1"][1] for _, score in one if "hop1" in score)
    assert report["hop1"] == sum(score["hop1"][0] for _, score in one if "hop1" in score) / asked


def test_a_deeper_model_says_at_first_what_the_shallow_one_said(family, monkeypatch):
    monkeypatch.setitem(sizes.LANGUAGE, "num_hidden_layers", 6)
    torch.manual_seed(0)
    model = family.untrained()
    language.make_shallow(model)
    language.start(model)
    decoder = model.model.language_model
    for layer in decoder.layers:
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.1)
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        shallow = decoder(input_ids=ids, use_cache=False).last_hidden_state
        language.deepen(model)
        deep = decoder(input_ids=ids, use_cache=True).last_hidden_state
    assert len(decoder.layers) == 6
    torch.testing.assert_close(deep, shallow)


def test_a_word_is_drawn_to_the_visual_token_that_holds_it(family):
    """By the starting values: drawn to itself, as equal queries and keys would have it, it learns nothing of
    the image for hundreds of steps."""
    torch.manual_seed(0)
    model = family.untrained()
    language.start(model)
    decoder = model.model.language_model
    words = decoder.embed_tokens.weight.detach()[100:132]
    word, image = language.markers(words.shape[1])
    held = words - torch.outer(words @ word, word)
    visual = held + held.roll(1, 0) + held.roll(2, 0) + 2.2 * language.MARK * held.norm(dim=1).mean() * image
    attention, heads = decoder.layers[0].self_attn, decoder.config.num_attention_heads
    states = torch.nn.functional.normalize(torch.cat([visual, words]), dim=1) * words.shape[1] ** 0.5
    query = attention.q_proj(states[32:]).unflatten(1, (heads, -1))[:, : heads // 2]
    key = attention.k_proj(states).unflatten(1, (heads, -1))[:, : heads // 2]
    logits = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    share = logits.softmax(-1)
    holding = sum(torch.eye(32).roll(shift, 0) for shift in range(3)).T
    assert float((share[..., :32] * holding).sum(-1).mean().detach()) > 0.2  # by chance: 3 of 64
    assert float(share[..., 32:].sum(-1).mean().detach()) < 0.25


def fallen(loss_of, optimiser, steps=12) -> float:
    """The last loss as a share of the first."""
    losses = []
    for _ in range(steps):
        loss = loss_of()
        loss.backward()
        optimiser.step(0.3)
        losses.append(float(loss.detach()))
    return losses[-1] / losses[0]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_weights_fit_in_16_megabytes(name, monkeypatch):
    for table, full in FULL:
        for key, value in full.items():
            monkeypatch.setitem(table, key, value)
    with torch.device("meta"):
        monkeypatch.setattr(families, "start_clip", lambda tower: None)
        monkeypatch.setattr(families, "start_window_tower", lambda tower: None)
        model = FAMILIES[name]().untrained()
    assert len(model.model.language_model.layers) >= 24
    assert 2 * sum(p.numel() for p in model.parameters()) < 15.95e6


def test_packed_attention_has_the_gradients_of_a_masked_one():
    torch.manual_seed(0)
    images, prefix, rows, size = 2, 5, 3, 6
    segment = torch.randint(0, 3, (images, rows, size)).sort(2).values
    packs = packing.Packs(segment, segment, segment, segment, segment, [], [])
    layout = packing.PackLayout.of(packs, prefix)
    length = prefix + rows * size
    sees = torch.zeros(images, 1, length, length, dtype=torch.bool)
    sees[..., prefix:, :prefix] = True
    sees[..., :prefix, :prefix] = torch.ones(prefix, prefix).tril().bool()
    for b in range(images):
        for r in range(rows):
            own = slice(prefix + r * size, prefix + (r + 1) * size)
            same = segment[b, r][:, None] == segment[b, r]
            sees[b, 0, own, own] = same & torch.ones(size, size).tril().bool()
    q, k, v = (torch.randn(images, 2, length, 8, requires_grad=True) for _ in range(3))
    weight = torch.randn(images, 2, length, 8)
    found = packing._Attention.apply(q, k, v, layout, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, sees, scale=0.3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (found, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
