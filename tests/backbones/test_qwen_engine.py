"""Every method on Qwen2.5-VL against a model written out by hand, alone and in left-padded batches of images
of different sizes; and each of the family's silent traps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_helpers import generate
from PIL import Image
from probes import Adaptive, Both, Recycler, Unequal
from qwen_reference import QwenReference

from methods import registry
from methods.base import Signal, cls_attention
from methods.errors import UserError
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.policy import Policy, PolicyConfig

WIDTH = 64  # of the tiny model's language model, and of what its merger puts out
PROMPTS = ["Is there a red box?", "What?", "Is there a red box in the image? Answer yes or no."]
#: of logits with a standard deviation of 1; ten layers of sharp attention in float32 lie between. Choices
#: and tokens are compared exactly
CLOSE = {"atol": 5e-4, "rtol": 0}
#: rows and columns of visual tokens: more than a window, cut windows, wider and higher than a window
GRIDS = [(5, 7), (3, 4), (2, 9)]
#: at budgets that every schedule can reach in six layers
SPECS = {
    "fastv": 0.25, "fastv:k=3,schedule=average": 0.7, "pdrop": 0.4, "pdrop:schedule=kept": 0.2,
    "sparsevlm": 0.3, "sparsevlm:schedule=average": 0.6, "visionzip": 0.4, "visionzip:contextual=0": 6,
    "holov": 0.3, "holov:alpha=0": 7, "prumerge": 0.3, "prumerge:schedule=adaptive": None,
    "prumerge_plus": 0.3, "random": 5, "uniform": 0.3, "divprune": 0.3, "divprune:order=picked": 5,
    "vispruner": 0.4, "dart": 0.4, "dart:schedule=fit": 0.6, "cdpruner": 0.4,
}  # fmt: skip


def picture(grid, seed=0):
    """An image that the processor leaves at its size."""
    noise = np.random.default_rng(seed).integers(0, 255, (28 * grid[0], 28 * grid[1], 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def model(qwen):
    qwen.model.generation_config.eos_token_id = None
    qwen.model.generation_config.suppress_tokens = [qwen.model.config.image_token_id]
    return qwen.model


@pytest.fixture(scope="module")
def images():
    return [picture(grid, seed) for seed, grid in enumerate(GRIDS)]


@pytest.fixture(scope="module")
def batch(qwen, images):
    return qwen.inputs(images, PROMPTS)


@pytest.fixture(scope="module")
def singles(qwen, images):
    return [qwen.inputs([image], [prompt]) for image, prompt in zip(images, PROMPTS)]


@pytest.fixture(scope="module")
def stepprune(tmp_path_factory):
    """Of an untrained policy; `few` stops by itself, `all` not before everything is taken."""
    folder = tmp_path_factory.mktemp("policy")
    for name, stop_bias in (("few", 0.0), ("all", -1e4)):
        torch.manual_seed(0)
        policy = Policy(PolicyConfig(WIDTH, WIDTH, heads=4, max_steps=49))
        found = checkpoints.Checkpoint(
            folder / f"{name}.safetensors", policy.config, "tiny-qwen", 6.0, [(4.0, 2.0), (24.0, stop_bias)],
            visual_tokens=20.0,
        )  # fmt: skip
        found.save(policy, LocalDenoiser(WIDTH))
    return {name: f"stepprune:checkpoint={folder / name}.safetensors" for name in ("few", "all")}


def same_as_reference(model, batch, singles, pruner, reference=QwenReference):
    """Runs alone and together, checks both, gives the trace of the batch. reference: class of the model."""
    reference = reference(model)
    together = generate(model, batch, pruner)
    for row, (one, grid) in enumerate(zip(singles, GRIDS)):
        pruner.prepare(model)
        tokens, logits, kept = reference.greedy(one, [grid], pruner, 5)
        for got, b in ((generate(model, one, pruner), 0), (together, row)):
            assert torch.equal(got[0][b], tokens)
            torch.testing.assert_close(got[1][b], logits, **CLOSE)
            assert [k.tolist() for k in got[2].kept[b]] == [k.tolist() for k in kept]
    return together[2]


@pytest.mark.parametrize("spec", ["vanilla", *SPECS])
@torch.inference_mode()
def test_equals_reference_alone_and_in_a_batch(model, batch, singles, spec):
    same_as_reference(model, batch, singles, registry.build(spec, SPECS.get(spec)))


@pytest.mark.parametrize("probe", [Adaptive, Unequal, Recycler, Both], ids=lambda p: p.__name__)
@torch.inference_mode()
def test_adaptive_probes_equal_reference(model, batch, singles, probe):
    """Unequal counts, made tokens, cuts before and inside the language model."""
    trace = same_as_reference(model, batch, singles, probe(budget=1))
    assert len({tuple(row) for row in trace.visual_tokens.tolist()}) > 1


@torch.inference_mode()
def test_stepprune_equals_reference(model, batch, singles, stepprune):
    trace = same_as_reference(model, batch, singles, registry.build(stepprune["few"], 0.3))
    assert trace.visual_tokens[:, 0].tolist() == [len(k[0]) for k in trace.kept]


@pytest.mark.parametrize("spec", SPECS)
@torch.inference_mode()
def test_pruning_changes_the_answer(model, batch, spec):
    """Otherwise the test above could not fail."""
    pruned = generate(model, batch, registry.build(spec, SPECS[spec]))
    assert (pruned[1][:, 0] - generate(model, batch)[1][:, 0]).abs().max() > 0.02
    assert (pruned[2].visual_tokens[:, -1] < torch.tensor([r * c for r, c in GRIDS])).all()


@pytest.mark.parametrize("spec", [s for s in registry.available() if s != "diffprune"])
@torch.inference_mode()
def test_keeping_everything_is_vanilla(model, batch, singles, stepprune, spec):
    """A number above an image's tokens keeps all of them; to the bit where nothing is padded."""
    pruner = registry.build(*((stepprune["all"], 24) if spec == "stepprune" else (spec, 48)))
    ours, theirs = generate(model, batch, pruner), generate(model, batch)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)
    assert ours[2].visual_tokens.tolist() == [[r * c] * 6 for r, c in GRIDS]
    for one in singles:
        ours, theirs = generate(model, one, pruner), generate(model, one)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@torch.inference_mode()
