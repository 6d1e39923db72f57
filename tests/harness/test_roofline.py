"""Estimates from datasheets: what they are made of."""

import pytest

from backbones import shapes
from harness.costs import fitted, random_weights, roofline
from harness.costs.launches import LaunchCounter
from harness.costs.shape_counter import ShapeCounter
from methods import registry

SHAPE = shapes.load("llava-1.5-7b")


@pytest.fixture(scope="module")
def launches():
    return LaunchCounter(SHAPE, text_tokens=62)


def test_slowest_term_of_each_part_counts():
    device = roofline.Device("toy", "toy", bandwidth=1e9, flops=1e12, launch=1e-6, source="")
    work = roofline.Work(
        weights={"vision": 2e6, "selection": 0, "llm": 1e6},
        flops={"vision": 1e9, "selection": 0, "llm": 3e9},
        launches={"vision": 100, "selection": 500, "llm": 4000},
    )
    assert work.milliseconds(device) == pytest.approx(
        {"weights": 3.0, "flops": 4.0, "launches": 4.6, "eager": 2 + 0.5 + 4, "graph": 2 + 0.5 + 3}
    )
    unknown = roofline.Work(work.weights, work.flops, None).milliseconds(device)
    assert unknown == {"weights": 3.0, "flops": 4.0, "launches": None, "eager": None, "graph": None}


def test_devices_as_in_their_datasheets():
    rates = {d.name: (d.bandwidth / 1e9, d.flops / 1e12) for d in roofline.devices()}
    assert rates == {"RTX A6000": (768, 154.8), "A100 80GB": (2039, 312), "H100 SXM": (3350, 989)}
    assert all(d.source for d in roofline.devices())


def test_launches_of_the_7b_shape(launches):
    """41 a decoder layer with fused attention; what a prefill launches does not depend on its length."""
    vanilla = launches.count(registry.build("vanilla"))
    assert vanilla == {"vision": 345, "selection": 0, "llm": 32 * 41 + 3}
    longer = LaunchCounter(SHAPE, text_tokens=20).count(registry.build("vanilla"))
    assert longer == vanilla
    fastv = launches.count(registry.build("fastv", budget=64))
    assert fastv["llm"] == vanilla["llm"] and 0 < fastv["selection"] < 150


def test_factors_fitted_on_some_published_rows_are_tested_on_the_others(launches, monkeypatch):
    monkeypatch.setattr("harness.costs.launches.LaunchCounter", lambda *shape: launches)
    estimates = roofline.Roofline(SHAPE, text_tokens=62)
    fit = fitted.fit(estimates)
    assert [row.name for row in fit.rows if row.fitted] == ["vanilla", "PyramidDrop"]
    vanilla, pdrop = fit.rows[:2]
    for part, factor in fit.factors.items():
        own = [row.estimated[part] / row.measured[part] for row in (vanilla, pdrop)]
        assert factor == pytest.approx((own[0] * own[1]) ** 0.5)
        assert vanilla.corrected[part] == pytest.approx(vanilla.estimated[part] / factor)
    tests = [row for row in fit.rows if not row.fitted]
    assert len(tests) == 3
    assert all(abs(row.off(part)) < 0.15 for row in tests for part in fit.factors), "rows never fitted"
    assert all(row.estimated["llm"] < 0.5 * row.measured["llm"] for row in fit.rows), "the datasheet alone"
    total = fit.corrected(estimates.work("vanilla", None))
    assert total == pytest.approx(sum(vanilla.corrected.values()), rel=0.01)
    assert fitted.fit(type("Other", (), {"shape": shapes.load("qwen2.5-vl-7b")})) is None


def test_a_loop_launches_once_a_step(launches):
    few, many = (launches.count(registry.build("stepprune", budget=b))["selection"] for b in (16, 32))
    assert many - few > 16 * 20


def test_narrow_keeps_what_launches_depend_on():
    for name, depth in (("llava-1.5-7b", "num_hidden_layers"), ("qwen2.5-vl-7b", "depth")):
        shape = shapes.load(name)
        narrow = random_weights.narrow(shape)
        assert narrow.layers == shape.layers and narrow.visual_tokens == shape.visual_tokens == 576
        assert len({getattr(s.config.vision_config, depth) for s in (narrow, shape)}) == 1


def test_work_is_that_of_flops_and_of_the_weights(monkeypatch):
    monkeypatch.setattr(
        "harness.costs.launches.LaunchCounter.count", lambda self, pruner: dict.fromkeys(roofline.PARTS, 1)
    )
    found = roofline.Roofline(SHAPE, text_tokens=62)
    count = ShapeCounter(SHAPE, 62).count("fastv", 64)
    work = found.work("fastv", 64, batch=3)
    assert sum(work.flops.values()) == 3 * 2 * count.total
    model = SHAPE.model()
    read = sum(p.numel() for p in model.parameters()) - model.model.language_model.embed_tokens.weight.numel()
    assert sum(work.weights.values()) == 2 * read
    assert work.weights["llm"] / 1e9 == pytest.approx(13.2, abs=0.05)
    vanilla = found.work("vanilla", None).milliseconds(roofline.devices()[0])
    assert vanilla["flops"] == pytest.approx(8.883e3 / 154.8, rel=1e-3)
