"""Questions about one image, answered behind one prefill of the image: the tokens of the plain way."""

import pytest
import torch
from PIL import Image

from backbones.engine import shared_prefix
from methods import registry

METHODS = ["vanilla", "uniform", "random", "visionzip", "prumerge", "holov", "downsample"]
QUESTIONS = ["What is it?", "Is there a red star on the left of the word?", "How many?", "Why is it so?"]


def pictures(sizes):
    generator = torch.Generator().manual_seed(3)
    return [
        Image.fromarray(torch.randint(0, 255, (h, w, 3), generator=generator, dtype=torch.uint8).numpy())
        for h, w in sizes
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_greedy_tokens_are_those_of_the_plain_way(method, family, backbone, qwen, monkeypatch):
    own = {"llava": backbone, "qwen": qwen}[family]
    monkeypatch.setattr(own.model.generation_config, "suppress_tokens", None)  # another test's wish
    sizes = [(80, 112), (112, 56)] if family == "qwen" else [(56, 56), (56, 56)]
    images = pictures(sizes)
    budget = None if method == "vanilla" else 0.3
    pruner = lambda: registry.build(method, budget=budget)  # noqa: E731
    assert shared_prefix.can_share(own.model, pruner())
    plain, visual = [], []
    for image in images:
        for question in QUESTIONS:
            inputs = own.inputs([image], [question])
            with torch.inference_mode(), pruner()(own.model) as trace:
                ids = own.model.generate(**inputs, max_new_tokens=6, do_sample=False)
                visual.append(trace.visual_tokens[0].tolist())
            plain.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    rows = [i for i in range(len(images)) for _ in QUESTIONS]
    batch = own.inputs([images[r] for r in rows], QUESTIONS * len(images))
    firsts = [rows.index(i) for i in range(len(images))]
    inputs, texts = shared_prefix.split(batch, firsts, own.model.config.image_token_id)
    prefix = shared_prefix.read(own.model, pruner(), inputs)
    assert [prefix.visual_tokens[r].tolist() for r in rows] == visual
    found = shared_prefix.generate(own.model, prefix, rows, texts, max_new_tokens=6)
    for ours, theirs in zip(found.tolist(), plain):
        assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("method", ["fastv", "pdrop", "sparsevlm"])
def test_methods_inside_the_language_model_are_not_shared(method, backbone):
    assert not shared_prefix.can_share(backbone.model, registry.build(method, budget=16))


def test_settings_that_change_logits_are_not_shared(backbone, monkeypatch):
    monkeypatch.setattr(backbone.model.generation_config, "repetition_penalty", 1.05)
    assert not shared_prefix.can_share(backbone.model, registry.build("vanilla"))
