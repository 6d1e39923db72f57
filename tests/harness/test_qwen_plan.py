"""A method's plan on Qwen2.5-VL, made without weights, is what a real pruned prefill of the tiny checkpoint
does: counts, and work to the last MAC."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backbones import shapes
from harness.costs import macs, plan
from harness.costs.shape_counter import ShapeCounter
from methods import learned, registry
from methods.base import Signal, cls_attention
from methods.errors import UserError
from methods.random import Random

PAGE = (Path(__file__).parents[2] / "docs/methods.md").read_text(encoding="utf-8")
GRID = (5, 8)
SPECS = [
    "vanilla", "random", "uniform", "downsample", "visionzip", "holov", "holov:alpha=0", "prumerge",
    "divprune", "vispruner", "dart", "cdpruner",
    "prumerge_plus", "fastv", "pdrop:schedule=kept", "sparsevlm",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(qwen):
    noise = np.random.default_rng(0).integers(0, 255, (28 * GRID[0], 28 * GRID[1], 3), dtype=np.uint8)
    return qwen.inputs([Image.fromarray(noise)], ["What is in the middle of it?"])


@pytest.fixture(scope="module")
def around(qwen, inputs):
    """Text tokens before and after the image."""
    places = (inputs["input_ids"][0] == qwen.model.config.image_token_id).nonzero()[:, 0]
    return int(places[0]), inputs["input_ids"].shape[1] - int(places[-1]) - 1


@pytest.mark.parametrize("spec", SPECS)
def test_plan_is_the_real_prefill(qwen, inputs, around, spec):
    pruner = registry.build(spec, None if spec == "vanilla" else 0.25)
    counter = macs.ModelCounter(qwen.model)
    real = macs.count_prefill(counter, qwen, pruner, inputs)
    config = qwen.model.config
    made = plan.make(config, pruner, GRID, *around)
    assert made.visual_tokens == real.visual_tokens and not made.varies
    height, width = (28 * n for n in made.grid)
    assert real.tower == counter.tower(height, width)
    assert real.tower == qwen.family.tower_macs(config.vision_config, height, width)
    closed = qwen.family.projector_macs(config, made.projected)
    assert real.projector == counter.projector(made.projected) == closed
    assert made.projected == made.grid[0] * made.grid[1], "the merger runs on all that the tower sees"
    if spec == "sparsevlm":  # how many words rate depends on their values
        words = [plan.make(config, pruner, GRID, *around, raters=n).own for n in range(1, around[1] + 1)]
        assert real.selection in words
    else:
        assert made.own == real.selection
    reads = pruner.reads(has_cls=False)
    patches = 4 * made.projected
    assert made.own >= any(s.kind == "received" for s in reads) * patches**2 * 32


def test_true_shape_has_every_method():
    shape = shapes.load("qwen2.5-vl-7b")
    counter = ShapeCounter(shape, 62)
    budgets = {
        spec: None if spec == "vanilla" else 64
        for spec in registry.available()
        if spec not in learned.names()
    }
    counts = {spec: counter.count(spec, budget) for spec, budget in budgets.items()}
    received = {spec: count.own for spec, count in counts.items() if count.own >= (4 * 576) ** 2 * 1280}
    assert set(received) == {"visionzip", "holov", "prumerge", "prumerge_plus", "vispruner"}
    own = counter.count("holov:alpha=0", 64).own
    assert own == (4 * 576) ** 2 * 1280 and f"({2 * own / 1e9:.1f} GFLOP at 672 x 672 pixels" in PAGE
    for spec in ("random", "visionzip", "holov", "prumerge"):
        assert set(counts[spec].plan.visual_tokens) == {64} and counts[spec].plan.projected == 576
    assert counts["pdrop"].plan.visual_tokens[:2] == (576, 576)


def test_methods_that_need_a_cls_token_are_refused():
    class Reads(Random):
        signals = cls_attention(-1)

    class Windowed(Random):
        signals = (Signal("received", 0),)

    config = shapes.load("qwen2.5-vl-7b").config
    with pytest.raises(UserError, match="CLS"):
        plan.make(config, Reads(budget=64), (24, 24), 15, 47)
    with pytest.raises(UserError, match="windows only"):
        plan.make(config, Windowed(budget=64), (24, 24), 15, 47)
