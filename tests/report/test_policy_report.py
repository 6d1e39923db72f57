"""`python -m harness policy`: what it says of a policy that reads the question, of one that does not, and of
what stands in for the loop."""

import json

import pandas as pd
import pytest
import torch

from harness.check import suite
from harness.cli import app
from harness.pocket.data import build, documents
from harness.report import policy as report
from harness.tasks.suites import parse_tasks
from methods.errors import UserError
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.controls import FIRST, SHUFFLED, UNTRAINED, FirstStep, Shuffled
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.policy import Policy, PolicyConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """18 questions of Pocket-8's version 2, two tasks' on the same images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "questions", lambda version: dict.fromkeys(("gqa", "vqav2"), 12))
        patch.setattr(build, "SPLITS", ("calibration",))
        return build.build(tmp_path_factory.mktemp("data") / "v2", progress=False, version=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A policy that looks at every word."""
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(32, 32, heads=4, max_steps=24))
    with torch.no_grad():
        policy.encoder.text.weight.mul_(50)
        for block in policy.encoder.blocks:
            block.qkv.weight.mul_(4)
            block.out.weight.mul_(3)
    path = tmp_path_factory.mktemp("policy") / "reads.safetensors"
    means = [(4.0, 1.5), (8.0, 0.3), (12.0, 0.0)]
    checkpoints.Checkpoint(path, policy.config, "tiny-llava", 8.0, means).save(policy, LocalDenoiser(32))
    return path


@pytest.fixture(scope="module")
def found(data, checkpoint, tiny_checkpoint):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "CALIBRATED_ON", 2)
        options = report.PolicyOptions(
            benchmarks=tuple(parse_tasks("gqa,vqav2")),
            method=f"stepprune:checkpoint={checkpoint}",
            backbone=str(tiny_checkpoint),
            data=data,
        )
        return report.measure(options)


def test_every_way_of_answering_reaches_the_method(found):
    ways = found["ways"]
    assert len(ways) == 7
    assert ways[report.OWN]["overlap"]["mean"] == 1 and ways[report.OWN]["less"]["mean"] == 0
    for way in (report.BLANK, report.OTHER, FIRST, SHUFFLED, UNTRAINED):
        assert ways[way]["overlap"]["mean"] < 0.9, way
    for way in (FIRST, SHUFFLED):
        assert ways[way]["K"] == ways[report.OWN]["K"], "as many tokens as the loop"
    assert ways[report.VANILLA]["K"] == {"mean": 64, "std": 0}
    assert ways[report.VANILLA]["recall"]["mean"] == 100 > ways[report.OWN]["recall"]["mean"] > 0


def test_the_figures_belong_together(found):
    assert (found["questions"], found["budget"], found["most_steps"]) == (18, 8, 24)
    assert found["method"] == "stepprune:checkpoint=reads.safetensors" and len(found["weights"]) == 16
    regimes = found["groups"]["regime"]
    assert list(regimes) == ["dense", "medium", "sparse"]
    assert [r["questions"] for r in regimes.values()] == [6, 6, 6]
    own = found["ways"][report.OWN]
    assert sum(r["K"]["mean"] for r in regimes.values()) == pytest.approx(3 * own["K"]["mean"])
    assert -1 <= found["K"]["rank correlation with evidence"]["rho"] <= 1
    text = report.render(json.loads(json.dumps(found)))
    assert max(map(len, text.splitlines())) <= 100 and "words blanked" in text and "dense" in text


def table(**columns) -> pd.DataFrame:
    """Two questions on each of 20 images of a kind, as it is and with the words blanked."""
    kept = [frozenset({1, 2, 3}), frozenset({2, 3, 4})]
    rows = [
        {
            "task": "gqa", "row": 2 * i + j, "text": f"question {j}", "image": f"image {i}", "way": way,
            "right": float(way == report.OWN or i % 2), "kept": kept[j], "K": 3, "tokens": 9, "recall": None,
            "things": i, "evidence": None, "regime": "dense" if i < 10 else "sparse", "background": None,
        }
        for way in (report.OWN, report.BLANK)
        for i in range(20)
        for j in range(2)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def test_overlap_and_cost_are_what_they_are_called():
    own = report.described(table(), 3)
    assert own["pairs"]["one image"] == {"mean": 0.5, "interval": (0.5, 0.5), "n": 20}
    blank = own["ways"][report.BLANK]
    assert blank["overlap"]["mean"] == 1 and blank["less"]["mean"] == 50
    low, high = blank["less"]["interval"]
    assert 25 < low < 32 and 68 < high < 75, "20 images, not 40 questions"
    assert blank["less_by_regime"]["dense"]["mean"] == 50 and own["K"]["at_most"] == 100
    assert own["K"]["rank correlation with evidence"] is None
    assert own["K"]["rank correlation with things"]["rho"] == 0, "K is the same for all"
    assert blank["recall"] is None


def test_suite_holds_the_shipped_policies_to_reading(tmp_path, monkeypatch, capsys):
    head = {"method": "stepprune", "backbone": "b", "budget": 64}
    path = tmp_path / "b" / "policy_k64.json"
    path.parent.mkdir()

    def holds(**columns):
        path.write_text(json.dumps(head | report.described(table(**columns), 3)))
        return [point.holds for point in suite.reads(path)]

    assert holds() == [True, True]
    assert holds(right=1.0) == [False, True]
    assert holds(kept=[frozenset({1})] * 80) == [True, False]
    assert holds(regime=None) == [None, True]
    monkeypatch.setattr(suite, "POLICIES", tmp_path)
    monkeypatch.setattr(suite, "FOLDERS", ())
    assert app.main(["suite"]) == 1
    assert "no data  7  stepprune on b at 64: dense, blanked words cost unknown" in capsys.readouterr().out
    path.write_text("{}")
    with pytest.raises(UserError, match=r"policy_k64.json is not what"):
        suite.reads(path)


def test_bad_input_is_one_line(tiny_checkpoint, tiny_data, capsys):
    arguments = ["policy", "--backbone", str(tiny_checkpoint), "--data", str(tiny_data), "--split", "eval"]
    said = {"nobody": "unknown method", "stepprune": "no checkpoint", "vanilla": "name a method"}
    for method, words in said.items():
        assert app.main([*arguments, "--method", method]) == 2
        assert words in capsys.readouterr().err


def test_controls_take_as_many_tokens_as_the_loop():
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(16, 12, heads=4, max_steps=25)).eval()
    policy.stop_bias.fill_(0.5)
    memory = policy.remember(torch.randn(3, 30, 16), torch.randn(3, 4, 12))
    loop = policy.decode(memory)
    logits = policy.logits(policy.start.expand(3, 1, -1), memory)[:, 0, :-1]
    for control in (FirstStep, Shuffled):
        other = control(policy)(memory)
        assert other.count.tolist() == loop.count.tolist() and max(loop.count) > 3
        assert torch.equal(other.order[:, 0], loop.order[:, 0]), "nothing was chosen before the first step"
        assert [len(k) for k in other.kept()] == loop.count.tolist()
        assert any(a.tolist() != b.tolist() for a, b in zip(other.kept(), loop.kept()))
    for kept, given in zip(FirstStep(policy)(memory).kept(), logits):
        assert set(kept.tolist()) == set(given.topk(len(kept)).indices.tolist())
