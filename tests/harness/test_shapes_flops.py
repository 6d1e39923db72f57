"""True shapes on the meta device: three counters agree to the last MAC, published arithmetic follows."""

import re
import time

import pytest
import torch
from three_counters import ThreeCounters, torch_macs

from backbones import shapes
from harness import published
from harness.check import costs
from harness.cli import app
from harness.costs import plan
from harness.costs.closed_form import closed_form_head, closed_form_layer
from harness.costs.macs import ModelCounter
from harness.costs.shape_counter import ShapeCounter
from methods import registry
from methods.errors import UserError

#: parameters of the published checkpoints, in 1e9
PARAMETERS = {
    "llava-1.5-7b": 7.06, "llava-1.5-13b": 13.35, "qwen2.5-vl-3b": 3.75, "qwen2.5-vl-7b": 8.29,
    "qwen2-vl-2b": 2.21, "qwen2-vl-7b": 8.29,
}  # fmt: skip


@pytest.fixture(scope="module", params=shapes.available())
def counters(request):
    return ThreeCounters(shapes.load(request.param))


def test_the_shapes_are_there():
    assert set(shapes.available()) == set(PARAMETERS)
    for name in PARAMETERS:
        assert shapes.load(name).visual_tokens == 576


def test_the_models_have_the_published_size(counters):
    total = sum(p.numel() for p in counters.model.parameters()) / 1e9
    assert total == pytest.approx(PARAMETERS[counters.shape.name], abs=0.005)
    assert all(p.is_meta for p in counters.model.parameters())


@pytest.mark.parametrize("n", [1, 63, 126, 638])
def test_a_decoder_layer(counters, n):
    fvcore, torch_, closed = counters.layer_counts(n)
    assert fvcore == torch_ == closed > 0


def test_the_tower_and_the_projector(counters):
    for counts in (counters.tower_counts(*counters.shape.image_pixels), counters.projector_counts(100)):
        assert counts[0] == counts[1] == counts[2] > 0


def test_a_windowed_tower_whose_image_is_no_multiple_of_the_window():
    """46 x 46 patches: windows of 64, 56 and 49 patches' share; 1414.7 GMAC with the merger (first counted by
    a script of its own)."""
    counters = ThreeCounters(shapes.load("qwen2.5-vl-7b"))
    fvcore, torch_, closed = counters.tower_counts(644, 644)
    assert fvcore == torch_ == closed
    assert (closed + counters.projector_counts(23 * 23)[0]) / 1e9 == pytest.approx(1414.7, abs=0.1)
    sizes = counters.shape.family.windows(counters.shape.config.vision_config, 644, 644)
    assert sum(sizes) == 46 * 46 and sorted(set(sizes)) == [36, 48, 64] and len(sizes) == 36


@pytest.mark.parametrize("spec", ["vanilla", "fastv", "pdrop"])
def test_a_whole_pruned_language_model(counters, spec):
    """Every layer of the unmodified model one after the other, its input cut to the plan's length in
    between, and the head at one position: torch's counter around all of it."""
    shape, model = counters.shape, counters.model
    pruner = registry.build(spec, budget=None if spec == "vanilla" else 64)
    made = plan.make(shape.config, pruner, (24, 24), 35, 27)
    head_dim, width = counters.fvcore.head_dim, counters.fvcore.text.hidden_size

    def prefill():
        hidden = torch.empty(1, 576 + 62, width, device="meta")
        for layer, n in zip(model.model.language_model.layers, made.visual_tokens):
            hidden = hidden[:, : n + 62]
            cos = torch.empty(1, n + 62, head_dim, device="meta")
            hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, cos))
        return model.lm_head(hidden[:, -1:])

    text = shape.config.text_config
    closed = sum(closed_form_layer(text, n + 62) for n in made.visual_tokens) + closed_form_head(text)
    assert torch_macs(prefill) == closed == counters.fvcore.llm(made.visual_tokens, 62)


def test_the_language_models_own_forward(counters):
    inner, text = counters.model.model.language_model, counters.shape.config.text_config
    embeds = torch.empty(1, 100, text.hidden_size, device="meta")
    real = torch_macs(lambda: inner(inputs_embeds=embeds, use_cache=True))
    assert real == counters.shape.layers * closed_form_layer(text, 100)


