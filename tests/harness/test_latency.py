"""The latency probe: parts add up, and time goes to the part that spends it."""

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from harness.costs import latency
from harness.costs.timer import Timer
from methods import registry
from methods.base import Pruner, Selection
from methods.errors import UserError


@pytest.fixture(scope="module")
def inputs(backbone):
    return backbone.inputs([Image.new("RGB", (80, 80), "red")], ["What color is it?"])


class Clock:
    """Stands in for `time`: it passes only where a test says so, so a busy machine changes nothing."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def work(self, *_) -> None:
        """20 ms go by."""
        self.now += 0.020


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("harness.costs.timer.time", clock)
    return clock


@dataclass
class StandIn:
    """For a pruner that cuts at layer 2: `on` is its context manager."""

    on: object
    acts: bool = True

    def stages(self, visual_tokens, layers):
        return [SimpleNamespace(layer=2)]

    def __call__(self, model):
        return self.on(model)


def pruner_with(hook_at, work=lambda *_: None):
    """A pruner that only hangs `work` on a module."""

    @contextmanager
    def on(model):
        handle = hook_at(model, work)
        try:
            yield
        finally:
            handle.remove()

    return StandIn(on)


def milliseconds(backbone, pruner, inputs, decode_tokens=0):
    return latency.measure_once(backbone, pruner, inputs, decode_tokens).milliseconds


PLACES = {
    "tower": ("vision", lambda m, f: m.model.vision_tower.encoder.layers[0].register_forward_pre_hook(f)),
    "projector": ("vision", lambda m, f: m.model.multi_modal_projector.linear_1.register_forward_pre_hook(f)),
    "before the LLM": ("selection", lambda m, f: m.model.language_model.register_forward_pre_hook(f)),
    "before a layer": (
        "selection",
        lambda m, f: m.model.language_model.layers[2].register_forward_pre_hook(f),
    ),
    "in a layer": ("llm", lambda m, f: m.model.language_model.layers[2].mlp.register_forward_pre_hook(f)),
    "head": ("llm", lambda m, f: m.lm_head.register_forward_pre_hook(f)),
}


@pytest.mark.parametrize("place", PLACES)
def test_time_is_charged_to_the_part_that_spends_it(backbone, inputs, clock, place):
    part, hook_at = PLACES[place]
    measured = milliseconds(backbone, pruner_with(hook_at, clock.work), inputs)
    expected = {"vision": 0.0, "selection": 0.0, "llm": 0.0, "total": 20.0, "wall": 20.0, part: 20.0}
    assert measured == pytest.approx(expected)


def test_a_layer_where_nothing_is_cut_has_no_selection(backbone, inputs, clock):
    hook_at = lambda m, f: m.model.language_model.layers[3].register_forward_pre_hook(f)  # noqa: E731
    assert milliseconds(backbone, pruner_with(hook_at, clock.work), inputs)["llm"] == pytest.approx(20)


@pytest.mark.parametrize("place", ["tower", "projector", "head"])
def test_time_inside_of_a_part_of_a_method_that_reads_text_counts_once(backbone, inputs, clock, place):
    """Such a method selects, and has its tokens projected, in the language model's pre-hook."""

    @dataclass
    class Reader(Pruner):
        name = "reader"
        reads_text = True

        def select(self, image):
            clock.work()
            return Selection(torch.arange(16))

    part, hook_at = PLACES[place]
    handle = hook_at(backbone.model, clock.work)
    try:
        measured = milliseconds(backbone, Reader(budget=16), inputs)
    finally:
        handle.remove()
    expected = {"vision": 0.0, "selection": 20.0, "llm": 0.0, "total": 40.0, "wall": 40.0, part: 20.0}
    assert measured == pytest.approx(expected)


def test_a_span_inside_of_another_counts_once(clock):
    """As Qwen's merger, which is inside of its tower."""
    split = latency.Split(Timer("cpu"))
    with split.span("llm"):
        clock.work()
        with split.span("vision"):
            clock.work()
            with split.span("vision"):
                clock.work()
            clock.work()
        clock.work()
    assert split.parts() == pytest.approx({"vision": 60, "selection": 0, "llm": 40})


def test_decoding_is_timed_by_the_token_and_behind_the_prefill(backbone, inputs, clock):
    pruner = pruner_with(PLACES["head"][1], clock.work)
    measured = milliseconds(backbone, pruner, inputs, decode_tokens=3)
    assert measured["decode"] == pytest.approx(20) and measured["total"] == pytest.approx(20)


@pytest.mark.parametrize("spec", ["vanilla", "visionzip", "fastv", "pdrop:schedule=kept"])
def test_tokens_decoded_are_those_of_generate(backbone, inputs, spec, monkeypatch):
    pruner = registry.build(spec, budget=16)
    with torch.no_grad(), latency.put_on(pruner, backbone.model):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        expected = backbone.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    seen = []
    record = lambda module, args, kwargs: seen.append(kwargs["input_ids"])  # noqa: E731
    handle = backbone.model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        latency.measure_once(backbone, pruner, inputs, decode_tokens=4)
    finally:
        handle.remove()
    assert torch.cat(seen[1:], 1)[0].tolist() == expected.tolist()


