"""Ways of calling a model under a pruner: right, or refused by name at prefill, for all methods alike."""

from __future__ import annotations

import threading

import pytest
import torch
from PIL import Image

from methods import registry
from methods.errors import UserError

#: before the language model, inside it by the previous layer's rows, by its own, by many rows
METHODS = ["uniform", "fastv", "pdrop:schedule=kept", "sparsevlm", "dart", "divprune"]
BUDGET = 6
FAMILIES = ["llava", "qwen2_5_vl"]
every = pytest.mark.parametrize("spec", METHODS)
both = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def asked(backbone, qwen):
    image = Image.effect_mandelbrot((120, 90), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    return {b.model.config.model_type: (b, b.inputs([image], ["What is it?"])) for b in (backbone, qwen)}


def generated(model, inputs, pruner, **options):
    with torch.inference_mode(), pruner(model) as trace:
        ids = model.generate(**inputs, **{"max_new_tokens": 4, "do_sample": False, **options})
    return ids.tolist(), [k.tolist() for own in trace.kept for k in own]


@every
@both
def test_generating_without_a_cache_is_refused(asked, family, spec):
    backbone, inputs = asked[family]
    with pytest.raises(RuntimeError, match="use_cache=True"):
        generated(backbone.model, inputs, registry.build(spec, BUDGET), use_cache=False)


@every
@both
def test_one_forward_without_a_cache_keeps_the_same_tokens(asked, family, spec):
    backbone, inputs = asked[family]
    found = []
    for use_cache in (True, False):
        with torch.inference_mode(), registry.build(spec, BUDGET)(backbone.model) as trace:
            logits = backbone.model(**inputs, use_cache=use_cache).logits[:, -1]
        found.append((logits, [k.tolist() for k in trace.kept[0]]))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-5, rtol=1e-4)


@every
@both
@pytest.mark.parametrize("last", [1, 3])
def test_chunked_prefill_is_refused_whatever_the_last_chunk(asked, family, spec, last):
    backbone, inputs = asked[family]
    chunk = inputs["input_ids"].shape[1] - last
    with pytest.raises(RuntimeError, match="chunked prefill is not supported"):
        generated(backbone.model, inputs, registry.build(spec, BUDGET), prefill_chunk_size=chunk)


@every
@both
def test_labels_are_refused(asked, family, spec):
    backbone, inputs = asked[family]
    with (
        pytest.raises(RuntimeError, match="labels= is not supported"),
        registry.build(spec, BUDGET)(backbone.model),
    ):
        backbone.model(**inputs, labels=inputs["input_ids"])
    with registry.build("vanilla")(backbone.model):
        assert backbone.model(**inputs, labels=inputs["input_ids"]).loss > 0


@every
@both
@pytest.mark.parametrize("wrap", ["peft", "compile", "compiled in place"])
def test_wrapped_models_are_pruned_like_the_model_inside(asked, family, spec, wrap):
    backbone, inputs = asked[family]
    model, plain = backbone.model, generated(backbone.model, inputs, registry.build(spec, BUDGET))
    if wrap == "peft":
        peft = pytest.importorskip("peft", reason="peft is not installed")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*[qkv]_proj"))
    elif wrap == "compile":
        wrapped = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        wrapped = model
    try:
        assert generated(wrapped, inputs, registry.build(spec, BUDGET)) == plain
        with torch.inference_mode(), registry.build(spec, BUDGET)(wrapped) as trace:
            wrapped(**inputs)
        assert trace.visual_tokens[0, -1] <= BUDGET or spec == "sparsevlm"
        one, other = registry.build(spec, 4)(model), registry.build(spec, 4)(wrapped)
        with one, pytest.raises(RuntimeError, match="already on"), other:
            pass
    finally:
        model._compiled_call_impl = None
        if wrap == "peft":
            assert wrapped.unload() is model


def test_a_layer_that_was_compiled_and_run_before_is_pruned_and_then_as_before(asked):
    backbone, inputs = asked["llava"]
    model = backbone.model
    cut = model.model.language_model.layers[2]
    plain = generated(model, inputs, registry.build("fastv", BUDGET))
    cut.compile(backend="eager")
    try:
        with torch.inference_mode():
            full = model(**inputs).logits
            assert generated(model, inputs, registry.build("fastv", BUDGET)) == plain
            torch.testing.assert_close(model(**inputs).logits, full)
    finally:
        cut._compiled_call_impl = None


def test_peft_adapters_with_virtual_tokens_are_refused(asked):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import copy

    model = copy.deepcopy(asked["llava"][0].model)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=64, num_transformer_submodules=1,
        num_attention_heads=4, num_layers=6,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"PROMPT_TUNING.* adds tokens of its own"):
        registry.build("fastv", BUDGET)(peft.get_peft_model(model, config))


def test_two_threads_at_once_are_refused_and_one_after_the_other_is_right(asked):
    backbone, inputs = asked["llava"]
    model, pruner = backbone.model, registry.build("fastv", BUDGET)
    plain, errors, answers = generated(model, inputs, pruner), [], []
    inside, leave = threading.Event(), threading.Event()

    def hold(module, args):
        inside.set()
        leave.wait(20)

    def ask():
        try:
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            answers.append(ids.tolist())
        except RuntimeError as error:
            errors.append(str(error))

    with pruner(model):
        handle = model.model.language_model.layers[1].register_forward_pre_hook(hold)
        first = threading.Thread(target=ask)
        first.start()
        assert inside.wait(20)
        handle.remove()
        ask()
        leave.set()
        first.join()
        assert len(errors) == 1 and "two threads" in errors[0]
        other = threading.Thread(target=ask)
        other.start()
        other.join()
    assert answers == [plain[0]] * 2


@both
def test_a_prompt_without_images(asked, family):
    backbone, _ = asked[family]
    image = Image.new("RGB", (60, 40), "red")
    inputs = backbone.inputs([[]], ["text"])
    assert "pixel_values" not in inputs and inputs["input_ids"].shape[0] == 1
    with torch.inference_mode():
        wanted = backbone.model.generate(**inputs, max_new_tokens=3, do_sample=False).tolist()
    for spec in METHODS:
        assert generated(backbone.model, inputs, registry.build(spec, BUDGET), max_new_tokens=3)[0] == wanted
    mixed = backbone.inputs([[], image], ["text", "What is it?"])
    with torch.inference_mode(), registry.build("uniform", 2)(backbone.model) as trace:
        backbone.model(**mixed)
    assert trace.visual_tokens[:, -1].tolist() == [0, 2]
