"""Questions about one image, answered behind one prefill of the image: the tokens of the plain way."""

from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from backbones.engine import shared_prefix
from methods import registry

METHODS = [
    "vanilla", "uniform", "random", "visionzip", "prumerge", "holov", "downsample",
    "fastv", "fastv:k=1", "pdrop", "sparsevlm", "dart",
]  # fmt: skip
QUESTIONS = ["What is it?", "Is there a red star on the left of the word?", "How many?", "Why is it so?"]


@contextmanager
def closing(hook):
    try:
        yield
    finally:
        hook.remove()


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
    plain, visual, logits = [], [], []
    head = own.model.get_output_embeddings()
    heard = lambda: head.register_forward_hook(lambda m, a, out: logits.append(out))  # noqa: E731
    expected = []
    for image in images:
        for question in QUESTIONS:
            inputs = own.inputs([image], [question])
            with torch.inference_mode(), pruner()(own.model) as trace, closing(heard()):
                ids = own.model.generate(**inputs, max_new_tokens=6, do_sample=False)
                visual.append(trace.visual_tokens[0].tolist())
            plain.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
            expected.append(logits[0][0, -1])
            logits.clear()
    rows = [i for i in range(len(images)) for _ in QUESTIONS]
    batch = own.inputs([images[r] for r in rows], QUESTIONS * len(images))
    apart = shared_prefix.split(own.model, batch, rows)
    assert apart.rows == rows
    prefix = shared_prefix.read(own.model, pruner(), apart.prefixes)
    with closing(heard()):
        found = shared_prefix.generate(own.model, prefix, rows, apart.texts, max_new_tokens=6)
    torch.testing.assert_close(logits[0], torch.stack(expected), rtol=0, atol=1e-5)
    assert found.visual_tokens.tolist() == visual
    for ours, theirs in zip(found.tokens.tolist(), plain):
        assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("method", ["stepprune", "cdpruner", "oracle"])
def test_methods_that_read_the_text_before_the_language_model_are_not_shared(method, backbone):
    assert not shared_prefix.can_share(backbone.model, registry.build(method, budget=16))


def test_what_cuts_and_reads_no_text_ahead_runs_the_image_once_per_batch(backbone):
    """Layers ahead of the cut see the image's columns once; each question brings its own few."""
    images = pictures([(56, 56)])
    batch = backbone.inputs(images * 4, QUESTIONS)
    seen = []
    first = backbone.adapter.layers[0]
    hook = first.register_forward_pre_hook(lambda m, a: seen.append(tuple(a[0].shape[:2])))
    with closing(hook):
        apart = shared_prefix.split(backbone.model, batch, [0, 0, 0, 0])
        prefix = shared_prefix.read(backbone.model, registry.build("fastv", budget=16), apart.prefixes)
        shared_prefix.generate(backbone.model, prefix, apart.rows, apart.texts, max_new_tokens=1)
    longest = max(len(text) for text in apart.texts)
    assert seen == [(1, apart.prefixes["input_ids"].shape[1]), (4, longest)]


def test_settings_that_change_logits_are_not_shared(backbone, monkeypatch):
    monkeypatch.setattr(backbone.model.generation_config, "repetition_penalty", 1.05)
    assert not shared_prefix.can_share(backbone.model, registry.build("vanilla"))
