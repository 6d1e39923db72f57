"""Each method costs what it claims: its own multiply-accumulates to the last one, no attention map of all
tokens with all tokens, and nothing left on the model afterwards."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from cost_claims import CLAIMS, Shape
from torch.utils._python_dispatch import TorchDispatchMode

from harness.costs import macs
from methods import clip_text, registry
from methods.base import PromptView
from methods.sparsevlm import raters

BUDGET = 16  # of 64
BEFORE, AFTER = 5, 9  # text tokens before and after the image
#: methods that choose by the projected features of all patches
PROJECT_ALL = ("holov", "holov:crops=5", "divprune", "divprune:order=picked", "cdpruner")
#: methods whose choice needs each token compared with each: one matrix of cosines per image
ALL_PAIRS = ("divprune", "divprune:order=picked", "cdpruner")
REAL = [name for name in CLAIMS if name not in ("vanilla", "random", "uniform", "downsample")]
VARIANTS = [
    "fastv:k=3", "visionzip:contextual=0", "pdrop:schedule=stock", "pdrop:schedule=kept",
    "sparsevlm:schedule=average", "holov:crops=5", "holov:alpha=0",
    "divprune:order=picked", "vispruner:important_ratio=1.0", "dart:schedule=fit",
]  # fmt: skip


@pytest.fixture(scope="module")
def subject(backbone):
    """A backbone whose random weights decide: attention is not flat, few words rate."""
    subject = copy.copy(backbone)
    subject.model = copy.deepcopy(backbone.model)
    generator = torch.Generator().manual_seed(3)
    for name, p in subject.model.named_parameters():
        if p.ndim >= 2:
            p.data.normal_(0, 1.0 if "embed" in name else 1.5 / p[0].numel() ** 0.5, generator=generator)
    return subject


@pytest.fixture(scope="module")
def inputs(subject):
    image = subject.model.config.image_token_id
    ids = [*range(10, 10 + BEFORE), *[image] * tiny.VISUAL_TOKENS, *range(30, 30 + AFTER)]
    pixels = torch.randn(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": pixels,
    }


@pytest.fixture(scope="module")
def counter(subject):
    return macs.ModelCounter(subject.model)


def build(spec, width=32):
    """At a budget that the schedule can reach in so few layers; weights from outside are random."""
    budget = {"vanilla": None, "pdrop": 32, "sparsevlm:schedule=average": 48}.get(spec, BUDGET)
    pruner = registry.build(spec, budget)
    if spec == "cdpruner":
        pruner.untrained(width, 0, 0)
    return pruner


@pytest.fixture(autouse=True)
def small_text_tower(monkeypatch):
    """The claim about it is a formula of its sizes."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "projection_dim": 12}
    monkeypatch.setattr(clip_text, "LARGE", {**clip_text.LARGE, **sizes, "num_attention_heads": 2})
    clip_text.untrained.cache_clear()
    yield
    clip_text.untrained.cache_clear()


def test_every_own_method_has_a_claim():
    """A method with a checkpoint of its own is tested where it lives."""
    own = {name for name, cls in registry.available().items() if cls.__module__.startswith("methods.")}
    assert set(CLAIMS) <= own
    assert len(REAL) == 11 and {v.partition(":")[0] for v in VARIANTS} <= set(REAL)


@pytest.mark.parametrize("spec", [*CLAIMS, *VARIANTS])
@torch.no_grad()
def test_own_work_is_the_formula(subject, inputs, counter, spec):
    model, pruner = subject.model, build(spec)
    count = macs.count_prefill(counter, subject, pruner, inputs)
    text = model.get_input_embeddings()(inputs["input_ids"][0, -AFTER:])
    visual = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    words = len(raters(PromptView(visual, text)))
    assert 1 < words < AFTER, "or the number of raters would not be tested"
    shape = Shape.of(model.config, inputs["input_ids"].shape[1], AFTER)
    claim = CLAIMS[spec.partition(":")[0]](pruner, shape, words)
    assert count.selection == claim
    assert (claim > 0) == (spec.partition(":")[0] in REAL)
    projected = 64 if spec in PROJECT_ALL else count.visual_tokens[0]
    per_token = shape.d * shape.D + shape.D**2
    assert count.projector == projected * per_token, "only some project the patches that they drop"


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that any operator puts out."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return out


@torch.no_grad()
def shapes_of(model, pruner, inputs):
    """Shapes of all tensors made in a prefill, and the lengths of the sequences that it worked on."""
    with pruner(model) as trace, Shapes() as shapes:
        model(**inputs, use_cache=True)
        present = {int(n) for n in trace.visual_tokens[0]}
    n = tiny.VISUAL_TOKENS
    return shapes.seen, {n, n + 1} | {n + BEFORE + AFTER for n in present}


def maps(shapes, lengths):
    """Those with two dimensions that are sequence lengths."""
    return {shape for shape in shapes if sum(size in lengths for size in shape) > 1}


@pytest.mark.parametrize("spec", [*REAL, *VARIANTS])
def test_no_map_of_all_tokens_with_all_tokens(subject, inputs, spec):
    unpruned, lengths = shapes_of(subject.model, build("vanilla"), inputs)
    # the tower's wide MLP happens to be as wide as the image has patches; nothing else looks like a map
    assert lengths == {64, 65, 78} and maps(unpruned, lengths) == {(1, 65, 64), (65, 64)}
    shapes, lengths = shapes_of(subject.model, build(spec), inputs)
    assert {64, 65} < lengths
    allowed = {(1, 64, 64)} if spec in ALL_PAIRS else set()
    assert maps(shapes - unpruned, lengths) == allowed


def test_the_trace_sees_maps(subject, inputs):
    """Otherwise the test above could not fail: eager attention makes them, in the tower and behind cuts."""
    eager = copy.deepcopy(subject.model)
    eager.set_attn_implementation("eager")
    pruner = build("pdrop")
    unpruned, _ = shapes_of(subject.model, build("vanilla"), inputs)
    shapes, lengths = shapes_of(eager, pruner, inputs)
    found = maps(shapes - unpruned, lengths)
    widths = {n + BEFORE + AFTER for n in (64, *(n for _, n in pruner.plan(64, tiny.LAYERS)))}
    assert len(widths) > 2 and {(1, 4, w, w) for w in (65, *widths)} <= found


def state(model):
    """Everything a method could leave on a model: hooks, attributes, replaced methods, changed weights."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    hooks = [list(getattr(m, kind).items()) for m in model.modules() for kind in kinds]
    attributes = {name: sorted(vars(m)) for name, m in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return hooks, attributes, weights


@pytest.mark.parametrize("spec", [*CLAIMS, *VARIANTS])
@torch.no_grad()
def test_the_model_is_as_before(subject, inputs, spec):
    model, options = subject.model, dict(max_new_tokens=3, do_sample=False, output_logits=True)
    hooks, attributes, weights = state(model)
    before = model.generate(**inputs, **options, return_dict_in_generate=True)
    with build(spec)(model):
        assert state(model)[0] != hooks
        pruned = model.generate(**inputs, **options, return_dict_in_generate=True)
    after = model.generate(**inputs, **options, return_dict_in_generate=True)
    same = [torch.equal(a, b) for a, b in zip(before.logits, after.logits)]
    assert len(same) == 3 and all(same) and torch.equal(before.sequences, after.sequences)
    assert torch.equal(before.logits[0], pruned.logits[0]) == (spec == "vanilla")
    assert state(model)[:2] == (hooks, attributes)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
