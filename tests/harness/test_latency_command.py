"""`python -m harness latency`: what it measures, writes and refuses, on a tiny model."""

import json

import pytest
import torch

from harness.cli import app
from harness.report import latency_table
from harness.store import records
from methods.errors import UserError


@pytest.fixture(scope="module")
def measured(tiny_checkpoint, tmp_path_factory):
    """(record, table) of random weights in the tiny shape, as the command makes them."""
    out = tmp_path_factory.mktemp("latency") / "tiny.json"
    arguments = ["--backbone", tiny_checkpoint / "config.json", "--random-weights", "--text-tokens", 12]
    arguments += ["--methods", "random,fastv,stepprune", "--budget", 32, 16, "--batch-size", 1, 2]
    arguments += ["--repeats", 2, "--decode-tokens", 2, "--device", "cpu", "--out", out]
    assert run(*arguments) == 0
    return records.read(out), out.with_suffix(".md").read_text()


def run(*arguments) -> int:
    return app.main(["latency", *map(str, arguments)])


def by_method(record, batch=1, budget=16):
    return {
        r["method"]["spec"]: r
        for r in record["results"]
        if r["batch_size"] == batch and r["method"]["budget"] in (None, budget)
    }


def test_every_method_budget_and_batch_size_is_measured(measured):
    record, _ = measured
    assert len(record["results"]) == 2 * (1 + 3 * 2)
    assert all(r["status"] == "done" for r in record["results"])
    for result in record["results"]:
        times = result["latency_ms"]
        assert times["repeats"] == 2 and times["decode"]["median"] > 0
        assert times["wall"]["median"] >= times["total"]["median"] > times["llm"]["median"] > 0


def test_sizes_are_those_of_the_methods(measured):
    record, _ = measured
    small, large, two = (
        {k: r["latency_ms"] for k, r in by_method(record, *at).items()} for at in ((1, 16), (1, 32), (2, 16))
    )
    tokens = {name: times["cached_tokens"] for name, times in small.items()}
    assert tokens == {"vanilla": 76, "random": 28, "stepprune": 28, "fastv": (2 * 76 + 4 * 28) / 6}
    assert large["stepprune"]["cached_tokens"] == 44, "as many as the budget, without training"
    assert two["random"]["kv_bytes"] == 2 * small["random"]["kv_bytes"]


def test_a_cpu_has_no_energy_no_peak_and_no_graph(measured):
    record, table = measured
    for result in record["results"]:
        times = result["latency_ms"]
        assert times["joules"] is times["peak_bytes"] is times["prefill_bytes"] is None
        assert "CUDA" in result["graph_ms"]["reason"]
    assert "LLM as graph, no row: there is no CUDA device" in table


def test_record_says_where_it_comes_from(measured, tiny_checkpoint):
    record, table = measured
    assert record["kind"] == "latency" and record["backbone"]["weights"] == "random"
    assert {"git_commit", "packages", "written", "seed"} <= record.keys()
    assert record["settings"]["text_tokens"] == 12 and record["device"]["kind"] == "cpu"
    assert record["dtype"] == "float32" and record["weights_bytes"] > 0
    assert record["backbone"]["name"] == "tiny-llava"
    assert str(tiny_checkpoint) not in json.dumps(record) + table, "no path of the machine"


def test_estimates_stand_beside_and_are_called_so(measured):
    record, table = measured
    for result in record["results"]:
        estimate = result["estimate"]
        assert estimate["launches"] > 0 and set(estimate["devices_ms"]) == {
            "RTX A6000", "A100 80GB", "H100 SXM"
        }  # fmt: skip
    assert "**estimates** from datasheets, no measurement" in table
    assert table.count("| vanilla") == 2 * 4, "two tables a block of budget and batch size"


