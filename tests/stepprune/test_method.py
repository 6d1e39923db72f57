"""The method on a tiny model, with a checkpoint made here."""

import json

import pytest
import torch
from PIL import Image

from harness.cli import app
from harness.costs import plan
from methods import registry
from methods.errors import UserError
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.fast import ChunkedLoop, FoldedLoop, tensors
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.policy import Policy, PolicyConfig

PROMPTS = ["Is there a red box?", "What?", "Is there a box in the image? Answer yes or no.", "A"]


@pytest.fixture(scope="module")
def images():
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 255, (4, 112, 112, 3), generator=g, dtype=torch.uint8).numpy()
    return [Image.fromarray(n) for n in noise]


def write(path, seed=0, width=32, mean=12.0, calibration=((4.0, 2.0), (12.0, 0.3), (30.0, -0.5))):
    torch.manual_seed(seed)
    policy = Policy(PolicyConfig(width, 32, heads=4, max_steps=40))
    found = checkpoints.Checkpoint(path, policy.config, "tiny-llava", mean, list(calibration))
    found.save(policy, LocalDenoiser(width))
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("policy") / "twelve.safetensors").path


def test_generates_with_its_own_count(backbone, images, file):
    """Batch and single runs agree, the trace shows K, the survivors stand in spatial order."""
    pruner = registry.build(f"stepprune:checkpoint={file}", budget=12)
    inputs = backbone.inputs(images, PROMPTS)
    with torch.no_grad(), pruner(backbone.model) as trace:
        ids = backbone.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    together = [k[0].tolist() for k in trace.kept]
    new = ids[:, inputs["input_ids"].shape[1] :]
    for b, (image, prompt) in enumerate(zip(images, PROMPTS)):
        single = backbone.inputs([image], [prompt])
        with torch.no_grad(), pruner(backbone.model) as alone:
            own = backbone.model.generate(**single, max_new_tokens=3, do_sample=False)
        assert alone.kept[0][0].tolist() == together[b] == sorted(set(together[b]))
        assert alone.visual_tokens.tolist()[0] == trace.visual_tokens.tolist()[b] == [len(together[b])] * 6
        assert own[0, single["input_ids"].shape[1] :].tolist() == new[b].tolist()
    assert len({len(k) for k in together}) > 1, "K depends on the input"


def test_selection_depends_on_the_question(backbone, images, file):
    pruner = registry.build(f"stepprune:checkpoint={file}", budget=12)
    inputs = backbone.inputs([images[0]] * 2, [PROMPTS[0], PROMPTS[2]])
    with torch.no_grad(), pruner(backbone.model) as trace:
        backbone.model(**inputs)
    assert trace.kept[0][0].tolist() != trace.kept[1][0].tolist()


def test_budget_moves_the_count(backbone, images, file):
    counts = []
    for budget in (4, 12, 30):
        pruner = registry.build(f"stepprune:checkpoint={file}", budget=budget)
        with torch.no_grad(), pruner(backbone.model) as trace:
            backbone.model(**backbone.inputs(images, PROMPTS))
        counts.append(trace.visual_tokens[:, 0])
        facts = pruner.resources(backbone.model)
        assert facts["checkpoint"] == "twelve" and len(facts["weights"]) == 16
    assert (
        (counts[0] <= counts[1]).all()
        and (counts[1] <= counts[2]).all()
        and counts[0].sum() < counts[2].sum()
    )


def test_several_tokens_a_step_by_name(backbone, images, file):
    kept = {}
    for take in (1, 6):
        pruner = registry.build(f"stepprune:checkpoint={file},tokens_per_step={take}", budget=12)
        with torch.no_grad(), pruner(backbone.model) as trace:
            backbone.model(**backbone.inputs(images, PROMPTS))
        kept[take] = [k[0].tolist() for k in trace.kept]
        assert [sorted(order.tolist()) for order in pruner.orders] == kept[take]
    assert kept[1] != kept[6] and min(map(len, kept[6])) >= 6
    with pytest.raises(UserError, match="tokens_per_step 0: give a whole number from 1 on"):
        registry.build("stepprune:tokens_per_step=0", budget=12)