def test_cache_is_measured_as_it_is(backbone, inputs):
    config = backbone.model.config.text_config
    n = inputs["input_ids"].shape[1]
    column = 2 * config.num_key_value_heads * config.head_dim * 4
    whole = latency.measure_once(backbone, registry.build("vanilla"), inputs)
    cut = latency.measure_once(backbone, registry.build("fastv", budget=16), inputs)
    assert (whole.kv_bytes, whole.cached_tokens) == (n * config.num_hidden_layers * column, n)
    left = [n, n] + [n - 64 + 16] * (config.num_hidden_layers - 2)
    assert cut.kv_bytes == sum(left) * column and cut.cached_tokens == pytest.approx(sum(left) / len(left))


def test_a_batch_of_copies(backbone, inputs):
    two = {k: torch.cat([v, v]) for k, v in inputs.items()}
    one = latency.measure_once(backbone, registry.build("visionzip", budget=16), inputs)
    both = latency.measure_once(backbone, registry.build("visionzip", budget=16), two)
    assert both.kv_bytes == 2 * one.kv_bytes and both.cached_tokens == one.cached_tokens


def test_only_fused_attention_is_compared(backbone, inputs):
    config = backbone.model.config.text_config
    latency.check_fused(backbone.model)
    config._attn_implementation = "eager"
    try:
        with pytest.raises(UserError, match="sdpa"):
            latency.compare(backbone, [registry.build("vanilla")], [inputs], repeats=1)
    finally:
        config._attn_implementation = "sdpa"


def test_memory_and_energy_of_one_image(backbone, inputs, monkeypatch):
    """What a GPU would tell, for a batch of two."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 160)
    gpu = SimpleNamespace(joules=lambda run, seconds: (run() and 8.0, "energy counter"))
    monkeypatch.setattr("harness.costs.energy.find", lambda device: gpu)
    result = latency.Latency()
    two = {k: torch.cat([v, v]) for k, v in inputs.items()}
    latency._memory_and_energy(backbone, registry.build("uniform", budget=16), two, result)
    assert (result.peak_bytes, result.prefill_bytes) == (160, 60)
    assert (result.joules, result.joules_by) == (4.0, "energy counter")


def test_statistics_are_of_the_repeats_alone(backbone, inputs, clock):
    """Every measurement takes a second longer than the one before; the two that warm up are not counted."""
    calls = []

    def work(*_):
        calls.append(1)
        clock.now += len(calls)

    (result,) = latency.compare(backbone, [pruner_with(PLACES["head"][1], work)], [inputs], repeats=11)
    expected = {"p10": 4000, "median": 8000, "p90": 12000}
    assert result.summary()["llm"] == pytest.approx(expected)
    assert result.summary()["wall"] == pytest.approx(expected)


def test_percentiles():
    assert latency.percentiles(range(1, 12)) == {"p10": 2, "median": 6, "p90": 10}


def test_work_in_the_image_features_call_outside_of_the_tower_is_selection(backbone, inputs, clock):
    @contextmanager
    def on(model):
        real = model.model.get_image_features

        def slow(*args, **kwargs):
            clock.work()
            return real(*args, **kwargs)

        model.model.get_image_features = slow
        try:
            yield
        finally:
            del model.model.get_image_features

    measured = milliseconds(backbone, StandIn(on), inputs)
    assert measured == pytest.approx({"vision": 0, "selection": 20, "llm": 0, "total": 20, "wall": 20})


def test_real_time_passes_in_every_part(backbone, inputs):
    measured = milliseconds(backbone, registry.build("visionzip", budget=16), inputs)
    assert all(value > 0 for value in measured.values())
    assert measured["vision"] + measured["selection"] + measured["llm"] == pytest.approx(measured["total"])


def test_probes_leave_no_hooks(backbone, inputs):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules())

    before = hooks()
    latency.measure_once(backbone, pruner_with(PLACES["head"][1]), inputs)
    assert hooks() == before


def test_methods_are_measured_in_turn(backbone, inputs):
    order = []

    def named(name):
        @contextmanager
        def on(model):
            order.append(name)
            yield

        return StandIn(on)

    results = latency.compare(backbone, [named("a"), named("b")], [inputs], repeats=4)
    warm = 2 * latency.WARM_UP["cpu"]
    assert order[warm:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    summary = results[0].summary()
    assert (
        summary["repeats"] == 4
        and summary["total"]["p10"] <= summary["total"]["median"] <= summary["total"]["p90"]
    )
    assert summary["peak_bytes"] is None and summary["joules"] is None


def test_timer_counts_milliseconds(clock):
    timer = Timer("cpu")
    first = timer.mark()
    clock.work()
    assert timer.between(first, timer.mark()) == pytest.approx(20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_timer_on_cuda_sees_device_time():
    timer = Timer("cuda")
    x = torch.rand(4096, 4096, device="cuda")
    first = timer.mark()
    for _ in range(20):
        x = x @ x
    last = timer.mark()
    torch.cuda.synchronize()
    assert timer.between(first, last) > 1


def test_vanilla_is_the_model_as_it_comes(backbone, inputs, monkeypatch):
    monkeypatch.setattr(
        "backbones.engine.hooks.Engine.__enter__", lambda self: pytest.fail("hooks on vanilla")
    )
    measured = milliseconds(backbone, registry.build("vanilla"), inputs)
    assert measured["total"] > 0 and measured["selection"] == 0
