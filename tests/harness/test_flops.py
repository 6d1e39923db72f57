"""Three independent counters agree to the last MAC: fvcore, torch.utils.flop_counter, closed form."""

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones.families.llava import Llava
from harness.costs import macs
from harness.costs.closed_form import closed_form_layer


def torch_macs(call) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as meter:
        call()
    return meter.get_total_flops() // 2


@pytest.fixture(scope="module", params=[4, 2, 1], ids=["all heads", "grouped heads", "one key head"])
def model(request):
    return tiny.make_model(tiny.make_tokenizer(), kv_heads=request.param)


@pytest.fixture(scope="module")
def inputs(model):
    ids = torch.tensor([[1] + [model.config.image_token_id] * tiny.VISUAL_TOKENS + [7, 8, 9, 10]])
    pixels = torch.rand(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("n", [1, 17, 69])
def test_decoder_layer(model, n):
    counter, text = macs.ModelCounter(model), model.model.language_model
    embeds = torch.rand(1, n, text.config.hidden_size)
    real = torch_macs(lambda: text(inputs_embeds=embeds, use_cache=True))
    assert counter.decoder_layer(n) * tiny.LAYERS == real
    assert counter.decoder_layer(n) == closed_form_layer(model.config.text_config, n)


@pytest.mark.parametrize("size", [112, 56])
def test_tower(model, size):
    counter, config = macs.ModelCounter(model), model.config.vision_config
    pixels = torch.rand(1, 3, size, size)
    tower = model.model.vision_tower
    real = torch_macs(lambda: tower(pixels, interpolate_pos_encoding=size != config.image_size))
    assert counter.tower(size, size) == real == Llava().tower_macs(config, size, size)


def test_projector(model):
    counter, projector = macs.ModelCounter(model), model.model.multi_modal_projector
    assert counter.projector(64) == torch_macs(lambda: projector(torch.rand(1, 64, 32))) == 64 * 2 * 32 * 32


def test_whole_vanilla_prefill(model, inputs):
    counter = macs.ModelCounter(model)
    parts = counter.tower(112, 112) + counter.projector(64) + counter.llm([64] * tiny.LAYERS, 5)
    assert parts == torch_macs(lambda: macs.prefill(model, inputs))


def test_llava_7b_shapes_without_weights():
    """The published closed forms: CLIP-L/336 190.96 G, projector 12.08 G, vanilla LLM 4.2385 T at 62 text
    tokens.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
        )
    counter = macs.ModelCounter(model)
    assert counter.tower(336, 336) == Llava().tower_macs(vision, 336, 336)
    assert counter.tower(336, 336) / 1e9 == pytest.approx(190.96, abs=0.01)
    assert counter.projector(576) / 1e9 == pytest.approx(12.08, abs=0.01)
    assert counter.llm([576] * 32, 62) / 1e12 == pytest.approx(4.2385, abs=1e-4)
    # FastV, K = 2, 64 kept: 1.0339 T with its row of scores, which is below 0.1 % of that
    assert counter.llm([576] * 2 + [64] * 30, 62) / 1e12 == pytest.approx(1.0339, rel=1e-3)


def test_mean_over_documents_is_not_the_count_at_the_mean(model):
    counter = macs.ModelCounter(model)
    rows = [([64] * tiny.LAYERS, 3), ([10] * tiny.LAYERS, 1)]
    exact = (3 * counter.llm(rows[0][0], 5) + counter.llm(rows[1][0], 5)) / 4
    assert macs.mean_llm(counter, rows, 5) == exact != counter.llm([50] * tiny.LAYERS, 5)


@pytest.mark.parametrize("budget", [16, 5])
@pytest.mark.parametrize("method", ["vanilla", "random", "uniform", "downsample", "visionzip", "fastv"])
def test_a_real_pruned_prefill_is_its_parts_plus_the_methods_own_work(backbone, method, budget):
    from PIL import Image

    from methods import registry

    counter = macs.ModelCounter(backbone.model)
    pruner = registry.build(method, budget=None if method == "vanilla" else budget)
    inputs = backbone.inputs(
        [Image.effect_mandelbrot((96, 80), (-2, -1.5, 1, 1.5), 40).convert("RGB")], ["What is it?"]
    )
    count = macs.count_prefill(counter, backbone, pruner, inputs)
    config = backbone.model.config
    layers = count.visual_tokens
    assert layers[-1] == (64 if method == "vanilla" else budget) or method == "downsample"
    closed = sum(closed_form_layer(config.text_config, v + count.text_tokens) for v in layers)
    assert count.llm == closed + config.text_config.hidden_size * config.text_config.vocab_size
    if method in ("vanilla", "random", "uniform", "downsample"):
        assert count.selection == 0, "these methods compute nothing"
    else:
        assert 0 < count.selection < 0.05 * count.total
    if method == "downsample":
        assert count.tower < counter.tower(112, 112)
    else:
        assert count.tower == counter.tower(112, 112)


def test_an_operator_without_a_count_is_an_error():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.baddbmm(x, x, x)

    with pytest.raises(ArithmeticError, match="baddbmm"):
        macs.traced_macs(Odd(), torch.rand(2, 4, 4))