def test_downsample_is_the_smaller_image(qwen, model, batch, images):
    """Just what the unpruned model says to the shrunk pixels in a prompt of their own length: positions of
    the image and of all text behind it, too."""
    pruner = registry.build("downsample", 8)
    ours, logits, trace = generate(model, batch, pruner)
    for row, (image, prompt, grid) in enumerate(zip(images, PROMPTS, GRIDS)):
        small = pruner.image_grid(grid)
        one = dict(qwen.inputs([picture(small)], [prompt]))
        full = qwen.inputs([image], [prompt])["pixel_values"]
        one["pixel_values"] = shrunk(full, grid, small)
        tokens, own, _ = generate(model, one)
        assert torch.equal(ours[row], tokens[0])
        torch.testing.assert_close(logits[row], own[0], atol=1e-5, rtol=1e-5)
        assert trace.visual_tokens[row].tolist() == [small[0] * small[1]] * 6


def shrunk(patches, grid, small):
    """Patches [4 N, 3 * 2 * 14 * 14] as of the image at another size, token by token."""
    image = torch.zeros(3, 28 * grid[0], 28 * grid[1])
    for n, own in enumerate(patches.view(-1, 3, 2, 14, 14)):
        token, inner = divmod(n, 4)
        y, x = token // grid[1] * 28 + inner // 2 * 14, token % grid[1] * 28 + inner % 2 * 14
        image[:, y : y + 14, x : x + 14] = own[:, 0]
    size = [28 * n for n in small]
    image = torch.nn.functional.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    rows = []
    for n in range(4 * small[0] * small[1]):
        token, inner = divmod(n, 4)
        y, x = token // small[1] * 28 + inner // 2 * 14, token % small[1] * 28 + inner % 2 * 14
        rows.append(image[:, None, y : y + 14, x : x + 14].expand(3, 2, 14, 14).flatten())
    return torch.stack(rows)