def test_denoiser_and_positions_are_switches(backbone, images, tmp_path, file):
    found = checkpoints.read(file)
    policy, denoiser = found.load()
    torch.nn.init.normal_(denoiser.out.weight, std=0.5)
    checkpoints.Checkpoint(
        tmp_path / "d.safetensors", found.config, "tiny-llava", 12.0, found.calibration
    ).save(policy, denoiser)
    logits = {}
    for settings in ("", ",denoise=true", ",positions=renumbered"):
        pruner = registry.build(f"stepprune:checkpoint={tmp_path / 'd.safetensors'}{settings}", budget=12)
        with torch.no_grad(), pruner(backbone.model) as trace:
            logits[settings] = backbone.model(**backbone.inputs(images[:1], PROMPTS[:1])).logits[0, -1]
        kept = trace.kept[0][0].tolist()
    assert len(kept) > 1
    for settings in (",denoise=true", ",positions=renumbered"):
        assert not torch.allclose(logits[settings], logits[""])


def test_a_file_gives_back_what_was_rounded_before_calibration(tmp_path):
    """16 bits a weight, so that the shipped policies stay below 30 MB together."""
    config = PolicyConfig(width=16, text_width=16)
    policy, denoiser = Policy(config), LocalDenoiser(16)
    policy.stop_bias.fill_(1.23456789)
    own = checkpoints.Checkpoint(tmp_path / "k8.safetensors", config, "tiny")
    own.save(policy, denoiser)
    before = policy.start.clone()
    checkpoints.round_as_stored(policy)
    assert not torch.equal(policy.start, before)
    loaded = own.load()[0].state_dict()
    for name, value in policy.state_dict().items():
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], value), name
    files = list(checkpoints.SHIPPED.glob("*/*.safetensors"))
    assert {f.parent.name for f in files} == {"pocket-llava", "pocket-qwen"}
    assert sum(f.stat().st_size for f in files) <= 12e6, "the shipped policies make the repository heavy"


def test_biases_between_calibrated_means():
    found = checkpoints.Checkpoint(None, None, "b", 10.0, [(5.0, 1.0), (10.0, 0.0), (20.0, -2.0)])
    assert [found.bias_for(t) for t in (5, 7.5, 10, 15, 20)] == [1, 0.5, 0, -1, -2]


def test_the_nearest_checkpoint_serves(tmp_path):
    small = write(tmp_path / "s.safetensors", mean=10.0, calibration=((5.0, 1.0), (10.0, 0.0), (20.0, -1.0)))
    large = write(tmp_path / "l.safetensors", mean=40.0, calibration=((15.0, 1.0), (40.0, 0.0), (60.0, -1.0)))
    both = [small, large]
    assert [checkpoints.best_for(t, both)[0] for t in (5, 10, 19, 21, 60)] == [
        small,
        small,
        small,
        large,
        large,
    ]
    with pytest.raises(UserError, match=r"not calibrated to a mean of 63 .* calibrate stepprune"):
        checkpoints.best_for(63, both)


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(b"no weights"), "other weights than p.json was written for .damaged"),
        (lambda p: p.with_suffix(".json").write_text("{"), "damaged"),
        (lambda p: write(p, width=64), "trained for tiny-llava .*vision width 64.*this model has 32"),
    ],
)
def test_bad_checkpoints(backbone, tmp_path, break_it, words):
    path = tmp_path / "p.safetensors"
    write(path)
    break_it(path)
    with (
        pytest.raises(UserError, match=words),
        registry.build(f"stepprune:checkpoint={path}", budget=12)(backbone.model),
    ):
        pass


def test_no_checkpoint_for_a_backbone(backbone):
    pruner = registry.build("stepprune", budget=12)
    with pytest.raises(UserError, match="harness train stepprune --backbone tiny-llava"):
        pruner.resources(backbone.model)
    assert registry.build("stepprune").resources(backbone.model) == {}


