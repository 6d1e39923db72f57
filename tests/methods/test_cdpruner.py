"""CDPruner: against recordings of the released code, against determinants, and what it needs from outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cost_claims import tiny_tower
from PIL import Image
from safetensors.torch import load_file
from test_divprune_vispruner import Synchronising

from harness.parity import compare, recorded
from methods import clip_text
from methods.base import ImageView
from methods.cdpruner import CDPruner, greedy, scaled
from methods.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
V = load_file(GOLDEN / "cdpruner/vectors.safetensors")
TEXT = GOLDEN / "cdpruner/text"


@pytest.fixture(scope="module")
def model_and_inputs():
    model, inputs = compare._load(GOLDEN)
    return model, compare.with_questions(inputs, TEXT)


@pytest.mark.parametrize("label", ["48", "16"])
def test_recordings(model_and_inputs, label):
    """Questions of one and of two rows together in the batch."""
    vectors = {k: v for k, v in V.items() if k.split(".", 1)[1].rpartition(".")[0] == label}
    rows = list(compare.check(*model_and_inputs, "cdpruner", vectors))
    assert len(rows) == 4 and all(row.agrees for row in rows), [str(row) for row in rows]


def test_text_and_relevance_are_the_recorded_ones():
    tower = recorded.load_recorded_text(TEXT)
    ids = load_file(TEXT / "questions.safetensors")
    assert [len(ids[f"clip_ids.{i}"]) for i in range(4)] == [9, 24, 77, 100]
    embeds = tower.embed([ids[f"clip_ids.{i}"].tolist() for i in range(4)])
    for i, own in enumerate(embeds):
        torch.testing.assert_close(own, V[f"text_unit.{i}"], atol=1e-5, rtol=0)
    relevance = scaled(-(V["image_unit.0"] @ embeds[0].mean(0))[None])[0]
    torch.testing.assert_close(relevance, V["relevance.0"], atol=1e-4, rtol=0)


def view(total=40, width=32, seed=0, question=(1, 2, 3), has_cls=True):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(total + has_cls, width, generator=generator)
    after = torch.randn(5, width, generator=generator)
    return ImageView(
        hidden, (4, total // 4), 2, hidden, lambda x: x, {}, None, has_cls, after, question, lambda x: 2 * x
    )


def build(budget):
    pruner = CDPruner(budget=budget)
    pruner.take(tiny_tower(32))
    return pruner


def test_greedy_is_the_largest_determinant():
    generator = torch.Generator().manual_seed(0)
    tokens, relevance = torch.randn(30, 16, generator=generator), torch.rand(30, generator=generator)
    unit = F.normalize(tokens.double(), dim=-1) * relevance.double()[:, None]
    kernel, chosen = unit @ unit.T, []
    for _ in range(12):
        rest = [i for i in range(30) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    assert greedy(tokens[None], relevance[None], 12)[0].tolist() == chosen


def test_beyond_the_rank_the_most_relevant_follow():
    """Six directions and twenty tokens to keep: the released code keeps fewer, silently."""
    generator = torch.Generator().manual_seed(0)
    tokens, relevance = torch.randn(40, 6, generator=generator), torch.rand(40, generator=generator)
    picked = greedy(tokens[None], relevance[None], 20)[0].tolist()
    assert len(set(picked)) == 20
    rest = sorted(set(range(40)) - set(picked[:6]), key=lambda i: -float(relevance[i]))
    assert picked[6:] == rest[:14]
    assert len(set(greedy(tokens[None], torch.zeros(1, 40), 40)[0].tolist())) == 40


def test_together_as_alone():
    """Each image and question for itself, one loop for all, and nothing for the host to wait for in it."""
    views = [view(seed=s, question=(s + 1, 4, 7)) for s in range(3)] + [view(seed=0, question=(9, 4, 7))]
    pruner = build(12)
    alone = [pruner.select(v).kept for v in views]
    assert all(torch.equal(a, b.kept) for a, b in zip(alone, pruner.select_all(views)))
    assert not torch.equal(alone[0], alone[3]), "the question decides"
    tokens, relevance = torch.randn(3, 40, 16), torch.rand(3, 40)
    with Synchronising() as three:
        greedy(tokens, relevance, 12)
    with Synchronising() as one:
        greedy(tokens[:1], relevance[:1], 12)
    assert three.calls <= one.calls <= 12 * 24, "the loop is shared, its steps are short"


def test_without_clip_the_words_behind_the_image_decide():
    one = view(has_cls=False)
    kept = CDPruner(budget=12).select(one).kept
    relevance = F.cosine_similarity(one.features, one.text_after.mean(0), dim=-1)
    assert kept.tolist() == greedy(one.features[None], scaled(relevance[None]), 12)[0].sort().values.tolist()


def test_answering_instructions_are_no_question():
    asked = []
    tower = tiny_tower(32)
    tower.tokenizer = lambda text: asked.append(text) or {"input_ids": [1, 2]}
    pruner = CDPruner(budget=4)
    pruner.take(tower)
    pruner.select(view(question="Is it red?\nAnswer the question using a single word or phrase."))
    assert asked == ["Is it red?"]
    with pytest.raises(UserError, match="reads the question as text"):
        pruner.select(view(question=None))


@pytest.fixture(scope="module")
def clip_folder(backbone, tmp_path_factory):
    """A CLIP model whose vision tower is the tiny backbone's."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    vision = backbone.model.config.vision_config.to_dict()
    text = {
        "vocab_size": len(backbone.processor.tokenizer) + 8, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    backbone.processor.tokenizer.save_pretrained(folder)
    return folder


def run(backbone, inputs, pruner, **options):
    with torch.inference_mode(), pruner(backbone.model, **options) as trace:
        backbone.model(**inputs)
    return [own[0].tolist() for own in trace.kept]


def test_with_a_clip_folder(backbone, clip_folder):
    pictures = [Image.effect_mandelbrot((96, 96), (-2, -1.5, 1, 1.5), n).convert("RGB") for n in (20, 60)]
    questions = ["Is there a red box?", "What?"]
    inputs = backbone.inputs(pictures, questions)
    pruner = CDPruner(budget=10, clip=str(clip_folder))
    noted = run(backbone, inputs, pruner)
    assert noted == run(backbone, inputs, pruner, questions=questions), "Backbone.inputs notes the questions"
    assert noted != run(backbone, inputs, pruner, questions=["Something else?", "And else?"])
    for i in range(2):
        alone = backbone.inputs(pictures[i : i + 1], questions[i : i + 1])
        assert run(backbone, alone, pruner) == noted[i : i + 1]
    assert len(pruner.resources(backbone.model)["text_tower"]) == 16
    with pytest.raises(RuntimeError, match="3 questions were given for a batch of 2"):
        run(backbone, inputs, pruner, questions=["a", "b", "c"])
    unknown = {**inputs, "input_ids": inputs["input_ids"].clone()}
    unknown["input_ids"][:, -1] += 1
    with pytest.raises(UserError, match="reads the question as text"):
        run(backbone, unknown, pruner)


def test_outside_weights_that_are_missing_or_others(backbone, qwen, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_text, "_cached", lambda: None)
    with pytest.raises(
        UserError, match=r"knows of openai/clip-vit-large-patch14-336 alone, which is another"
    ):
        CDPruner(budget=10).resources(backbone.model)
    large = type("Large", (), {"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 336})
    with pytest.raises(UserError, match=r"hf download openai/clip-vit-large-patch14-336"):
        clip_text.find(None, large, "cdpruner")
    with pytest.raises(UserError, match="has another vision tower than this backbone"):
        clip_text.find(str(clip_folder), type("Other", (large,), {}), "cdpruner")
    with pytest.raises(UserError, match="holds no CLIP model"):
        CDPruner(budget=10, clip=str(tmp_path)).resources(backbone.model)
    assert CDPruner(budget=10).resources(qwen.model) == {}, "Qwen2.5-VL needs none"


def test_a_folder_without_text_tower(clip_folder, tmp_path):
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(clip_folder, tmp_path / "half")
    weights = load_file(tmp_path / "half/model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "text_projection" not in k},
        tmp_path / "half/model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="no CLIP text tower in"):
        clip_text.load(tmp_path / "half")