@torch.inference_mode()
def test_several_images_and_none(qwen, model, images):
    """Three images of different sizes, none and one in a batch: each sample as it is alone, and as the
    reference says."""
    rows = [images, [], images[1:2]]
    together = qwen.inputs(rows, PROMPTS)
    grids = [GRIDS, [], GRIDS[1:2]]
    for spec in ("fastv", "pdrop", "random", "visionzip", "holov", "prumerge", "downsample", "sparsevlm"):
        pruner = registry.build(spec, SPECS.get(spec, 8))
        tokens, logits, trace = generate(model, together, pruner)
        for row, (own, prompt, own_grids) in enumerate(zip(rows, PROMPTS, grids)):
            one = qwen.inputs([own], [prompt]) if own else text_only(qwen, prompt)
            alone = generate(model, one, pruner)
            assert torch.equal(alone[0][0], tokens[row])
            torch.testing.assert_close(alone[1][0], logits[row], atol=1e-4, rtol=1e-4)
            assert torch.equal(alone[2].visual_tokens[0], trace.visual_tokens[row])
            if not own:
                assert torch.equal(alone[0], generate(model, one)[0])
            elif spec not in ("downsample", "sparsevlm"):
                expected = QwenReference(model).greedy(one, own_grids, pruner, 5)
                assert torch.equal(expected[0], tokens[row])
        counts = [sum(registry.build("random", 0.25).count(r * c) for r, c in g) for g in grids]
        if spec == "fastv":
            assert trace.visual_tokens[:, -1].tolist() == counts


def text_only(qwen, prompt):
    """Inputs of a prompt without image."""
    text = qwen.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": prompt}]}], add_generation_prompt=True
    )
    return dict(qwen.processor(text=[text], return_tensors="pt"))


# ---- traps


@torch.inference_mode()
def test_signals_come_in_raster_order(model, batch):
    """The tower's own order is that of its windows: what is read there must be put back."""
    from transformers.vision_utils import get_vision_window_index

    from backbones.families import adapter_for

    adapter, reference = adapter_for(model), QwenReference(model)
    images = adapter.images({k: batch[k] for k in ("pixel_values", "image_grid_thw")})
    wanted = [Signal(kind, -1) for kind in ("received", "keys", "hidden", "order")]
    found = adapter.see(images, range(3), images.grids, wanted)
    raw = model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
    in_tower = raw.last_hidden_state.view(-1, 4, 32).mean(1).split(images.sizes)
    for own, grid, part, unsorted in zip(found, GRIDS, images.parts, in_tower):
        view = reference.view(part, grid, wanted[:2])
        torch.testing.assert_close(own[adapter.feature], view.features, atol=5e-5, rtol=1e-4)
        for signal in wanted[:2]:
            torch.testing.assert_close(own[signal], view[signal], atol=1e-5, rtol=1e-4)
        assert own[wanted[0]].sum() == pytest.approx(1) and own[wanted[0]].dtype == torch.float32
        shape = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
        order, _ = get_vision_window_index(shape, spatial_merge_size=2, window_size=56, patch_size=14)
        assert torch.equal(own[wanted[3]], order) and order.tolist() != sorted(order.tolist())
        torch.testing.assert_close(own[wanted[2]][order], unsorted)
        assert not torch.allclose(own[wanted[2]], unsorted), "or the order would not matter"


