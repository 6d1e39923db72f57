"""A method's plan, made without weights, is what a real pruned prefill does: counts, work to the last MAC."""

from dataclasses import dataclass

import pytest
import tiny
import torch
from PIL import Image

from harness.costs import macs, plan
from methods import registry
from methods.base import Pruner, Selection
from methods.errors import UserError

GRID = (8, 8)
SPECS = [
    "vanilla", "random", "uniform", "downsample", "visionzip", "holov", "holov:alpha=0", "prumerge",
    "divprune", "vispruner", "dart",
    "prumerge_plus", "fastv", "fastv:k=1,schedule=average", "pdrop:schedule=kept", "pdrop:schedule=stock",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(backbone):
    picture = Image.effect_mandelbrot((96, 80), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    return backbone.inputs([picture], ["What is in the middle of it?"])


@pytest.fixture(scope="module")
def around(backbone, inputs):
    """Text tokens before and after the image."""
    places = (inputs["input_ids"][0] == backbone.model.config.image_token_id).nonzero()[:, 0]
    return int(places[0]), inputs["input_ids"].shape[1] - int(places[-1]) - 1


def measured(backbone, inputs, spec, budget):
    counter = macs.ModelCounter(backbone.model)
    return counter, macs.count_prefill(counter, backbone, registry.build(spec, budget=budget), inputs)


def planned(backbone, around, spec, budget, raters=None):
    pruner = registry.build(spec, budget=budget)
    return plan.make(backbone.model.config, pruner, GRID, *around, raters=raters)


@pytest.mark.parametrize("budget", [32, 20])
@pytest.mark.parametrize("spec", SPECS)
def test_plan_is_the_real_prefill(backbone, inputs, around, spec, budget):
    budget = None if spec == "vanilla" else budget
    counter, real = measured(backbone, inputs, spec, budget)
    made = planned(backbone, around, spec, budget)
    assert made.visual_tokens == real.visual_tokens and not made.varies
    assert counter.projector(made.projected) == real.projector
    assert counter.tower(*(14 * n for n in made.grid)) == real.tower
    assert made.own == real.selection


@pytest.mark.parametrize("budget", [32, 20])
def test_plan_of_sparsevlm_up_to_how_many_words_rate(backbone, inputs, around, budget):
    """Which words rate depends on their values: the real work is the plan's for one possible number of them,
    and the plan's own assumption is the most there can be."""
    _, real = measured(backbone, inputs, "sparsevlm", budget)
    one, two, default = (planned(backbone, around, "sparsevlm", budget, r) for r in (1, 2, None))
    assert one.visual_tokens == two.visual_tokens == default.visual_tokens == real.visual_tokens
    own = [one.own + (two.own - one.own) * r for r in range(around[1])]
    assert real.selection in own
    assert default.own == max(own) > min(own)


def test_counts_that_depend_on_the_image_are_marked(backbone, around):
    pruner = registry.build("prumerge:schedule=adaptive")
    assert plan.make(backbone.model.config, pruner, GRID, *around).varies


def test_a_method_that_does_not_suit_the_shape_says_so(backbone, around):
    with pytest.raises(UserError, match="budget 65"):
        plan.make(backbone.model.config, registry.build("fastv", budget=65), GRID, *around)


def test_the_random_tensors_are_as_wide_as_the_model(backbone, around):
    seen = {}

    @dataclass
    class Looks(Pruner):
        name = "looks"
        reads_text = True

        def select(self, image):
            seen.update(hidden=image.hidden.shape, pixels=image.pixels.shape, text=image.text.shape)
            return registry.build("uniform", budget=self.budget).select(image)

    made = plan.make(backbone.model.config, Looks(budget=16), GRID, *around)
    config = backbone.model.config
    assert seen["hidden"] == (65, config.vision_config.hidden_size)
    assert seen["text"] == (sum(around), config.text_config.hidden_size)
    assert seen["pixels"] == (3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    assert made.visual_tokens == (16,) * tiny.LAYERS


def test_a_method_with_weights_is_asked_before_training(backbone, around):
    """Its work at the true widths is counted, with as many tokens as the budget says."""

    @dataclass
    class Learned(Pruner):
        name = "learned"

        def untrained(self, width, text_width, tokens):
            self.scorer, self.tokens, self.text_width = torch.nn.Linear(width, 1), tokens, text_width

        def select(self, image):
            return Selection(self.scorer(image.features)[:, 0].topk(self.tokens).indices)

    pruner = Learned(budget=16)
    made = plan.make(backbone.model.config, pruner, GRID, *around)
    config = backbone.model.config
    assert pruner.text_width == config.text_config.hidden_size
    assert made.own == 64 * config.vision_config.hidden_size
    assert made.visual_tokens == (16,) * tiny.LAYERS


def test_runs():
    assert plan.Plan((576, 576, 64), (24, 24), 576, 0, False).runs() == "576 x2, 64 x1"