def test_a_run_of_all_methods_leaves_it_out_and_naming_it_is_an_error(tiny_checkpoint, tiny_data, tmp_path):
    from harness.run.config import RunConfig
    from harness.run.session import Session
    from harness.tasks.suites import parse_tasks

    def session(methods):
        return Session(
            RunConfig(
                budgets=(12,),
                benchmarks=tuple(parse_tasks("pope")),
                methods=methods,
                out=tmp_path,
                backbone=str(tiny_checkpoint),
                data=tiny_data,
            )
        )

    everything = session(("all",))
    assert "stepprune" not in {m.name for m in everything.methods} and len(everything.methods) > 5
    assert [line.partition(":")[0] for line in everything.unavailable] == [
        "cdpruner at 12",
        "diffprune at 12",
        "stepprune at 12",
    ]
    with pytest.raises(UserError, match="no checkpoint for tiny-llava"):
        session(("stepprune", "random"))
    path = write(tmp_path / "p.safetensors").path
    (method,) = session((f"stepprune:checkpoint={path}",)).methods[1:]
    assert method.parameters["weights"] == checkpoints.read(path).digest()


def test_a_model_from_the_hub_is_called_by_its_id(backbone, monkeypatch):
    """It was called by the commit that its folder in the cache is named after."""
    folder = f"/cache/models--org--tiny-vlm/snapshots/{'0' * 40}"
    monkeypatch.setattr(backbone.model.config, "_name_or_path", folder)
    with pytest.raises(UserError, match="no checkpoint for org/tiny-vlm is shipped"):
        registry.build("stepprune", 12).resources(backbone.model)


# ---- the recorded loop


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunked_loop_equals_the_eager_one(chunk):
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(16, 12, heads=4, max_steps=25))
    first, second = (policy.remember(torch.randn(3, 30, 16), torch.randn(3, 4, 12)) for _ in range(2))
    loop = ChunkedLoop(policy, first, chunk)
    for memory in (first, second, first):
        eager, chunked = policy.decode(memory), loop(memory)
        assert torch.equal(eager.order, chunked.order) and torch.equal(eager.count, chunked.count)


def trained_like(config: PolicyConfig) -> Policy:
    """Norms with weights of their own, so that folding them matters."""
    policy = Policy(config).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("pointer", "layers"), [("projection", 1), ("projection", 2), ("attention", 2)])
@pytest.mark.parametrize("take", [1, 4])
@pytest.mark.parametrize("heads", [4, 8])  # narrow and wide
@torch.no_grad()
def test_folded_loop_chooses_what_the_plain_one_does(batch, padded, pointer, layers, take, heads):
    """Else a CPU run keeps other tokens than the same run on a GPU."""
    torch.manual_seed(0)
    policy = trained_like(
        PolicyConfig(16, 12, heads=heads, max_steps=25, pointer=pointer, decoder_layers=layers, min_tokens=2)
    )
    loop = FoldedLoop(policy)
    lengths = set()
    for bias in (-50.0, 0.0, 1.0, 50.0):  # from never to at once
        policy.stop_bias.fill_(bias)
        valid = torch.arange(30) < torch.tensor([30, 11, 20, 3, 17][:batch])[:, None] if padded else None
        memory = policy.remember(torch.randn(batch, 30, 16), torch.randn(batch, 4, 12), valid)
        before = [t.clone() for t in tensors(memory)]
        plain, fast = policy.decode(memory, take), loop(memory, take)
        assert torch.equal(plain.order, fast.order) and torch.equal(plain.count, fast.count)
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(memory))), "the memory is not the loop's"
        lengths |= set(plain.count.tolist())
    assert min(lengths) <= max(take, 2) and max(lengths) > 10, "both stopping and going on were compared"


