"""Qwen2-VL, a family added in one file: every method against a model written out by hand, alone and in
left-padded batches of images of different sizes; keeping everything is the unpruned model; costs."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import generate
from qwen_reference import Qwen2VLReference
from test_qwen_engine import GRIDS, PROMPTS, SPECS, picture, same_as_reference

import backbones
from backbones.families import adapter_for
from backbones.random_checkpoint import make
from harness.costs import macs, plan
from methods import registry
from methods.base import Signal
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.policy import Policy, PolicyConfig

WIDTH = 64  # of the tiny model's language model, and of what its merger puts out


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """In the layout of the published repositories."""
    folder = make("qwen2-vl", tmp_path_factory.mktemp("checkpoint") / "tiny-qwen2", hub_layout=True)
    backbone = backbones.load(str(folder))
    backbone.model.generation_config.eos_token_id = None
    backbone.model.generation_config.suppress_tokens = [backbone.model.config.image_token_id]
    return backbone


@pytest.fixture(scope="module")
def batch(qwen2):
    return qwen2.inputs([picture(grid, seed) for seed, grid in enumerate(GRIDS)], PROMPTS)


@pytest.fixture(scope="module")
def singles(qwen2):
    images = [picture(grid, seed) for seed, grid in enumerate(GRIDS)]
    return [qwen2.inputs([image], [prompt]) for image, prompt in zip(images, PROMPTS)]


@pytest.fixture(scope="module")
def stepprune(tmp_path_factory):
    """Of an untrained policy; `few` stops by itself, `all` not before everything is taken."""
    folder = tmp_path_factory.mktemp("policy")
    for name, stop_bias in (("few", 0.0), ("all", -1e4)):
        torch.manual_seed(0)
        policy = Policy(PolicyConfig(WIDTH, WIDTH, heads=4, max_steps=49))
        found = checkpoints.Checkpoint(
            folder / f"{name}.safetensors", policy.config, "tiny-qwen2", 6.0, [(4.0, 2.0), (24.0, stop_bias)],
            visual_tokens=20.0,
        )  # fmt: skip
        found.save(policy, LocalDenoiser(WIDTH))
    return {name: f"stepprune:checkpoint={folder / name}.safetensors" for name in ("few", "all")}


def test_facts(qwen2):
    assert (qwen2.family.model_type, qwen2.family.title, qwen2.num_layers) == ("qwen2_vl", "Qwen2-VL", 6)
    told = qwen2.describe()
    assert (told["family"], told["min_pixels"], told["max_pixels"]) == ("qwen2_vl", 4 * 28**2, 48 * 28**2)


@pytest.mark.parametrize("spec", ["vanilla", *SPECS, "stepprune"])
@torch.inference_mode()
def test_equals_reference_alone_and_in_a_batch(qwen2, batch, singles, stepprune, spec):
    pruner = registry.build(*((stepprune["few"], 0.3) if spec == "stepprune" else (spec, SPECS.get(spec))))
    same_as_reference(qwen2.model, batch, singles, pruner, Qwen2VLReference)


@pytest.mark.parametrize("spec", [s for s in registry.available() if s != "diffprune"])
@torch.inference_mode()
def test_keeping_everything_is_vanilla(qwen2, batch, singles, stepprune, spec):
    model = qwen2.model
    pruner = registry.build(*((stepprune["all"], 24) if spec == "stepprune" else (spec, 48)))
    ours, theirs = generate(model, batch, pruner), generate(model, batch)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)
    assert ours[2].visual_tokens.tolist() == [[r * c] * 6 for r, c in GRIDS]
    ours, theirs = generate(model, singles[0], pruner), generate(model, singles[0])
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("spec", ["downsample", "fastv", "visionzip", "holov"])
@torch.inference_mode()
def test_pruning_changes_the_answer(qwen2, batch, spec):
    """Otherwise the tests above could not fail."""
    pruned = generate(qwen2.model, batch, registry.build(spec, SPECS.get(spec, 6)))
    assert (pruned[1][:, 0] - generate(qwen2.model, batch)[1][:, 0]).abs().max() > 0.02
    assert (pruned[2].visual_tokens[:, -1] < torch.tensor([r * c for r, c in GRIDS])).all()


@torch.inference_mode()
def test_signals_are_what_the_tower_computes(qwen2, batch):
    adapter, reference = adapter_for(qwen2.model), Qwen2VLReference(qwen2.model)
    images = adapter.images({k: batch[k] for k in ("pixel_values", "image_grid_thw")})
    wanted = [Signal(kind, -1) for kind in ("received", "keys", "order")]
    for own, grid, part in zip(adapter.see(images, range(3), images.grids, wanted), GRIDS, images.parts):
        view = reference.view(part, grid, wanted[:2])
        torch.testing.assert_close(own[adapter.feature], view.features, atol=5e-5, rtol=1e-4)
        for signal in wanted[:2]:
            torch.testing.assert_close(own[signal], view[signal], atol=1e-5, rtol=1e-4)
        assert own[wanted[2]].tolist() == [*range(grid[0] * grid[1])], "it has no order of its own"


@pytest.mark.parametrize("spec", ["vanilla", "visionzip", "downsample", "fastv"])
def test_plan_is_the_real_prefill(qwen2, singles, spec):
    pruner = registry.build(spec, None if spec == "vanilla" else 0.25)
    counter, config, one = macs.ModelCounter(qwen2.model), qwen2.model.config, singles[0]
    places = (one["input_ids"][0] == config.image_token_id).nonzero()[:, 0]
    around = int(places[0]), one["input_ids"].shape[1] - int(places[-1]) - 1
    made = plan.make(config, pruner, GRIDS[0], *around)
    real = macs.count_prefill(counter, qwen2, pruner, one)
    assert made.visual_tokens == real.visual_tokens and made.own == real.selection
    height, width = (28 * n for n in made.grid)
    assert (
        real.tower
        == counter.tower(height, width)
        == qwen2.family.tower_macs(config.vision_config, height, width)
    )
    assert real.projector == qwen2.family.projector_macs(config, made.projected)