@torch.inference_mode()
def test_no_map_of_all_patches_with_all_patches(model, singles):
    """Attention received is summed up in blocks of rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    seen.add(tuple(tensor.shape))
            return out

    one, patches = singles[0], 4 * GRIDS[0][0] * GRIDS[0][1]
    for spec in ("visionzip", "holov", "prumerge"):
        with registry.build(spec, 0.3)(model), Shapes():
            model(**one, use_cache=True)
    assert (2, 128, patches) in seen and (2, patches - 128, patches) in seen
    assert not [shape for shape in seen if sum(size == patches for size in shape) > 1]


@torch.inference_mode()
def test_windowed_layers_are_read_by_their_windows(model, batch):
    from backbones.families import adapter_for

    adapter = adapter_for(model)
    images = adapter.images({k: batch[k] for k in ("pixel_values", "image_grid_thw")})
    inside = Signal("received", 2)
    for own, (rows, columns) in zip(adapter.see(images, range(3), images.grids, [inside]), GRIDS):
        windows = [((r // 2, c // 2)) for r in range(rows) for c in range(columns)]
        for window in set(windows):  # each window's rows spread their attention inside of it
            members = torch.tensor([w == window for w in windows])
            assert own[inside][members].sum() == pytest.approx(int(members.sum()) / len(windows), abs=1e-5)


@pytest.mark.parametrize("missing", ["mm_token_type_ids", "image_grid_thw"])
@pytest.mark.parametrize("spec", ["fastv", "random", "vanilla"])
def test_one_dimensional_positions_are_refused(model, singles, spec, missing):
    """transformers falls back to them without a word."""
    one, pruner = singles[0], registry.build(spec, 9)
    dropped = {k: v for k, v in one.items() if k != missing}
    with torch.inference_mode(), pruner(model):
        features = model.model.get_image_features(**{k: one[k] for k in ("pixel_values", "image_grid_thw")})
        dropped.pop("pixel_values")
        with pytest.raises(RuntimeError, match="mm_token_type_ids and image_grid_thw"):
            model(**dropped, mm_encoder_outputs={"image": features}, use_cache=True)
    if missing == "mm_token_type_ids":
        without = {k: v for k, v in one.items() if k != missing}
        model.generate(**without, max_new_tokens=1)  # as transformers comes
        with pruner(model), pytest.raises(RuntimeError, match="not M-RoPE's"):
            model.generate(**without, max_new_tokens=1)


@torch.inference_mode()
def test_plain_forward_and_own_decode_loop(model, singles):
    """`model(**inputs)`, then one token at a time with nothing but the cache: the model would count positions
    by the short cache (rope_deltas)."""
    one = singles[0]
    for spec in ("vanilla", "fastv", "pdrop", "random", "holov", "prumerge", "visionzip", "downsample"):
        pruner = registry.build(spec, SPECS.get(spec, 9))
        tokens, logits, _ = generate(model, one, pruner)
        with pruner(model):
            out = model(**one, use_cache=True)
            for step in range(4):
                torch.testing.assert_close(out.logits[:, -1], logits[:, step], atol=2e-5, rtol=1e-4)
                new = tokens[:, step : step + 1]
                out = model(input_ids=new, past_key_values=out.past_key_values, use_cache=True)
        if pruner.selects:
            with pruner(model):
                uncached = model(**one, use_cache=False).logits[:, -1]
            torch.testing.assert_close(uncached, logits[:, 0], atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_features_computed_ahead(model, batch):
    """The way the latency and FLOP counters call it."""
    from harness.costs import macs

    for spec in ("vanilla", "fastv", "random", "downsample"):
        pruner = registry.build(spec, SPECS.get(spec, 9))
        with pruner(model):
            logits = macs.prefill(model, batch)[:, 0]
        torch.testing.assert_close(logits, generate(model, batch, pruner)[1][:, 0], atol=5e-5, rtol=1e-4)


@torch.inference_mode()
def test_prompt_stays_full_length_for_the_caller(qwen, model, batch):
    """Callers cut the answer off behind the prompt's own length."""
    for spec in ("fastv", "random"):
        with registry.build(spec, 0.2)(model):
            made = model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert made.shape == (3, batch["input_ids"].shape[1] + 4)
        assert torch.equal(made[:, :-4], batch["input_ids"])