@pytest.mark.parametrize("take", [2, 5, 60])
@torch.no_grad()
def test_several_tokens_a_step_are_its_best_ones(take):
    torch.manual_seed(0)
    policy = trained_like(PolicyConfig(16, 12, heads=4, max_steps=25))
    policy.stop_bias.fill_(-50)
    memory = policy.remember(torch.randn(3, 30, 16), torch.randn(3, 4, 12))
    one, several = policy.decode(memory), policy.decode(memory, take)
    first = policy.logits(policy.start.expand(3, 1, -1), memory)[:, 0, :-1].topk(min(take, 25)).indices
    assert torch.equal(several.order[:, : first.shape[1]], first)
    assert several.count.tolist() == [25] * 3 and all(len(set(row)) == 25 for row in several.order.tolist())
    assert not torch.equal(one.order, several.order)
    memory.bias[:, -1] = 50
    assert policy.decode(memory, take).count.tolist() == [min(take, 25)] * 3, "the first step's are all taken"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph_equals_the_eager_loop(dtype):
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(128, 64, max_steps=70)).to("cuda", dtype)
    memories = [
        policy.remember(
            torch.randn(2, 576, 128, device="cuda", dtype=dtype),
            torch.randn(2, 9, 64, device="cuda", dtype=dtype),
        )
        for _ in range(2)
    ]
    loop = ChunkedLoop(policy, memories[0])
    for memory in (*memories, memories[0]):
        assert torch.equal(policy.decode(memory).order, loop(memory).order)


# ---- command lines


def test_bench_policy_writes_its_report(tmp_path, capsys):
    report = tmp_path / "bench.json"
    arguments = "bench-policy stepprune --width 32 --text-width 16 --visual-tokens 40 --steps 5 8 --repeats 1"
    assert (
        app.main([*arguments.split(), "--dtype", "float32", "--device", "cpu", "--report", str(report)]) == 0
    )
    rows = json.loads(report.read_text())["rows"]
    assert [r["steps"] for r in rows] == [5, 8] and all(r["equal"] and r["recorded_ms"] > 0 for r in rows)


def test_train_wants_one_length_option(capsys, tmp_path):
    assert app.main(["train", "stepprune", "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "--target-tokens" in capsys.readouterr().err
    out = tmp_path / "x.safetensors"
    out.touch()
    assert app.main(["train", "stepprune", "--out", str(out), "--target-tokens", "9"]) == 2
    assert "exists" in capsys.readouterr().err


def test_its_costs_are_planned_without_weights(backbone):
    """Exactly the budget's tokens in every layer; each one more costs the same steps of the decoder."""
    config = backbone.model.config
    layers = config.text_config.num_hidden_layers
    own = {}
    for budget in (8, 16, 24):
        made = plan.make(config, registry.build("stepprune", budget=budget), (8, 8), 5, 7)
        assert made.visual_tokens == (budget,) * layers and not made.varies
        own[budget] = made.own
    attention = 2 * config.vision_config.hidden_size  # a step's logits and mix over one more cached token
    assert own[24] - own[16] - (own[16] - own[8]) == attention * 8 * 8


def test_untrained_takes_as_many_tokens_as_the_budget(backbone, images):
    config = backbone.model.config
    pruner = registry.build("stepprune", budget=7)
    pruner.untrained(config.vision_config.hidden_size, config.get_text_config().hidden_size, 7)
    assert pruner.resources(backbone.model) == {"weights": "random"}
    with torch.no_grad(), pruner(backbone.model) as trace:
        backbone.model(**backbone.inputs(images, PROMPTS), logits_to_keep=1)
    assert trace.visual_tokens.tolist() == [[7] * 6] * 4


def test_recorded_loops_survive_being_put_on_again(backbone, file):
    """A GPU would otherwise record them in every measurement anew."""
    pruner = registry.build(f"stepprune:checkpoint={file}", budget=12)
    pruner.prepare(backbone.model)
    first = pruner._decode
    pruner.prepare(backbone.model)
    assert pruner._decode is first
    pruner.budget = 20
    pruner.prepare(backbone.model)
    assert pruner._decode is not first, "another stop bias"
