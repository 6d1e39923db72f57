"""The hook engine against an independent decoder, at batch size 1 and in left-padded batches."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import alone, generate, make_inputs
from probes import Adaptive, AdaptiveInPlace, Backwards, Both, Pyramid, Reader, Recycler, Unequal
from reference import Reference

from methods.base import ImageView
from methods.fastv import FastV
from methods.random import Random
from methods.vanilla import Vanilla

PRUNERS = [
    Vanilla(), FastV(budget=9), FastV(budget=20, k=3), Random(budget=12), Adaptive(budget=1),
    AdaptiveInPlace(budget=1), Backwards(budget=10), Reader(budget=9), Pyramid(budget=5), Unequal(budget=1),
    Recycler(budget=1), Both(budget=6),
]  # fmt: skip


def expected(model, inputs, pruner, steps=5):
    """Tokens, logits and kept of one sample by the reference decoder; all before it is done by hand."""
    inner, ids = model.model, inputs["input_ids"][0]
    tower = inner.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    hidden = tower.hidden_states[-2][0]
    embeds, visual = (
        inner.language_model.embed_tokens(ids),
        (ids == model.config.image_token_id).nonzero()[:, 0],
    )
    tokens, kept = inner.multi_modal_projector(hidden[1:]), []
    positions = torch.arange(len(ids))
    if pruner.selects:
        text = torch.cat([embeds[: visual[0]], embeds[visual[-1] + 1 :]])
        signals = {}
        for s in pruner.signals:
            layer = inner.vision_tower.encoder.layers[s.layer]
            linear = {"keys": layer.self_attn.k_proj, "values": layer.self_attn.v_proj}[s.kind]
            signals[s] = linear(layer.layer_norm1(tower.hidden_states[s.layer - 1][0]))
        view = ImageView(
            hidden, (8, 8), 4, inputs["pixel_values"][0], inner.multi_modal_projector, signals, text
        )
        answer = pruner.select(view)
        kept = [answer.kept]
        tokens = answer.tokens if answer.projected else inner.multi_modal_projector(hidden[1:][answer.kept])
        if pruner.positions == "original":
            positions = torch.cat([positions[: visual[0]], visual[answer.kept], positions[visual[-1] + 1 :]])
        else:
            positions = torch.arange(len(text) + len(tokens))
    prompt = torch.cat([embeds[: visual[0]], tokens, embeds[visual[-1] + 1 :]])
    visual = visual[0] + torch.arange(len(tokens))
    stages = pruner.stages(64, 6) if pruner.acts else []
    new, logits, by_stage = Reference(model).greedy(prompt, positions, visual, stages, steps)
    if kept and by_stage:
        by_stage = [kept[0][k] for k in by_stage]
    return new, logits, kept + by_stage


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: type(p).__name__ + str(p.parameters().get("k", "")))
@torch.inference_mode()
def test_equals_reference_alone_and_in_a_batch(model, batch, pruner):
    together = generate(model, batch, pruner)
    for row in range(3):
        one = alone(batch, row)
        tokens, logits, kept = expected(model, one, pruner)
        for got, b in ((generate(model, one, pruner), 0), (together, row)):
            assert torch.equal(got[0][b], tokens)
            torch.testing.assert_close(got[1][b][:, : logits.shape[1]], logits, atol=5e-5, rtol=1e-4)
            assert [k.tolist() for k in got[2].kept[b]] == [k.tolist() for k in kept]


@torch.inference_mode()
def test_pruning_changes_the_answer(model, batch):
    """Otherwise the test above could not fail."""
    vanilla = generate(model, batch)[1]
    for pruner in PRUNERS[1:]:
        assert (generate(model, batch, pruner)[1] - vanilla).abs().max() > 0.1, pruner


def test_trace_counts_visual_tokens_of_every_layer(model, batch):
    trace = generate(model, batch, Pyramid(budget=5))[2]
    assert trace.visual_tokens.dtype == torch.int64
    assert trace.visual_tokens.tolist() == [[64, 40, 17, 17, 5, 5]] * 3
    trace = generate(model, batch, Both(budget=6))[2]
    assert trace.visual_tokens.tolist() == [[32, 32, 32, 6, 6, 6]] * 3
    trace = generate(model, batch, Adaptive(budget=1))[2]
    counts = trace.visual_tokens
    assert len({*counts[:, 0].tolist()}) > 1, "the images were meant to keep different numbers"
    assert (counts == counts[:, :1]).all()
    assert generate(model, batch, Vanilla())[2].visual_tokens.tolist() == [[64] * 6] * 3
    assert Vanilla()(model).trace.visual_tokens.shape == (0, 6)


@pytest.mark.parametrize("pruner", [Vanilla(), FastV(kept=64), Random(budget=64), FastV(), Random()], ids=str)
def test_keeping_everything_is_vanilla_to_the_bit(model, batch, pruner):
    for inputs in (alone(batch, 0), batch):
        ours, theirs = generate(model, inputs, pruner), generate(model, inputs)
        assert torch.equal(ours[0], theirs[0])
        if len(inputs["input_ids"]) == 1:
            assert torch.equal(ours[1], theirs[1])
        else:
            torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)


def hooks(model):
    return sum(
        len(getattr(m, kind))
        for m in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    )


@pytest.mark.parametrize(
    "pruner", [FastV(budget=9), Backwards(budget=9), Both(budget=6)], ids=lambda p: p.name
)
def test_nothing_is_left_behind(model, batch, pruner):
    before, count, attributes = generate(model, batch)[1], hooks(model), set(vars(model.model))
    generate(model, batch, pruner)
    with pytest.raises(KeyError), pruner(model):
        assert hooks(model) > count
        model(**batch)
        raise KeyError
    assert (hooks(model), set(vars(model.model))) == (count, attributes)
    assert torch.equal(generate(model, batch)[1], before)


def test_a_failing_method_leaves_nothing_behind(model, batch):
    count = hooks(model)

    class Broken(Adaptive):
        def prepare(self, model):
            raise OSError("no weights")

    with pytest.raises(OSError), Broken(budget=1)(model):
        pass
    assert hooks(model) == count
    generate(model, batch, FastV(budget=9))  # and the model is free again


@torch.inference_mode()
def test_plain_forward_and_own_decode_loop(model, batch):
    """`model(**inputs)` and one token at a time with the returned cache: the same logits as generate()."""
    for pruner in (FastV(budget=9), Random(budget=9), AdaptiveInPlace(budget=1), Pyramid(budget=5)):
        one = alone(batch, 1)
        tokens, logits, _ = generate(model, one, pruner)
        with pruner(model):
            out = model(**one, use_cache=True)
            for step in range(4):
                torch.testing.assert_close(out.logits[:, -1], logits[:, step], atol=2e-5, rtol=1e-4)
                out = model(
                    input_ids=tokens[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True
                )
        if pruner.selects:
            with pruner(model):
                uncached = model(**one, use_cache=False)
            torch.testing.assert_close(uncached.logits[:, -1], logits[:, 0], atol=2e-5, rtol=1e-4)


def test_features_computed_ahead(model, batch):
    """The way the latency and FLOP counters call it."""
    for pruner in (Vanilla(), FastV(budget=9), Random(budget=9), Reader(budget=9)):
        with torch.inference_mode(), pruner(model):
            features = model.model.get_image_features(pixel_values=batch["pixel_values"])
            text = {k: batch[k] for k in ("input_ids", "attention_mask")}
            logits = model(
                **text, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1
            ).logits
        torch.testing.assert_close(
            logits[:, 0], generate(model, batch, pruner)[1][:, 0], atol=5e-5, rtol=1e-4
        )


def test_several_images_and_none(model):
    """Two images, none and one in a batch: each sample as it is alone."""
    inputs = make_inputs(model, [(5, 9), (70, 9), (3, 4)])
    image, places = model.config.image_token_id, model.config.image_seq_length
    ids = inputs["input_ids"].clone()
    first = int((ids[0] == image).nonzero()[0])
    ids[0, first - places - 2 : first - 2] = image  # a second image before the first, two text tokens between
    ids[0, first - places - 4 : first - places - 2] = 7
    mask = inputs["attention_mask"].clone()
    mask[0, first - places - 4 :] = 1
    ids[1, ids[1] == image] = 9
    pixels = torch.cat([inputs["pixel_values"][:1] * 0.5, inputs["pixel_values"][[0, 2]]])
    for pruner in (
        FastV(budget=9),
        Random(budget=9),
        Adaptive(budget=1),
        AdaptiveInPlace(budget=1),
        Reader(budget=9),
    ):
        together = generate(model, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}, pruner)
        for row, own in enumerate(([0, 1], [], [2])):
            valid = mask[row].bool()
            one = {"input_ids": ids[row, valid][None], "attention_mask": mask[row, valid][None]}
            if own:
                one["pixel_values"] = pixels[own]
            tokens, logits, trace = generate(model, one, pruner)
            assert torch.equal(together[0][row], tokens[0])
            torch.testing.assert_close(together[1][row], logits[0], atol=5e-5, rtol=1e-4)
            assert torch.equal(together[2].visual_tokens[row], trace.visual_tokens[0])
            if not own:
                assert torch.equal(tokens, generate(model, one)[0])


@pytest.mark.parametrize(
    "pruner", [FastV(budget=9), Random(budget=9), Reader(budget=9), Pyramid(budget=5)], ids=lambda p: p.name
)
@torch.inference_mode()
def test_beams_of_a_sample_share_its_tokens(model, batch, pruner):
    options = dict(max_new_tokens=4, do_sample=False, num_beams=3)
    with pruner(model):
        together = model.generate(**batch, **options)[:, -4:]
    for row in range(3):
        with pruner(model):
            assert torch.equal(model.generate(**alone(batch, row), **options)[0, -4:], together[row])


def test_what_is_not_supported_says_so(model, batch):
    pruner, one = FastV(budget=9), alone(batch, 0)
    with pruner(model), pytest.raises(RuntimeError, match="already on this model"), pruner(model):
        pass
    with pruner(model), pytest.raises(RuntimeError, match="static"):
        model.generate(**one, max_new_tokens=2, cache_implementation="static")
    with pruner(model), pytest.raises(RuntimeError, match="chunked"):
        model.generate(**one, max_new_tokens=2, prefill_chunk_size=16)
    with pruner(model), pytest.raises(RuntimeError, match="use_cache=True"):
        model.generate(**one, max_new_tokens=2, use_cache=False)
    with pruner(model), pytest.raises(RuntimeError, match="on the left"):
        model(**{**batch, "attention_mask": batch["attention_mask"].flip(1)})
    cache = model(**one, use_cache=True).past_key_values
    with pruner(model), pytest.raises(RuntimeError, match="another prefill"):
        model(input_ids=one["input_ids"][:, -1:], past_key_values=cache)
    features = model.model.get_image_features(pixel_values=one.pop("pixel_values"))
    with Random(budget=9)(model), pytest.raises(RuntimeError, match="inside of the `with`"):
        model(**one, mm_encoder_outputs={"image": features})