def test_a_counter_that_is_off_is_reported(monkeypatch):
    shape = shapes.load("llava-1.5-7b")
    traced = ModelCounter(shape.model())
    monkeypatch.setattr(traced, "decoder_layer", lambda n: 10)
    counter = ShapeCounter(shape, 62, traced=traced)
    counter.count("vanilla", None)
    closed = closed_form_layer(shape.config.text_config, 638)
    assert counter.checked == 3, "a layer, the tower, the projector"
    assert counter.disagreements == [f"decoder layer at 638 tokens: fvcore 10, closed form {closed} MAC"]


# ---- published arithmetic


def test_published_costs_are_as_the_registry_expects():
    found = list(costs.findings(published.load()))
    assert not [f for f in found if f.status == "FAIL"]
    by = {(f.where, f.what): (f.status, float(f.found)) for f in found}
    t3 = "table3: {}, {} tokens".format
    assert by[t3("vanilla", 576), "TFLOPs of vanilla"] == ("ok", pytest.approx(8.883, abs=0.001))
    assert by[t3("fastv", 64), "TFLOPs of fastv:k=2"][0] == "known"
    assert by[t3("fastv", 64), "TFLOPs of fastv:k=2,kept=57"] == ("ok", pytest.approx(2.388, abs=0.001))
    theoretical = {f.what: float(f.found) for f in found if f.where.startswith("claims")}
    assert theoretical["T of vanilla by pdrop"] == pytest.approx(3.82, abs=0.005)
    assert theoretical["T of pdrop:schedule=stock by pdrop"] == pytest.approx(1.78, abs=0.005)
    beside = {f.where: float(f.found) for f in found if f.where.startswith("table3, beside")}
    assert beside["table3, beside: holov, 64 tokens"] == pytest.approx(2.153, abs=0.001)


@pytest.mark.parametrize("name, tmac", [("llava-1.5-7b", 4.2385), ("qwen2.5-vl-7b", 4.2454)])
def test_vanilla_language_models(name, tmac):
    """First counted by a script of its own, at 62 text tokens with the head at one position."""
    count = ShapeCounter(shapes.load(name), 62).count("vanilla", None)
    assert count.llm / 1e12 == pytest.approx(tmac, abs=1e-4)


# ---- the command


def test_the_command_prints_the_tables(capsys):
    started = time.process_time()
    arguments = ["--budget", "64", "--methods", "fastv,sparsevlm,pdrop:schedule=stock", "--visual-only-macs"]
    assert app.main(["flops", "--backbone", "llava-1.5-7b", *arguments]) == 0
    assert time.process_time() - started < 30
    out = capsys.readouterr().out
    assert "2 FLOPs per multiply-accumulate" in out and "62 text tokens" in out
    assert re.search(r"^\| fastv +\| 576 x2, 64 x30 +\|", out, re.M)
    assert re.search(r"^\| sparsevlm +\| 576 x3, 82 x4, 32 x9, 18 x16 +\|", out, re.M)
    assert re.search(r"^\| pdrop:schedule=stock +\|.* 1\.777 +\|$", out, re.M)
    assert "8.89" in out and "equal to the last MAC" in out


def test_methods_that_cannot_plan_are_left_out_with_the_reason(capsys, monkeypatch):
    def broken(self, image):
        raise RuntimeError("no weights")

    monkeypatch.setattr(registry.available()["uniform"], "select", broken)
    assert (
        app.main(
            ["flops", "--backbone", "qwen2.5-vl-7b", "--budget", "64", "--methods", "uniform,visionzip,fastv"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "uniform is left out: it cannot plan on random tensors (RuntimeError: no weights)" in out
    assert re.search(r"^\| visionzip +\| 64 x28", out, re.M)
    assert re.search(r"^\| fastv +\| 576 x2, 64 x26", out, re.M)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--backbone", "gpt"], "known: llava-1.5-13b"),
        (["--methods", "nonsense"], "unknown method"),
        (["--budget", "0"], "budget"),
        (["--budget", "577"], "576 visual tokens"),
        (["--image-size", "100"], "multiple of 14"),
        (["--image-size", "448"], "336 pixels only"),
        (["--backbone", "qwen2.5-vl-7b", "--image-size", "100"], "multiple of 28"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, says):
    assert app.main(["flops", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_checkpoints_are_recognised_by_name():
    assert shapes.named_like("some/where/llava-1.5-7b-hf").name == "llava-1.5-7b"
    assert shapes.named_like("pocket-llava") is None
    with pytest.raises(UserError, match="no shape"):
        shapes.load("pocket-llava")