@pytest.mark.parametrize("spec", [*SPECS, "downsample", "holov:form=released"])
@torch.inference_mode()
def test_the_model_is_as_before(model, batch, spec):
    """Hooks and replaced methods gone, outputs equal to the bit: rope_deltas, which survive between calls,
    are of no consequence."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")

    def state():
        hooks = [list(getattr(m, kind)) for m in model.modules() for kind in kinds]
        return hooks, {name: sorted(vars(m)) for name, m in model.named_modules()}

    before, was = generate(model, batch)[1], state()
    generate(model, batch, registry.build(spec, SPECS.get(spec, 0.3)))
    assert state() == was and torch.equal(generate(model, batch)[1], before)


@torch.inference_mode()
def test_what_is_not_supported_says_so(model, batch, singles):
    pruner, one = registry.build("fastv", 9), singles[0]
    with pruner(model), pytest.raises(RuntimeError, match="static"):
        model.generate(**one, max_new_tokens=2, cache_implementation="static")
    with pruner(model), pytest.raises(RuntimeError, match="videos"):
        model(**one, pixel_values_videos=one["pixel_values"], video_grid_thw=one["image_grid_thw"])
    frames = one["image_grid_thw"] * torch.tensor([2, 1, 1])
    with registry.build("random", 9)(model), pytest.raises(RuntimeError, match="several frames"):
        model.model.get_image_features(torch.cat([one["pixel_values"]] * 2), frames)
    with registry.build("random", 9)(model), pytest.raises(RuntimeError, match="output_attentions"):
        model.model.get_image_features(one["pixel_values"], one["image_grid_thw"], output_attentions=True)

    class Cls(Adaptive):
        signals = cls_attention(-1)

    with Cls(budget=1)(model), pytest.raises(UserError, match="CLS"):
        model(**one)


def test_budgets_are_fractions_or_numbers(model, batch):
    sizes = torch.tensor([r * c for r, c in GRIDS])
    for budget in (0.25, 12):
        expected = [round(budget * n) if budget < 1 else min(budget, n) for n in sizes.tolist()]
        for spec in ("random", "uniform", "visionzip", "holov", "prumerge", "prumerge_plus"):
            trace = generate(model, batch, registry.build(spec, budget))[2]
            assert trace.visual_tokens[:, 0].tolist() == expected, spec
        trace = generate(model, batch, registry.build("fastv", budget))[2]
        assert trace.visual_tokens.tolist() == [[n] * 2 + [k] * 4 for n, k in zip(sizes.tolist(), expected)]


@torch.inference_mode()
def test_vision_cache(qwen, model, images):
    """The tower runs once a distinct image; equal rows of pixels in another shape are another image."""
    square = picture((3, 6), 9)
    batch = qwen.inputs([images[0], square, images[0]], PROMPTS)
    turned = {**batch, "image_grid_thw": batch["image_grid_thw"][[0, 1, 2]].clone()}
    turned["image_grid_thw"][1] = torch.tensor([1, 12, 6])
    specs = ["vanilla", "fastv", "holov", "visionzip", "downsample", "random"]
    outside = {s: [generate(model, b, registry.build(s, 8)) for b in (batch, turned)] for s in specs}
    runs = []
    handle = model.model.visual.register_forward_pre_hook(
        lambda m, a, k: runs.append(len(k["grid_thw"])), with_kwargs=True
    )
    with qwen.vision_cache(1 << 30) as cache:
        for spec in specs:
            for inputs, theirs in zip((batch, turned), outside[spec]):
                ours = generate(model, inputs, registry.build(spec, 8))
                assert torch.equal(ours[0], theirs[0])
                torch.testing.assert_close(ours[1], theirs[1], atol=1e-4, rtol=1e-4)
    handle.remove()
    # two images and the turned one; again when HoloV wants attention, again for VisionZip's keys; then small
    assert runs == [2, 1, 2, 1, 2, 1, 2, 1] and cache.runs == 12
