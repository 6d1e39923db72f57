"""The latency probe: parts add up, and time goes to the part that spends it."""

from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from harness import latency
from harness.timer import Timer


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
    monkeypatch.setattr("harness.timer.time", clock)
    return clock


def pruner_with(hook_at, work=lambda *_: None):
    """A pruner stand-in that only hangs `work` on a module."""

    @contextmanager
    def pruner(model):
        handle = hook_at(model, work)
        try:
            yield
        finally:
            handle.remove()

    return pruner


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
    measured = latency.measure_once(backbone, pruner_with(hook_at, clock.work), inputs)
    expected = {"vision": 0.0, "selection": 0.0, "llm": 0.0, "total": 20.0, part: 20.0}
    assert measured == pytest.approx(expected)


def test_work_in_the_image_features_call_outside_of_the_tower_is_selection(backbone, inputs, clock):
    @contextmanager
    def pruner(model):
        real = model.model.get_image_features

        def slow(*args, **kwargs):
            clock.work()
            return real(*args, **kwargs)

        model.model.get_image_features = slow
        try:
            yield
        finally:
            del model.model.get_image_features

    measured = latency.measure_once(backbone, pruner, inputs)
    assert measured == pytest.approx({"vision": 0, "selection": 20, "llm": 0, "total": 20})


def test_real_time_passes_in_every_part(backbone, inputs):
    from methods import registry

    measured = latency.measure_once(backbone, registry.build("visionzip", budget=16), inputs)
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
        def pruner(model):
            order.append(name)
            yield

        return pruner

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
    from methods import registry

    monkeypatch.setattr("backbones.engine.Engine.__enter__", lambda self: pytest.fail("hooks on vanilla"))
    assert latency.measure_once(backbone, registry.build("vanilla"), inputs)["total"] > 0