def test_without_measuring_rows_say_so(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "estimates.json"
    shape = tiny_checkpoint / "config.json"
    arguments = ["--estimate", "--methods", "fastv,uniform", "--budget", 16, "--out", out]
    assert run("--backbone", shape, *arguments) == 0
    record = records.read(out)
    assert record["status"] == "not measured" and record["device"] is None
    assert all(r["status"] == "not measured" and "latency_ms" not in r for r in record["results"])
    assert all(r["estimate"]["tflops"] > 0 for r in record["results"])
    table = capsys.readouterr().out
    assert "**Not measured**" in table and "| uniform" in table and "ms (speed-up)" not in table


def test_checkpoint_is_asked_the_runs_own_questions(tiny_checkpoint, tiny_data, tmp_path, capsys):
    out = tmp_path / "checkpoint.json"
    arguments = ["--backbone", tiny_checkpoint, "--data", tiny_data, "--methods", "uniform", "--budget", 16]
    assert run(*arguments, "--repeats", 1, "--device", "cpu", "--out", out, "--profile") == 0
    record = records.read(out)
    questions = record["settings"]["inputs"].rpartition(": ")[2].split(", ")
    assert len(questions) == 4 and record["backbone"]["weights"] != "random"
    assert "Self CPU" in capsys.readouterr().out, "torch's profile"


def test_a_failing_method_is_named_and_the_others_are_measured(
    tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    def broken(self, image):
        raise ArithmeticError("of no use")

    monkeypatch.setattr("methods.uniform.Uniform.select", broken)
    out = tmp_path / "failed.json"
    arguments = ["--backbone", tiny_checkpoint / "config.json", "--random-weights", "--budget", 16]
    more = ["--methods", "uniform,random", "--repeats", 1, "--device", "cpu", "--out", out]
    assert run(*arguments, *more) == 1
    assert "FAILED uniform / 16: ArithmeticError: of no use" in capsys.readouterr().err
    status = {name: r["status"] for name, r in by_method(records.read(out)).items()}
    assert status == {"vanilla": "done", "uniform": "failed", "random": "done"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backbone", "llava-1.5-7b", "--random-weights"], "pocket-llava, or a CUDA device"),
        (["--backbone", "llava-1.5-7b"], "add --random-weights"),
        (["--backbone", "nonsense", "--random-weights"], "no shape of backbone 'nonsense'"),
        (["--backbone", "missing/config.json", "--estimate"], "no config.json of a known family"),
        (["--text-tokens", "20"], "use it with --random-weights"),
        (["--backbone", "llava-1.5-7b", "--estimate", "--budget", "600"], "1 to 576 visual tokens"),
    ],
)
def test_bad_input_is_one_line(arguments, says, tmp_path, capsys):
    assert run(*arguments, "--device", "cpu", "--out", tmp_path / "x.json") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and says in errors[0], errors
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_is_missing(tiny_checkpoint, tmp_path):
    out = tmp_path / "gpu.json"
    arguments = ["--backbone", tiny_checkpoint / "config.json", "--random-weights", "--budget", 16]
    assert run(*arguments, "--methods", "random,stepprune,fastv", "--device", "cuda", "--out", out) == 0
    record = records.read(out)
    assert record["dtype"] == "bfloat16" and record["device"]["cuda"]
    for name, result in by_method(record).items():
        times = result["latency_ms"]
        assert times["peak_bytes"] > times["prefill_bytes"] > 0 and times["repeats"] == 50
        assert (times["joules"] is None) == (times["joules_by"] is None)
        assert ("reason" in result["graph_ms"]) == (name == "fastv")


def test_random_weights_are_a_working_model(tiny_checkpoint):
    """Built without memory and filled in place: what is no parameter must be as in a model made normally."""
    from backbones import shapes
    from harness.costs import macs, random_weights

    shape = shapes.load(str(tiny_checkpoint / "config.json"))
    made = random_weights.build(shape, "cpu", "float32")
    with torch.device("cpu"):
        usual = type(made.model)(made.model.config)
    buffers = dict(usual.named_buffers())
    assert buffers and dict(made.model.named_buffers()).keys() == buffers.keys()
    for name, value in made.model.named_buffers():
        assert torch.equal(value, buffers[name]), name
    inputs = made.synthetic(text_tokens=12, batch=2)
    places = inputs["input_ids"] == made.model.config.image_token_id
    assert places.sum(1).tolist() == [64, 64] and inputs["input_ids"].shape == (2, 76)
    with torch.inference_mode():
        logits = macs.prefill(made.model, inputs)
    assert logits.isfinite().all() and logits.std() > 0


def test_random_weights_of_a_family_with_free_image_sizes():
    """Qwen2.5-VL, narrow: what the processor would give, M-RoPE positions (the engine checks them), a cut."""
    from backbones import shapes
    from harness.costs import macs, random_weights
    from methods import registry

    shape = random_weights.narrow(shapes.load("qwen2.5-vl-7b"))
    made = random_weights.build(shape, "cpu", "float32")
    inputs = made.synthetic(text_tokens=12, batch=2)
    assert inputs["image_grid_thw"].tolist() == [[1, 48, 48]] * 2 and made.num_visual_tokens == 576
    with torch.inference_mode(), registry.build("fastv", 64)(made.model) as trace:
        logits = macs.prefill(made.model, inputs)
    assert logits.isfinite().all() and logits.std() > 0
    assert trace.visual_tokens[:, 1:4].tolist() == [[576, 64, 64]] * 2


def test_an_unknown_family_is_one_line(monkeypatch):
    from backbones import families, shapes
    from harness.costs import random_weights

    monkeypatch.delitem(families._FAMILIES, "qwen2_5_vl")
    with pytest.raises(UserError, match=r"family 'qwen2_5_vl' is unknown; known: llava"):
        random_weights.build(shapes.load("qwen2.5-vl-7b"), "cpu", "float32")


@pytest.mark.parametrize(
    ("device", "milliseconds"), [("NVIDIA RTX A6000", True), ("NVIDIA H100 80GB HBM3", False)]
)
def test_the_papers_milliseconds_stand_beside_those_of_their_own_device_only(device, milliseconds):
    record = {"backbone": {"name": "llava-1.5-7b"}, "device": {"name": device}}
    totals = {"vanilla": 100.0, "fastv": 50.0}
    rows = [
        {"method": {"name": n, "spec": n}, "latency_ms": {"total": {"median": ms}}}
        for n, ms in totals.items()
    ]
    text = "\n".join(latency_table._paper(record, rows, 64))
    assert "1.46x" in text and "2.00x" in text, "both ratios"
    assert ("102.6" in text) == milliseconds and ("Ratios only" in text) != milliseconds
    assert not latency_table._paper(record, rows, 128), "the paper has this at 64 only"


def test_flops_of_a_config_file(tiny_checkpoint, capsys):
    arguments = ["--backbone", str(tiny_checkpoint / "config.json"), "--budget", "16", "--methods", "fastv"]
    assert app.main(["flops", *arguments]) == 0
    assert "equal to the last MAC" in capsys.readouterr().out


def test_help_teaches(capsys):
    assert app.main(["latency", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--random-weights" in text and "docs/efficiency.md" in text and "examples:" in text
