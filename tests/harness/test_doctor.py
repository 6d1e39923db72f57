"""`python -m harness doctor`: what it checks, what it says is missing, its exit code; no network."""

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import pyarrow.parquet
import pytest
import short_run
import torch

from harness.cli import app
from harness.doctor import estimate, machine, online
from harness.doctor.findings import MISSING, NOTE, OK
from harness.pocket.data import build, documents
from harness.tasks.suites import BENCHMARKS

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def doctor(capsys, tmp_path):
    def ask(*arguments) -> tuple[int, str]:
        more = ["--device", "cpu", "--out", tmp_path / "out"]
        code = app.main(["doctor", *(str(a) for a in (*arguments, *more))])
        return code, capsys.readouterr().out

    return ask


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_run_that_could_start(doctor, hub_checkpoints, mirror, family, tmp_path):
    more = ["--min-pixels", 4 * 784, "--max-pixels", 48 * 784] if family == "qwen2_5_vl" else []
    tasks = "paper:mme,mmbench_cn"
    code, said = doctor(
        "--backbone", hub_checkpoints[family], "--tasks", tasks, "--data", mirror, "--budget", "4", *more
    )
    assert code == 0 and said.strip().endswith("The run can start."), said
    assert "MISSING" not in said and "NETWORK" not in said
    assert said.count("columns and first rows as expected") == 2
    assert said.count("answer as the unpruned model does") == 1 and "time here: about" in said
    if family == "llava":
        assert "64 places for the first image (8 x 8)" in said
    assert not (tmp_path / "out").exists(), "nothing is written"


@pytest.mark.parametrize(("family", "drawn"), [("llava", ""), ("qwen2_5_vl", "-varied")])
def test_pocket8_is_checked_as_the_backbone_will_see_it(
    doctor, hub_checkpoints, family, drawn, tmp_path, monkeypatch
):
    monkeypatch.setattr(documents, "questions", lambda version: {"gqa": 4})
    monkeypatch.setenv("POCKET8_HOME", str(tmp_path / "pocket8"))
    code, said = doctor(
        "--backbone", hub_checkpoints[family], "--tasks", "gqa", "--no-model", "--no-estimate"
    )
    assert code == 0 and "data gqa" in said, said
    assert [p.name for p in (tmp_path / "pocket8").iterdir()] == [f"v{build.version_of(bool(drawn))}{drawn}"]


def test_nothing_is_here(doctor, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    code, said = doctor("--backbone", "llava-1.5-7b", "--tasks", "paper", "--no-estimate")
    assert code == 1 and "11 missing" in said
    for command in (
        "hf download llava-hf/llava-1.5-7b-hf",
        "hf download lmms-lab-encoder/MMBench --repo-type",
    ):
        assert command in said
    assert "no GPU" in said and "28.2 GB of weights in float32" in said
    assert "not loaded" in said
    code, said = doctor("--backbone", "some/model", "--tasks", "paper")
    assert code == 1 and "hf download some/model" in said and "need the checkpoint first" in said


def test_damaged_rows_are_named(doctor, hub_checkpoints, mirror, tmp_path):
    copy = shutil.copytree(mirror, tmp_path / "copy")
    path = copy / "lmms-lab-encoder/POPE/data/test-00001-of-00002.parquet"
    rows = pyarrow.parquet.read_table(path)
    broken = rows.to_pylist()
    broken[0]["image"]["bytes"] = broken[0]["image"]["bytes"][:40]
    broken[1]["answer"] = "maybe"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(broken, schema=rows.schema), path)
    code, said = doctor(
        "--backbone", hub_checkpoints["llava"], "--tasks", "paper:pope", "--data", copy, "--no-estimate"
    )
    assert code == 1
    assert re.search(
        r"1 images cannot be shown .*test-00001-of-00002.parquet row 0, .+: (not an image|cannot be decoded)",
        said,
    )


def test_bad_input_is_exit_code_2(hub_checkpoints, mirror, capsys):
    base = ["doctor", "--backbone", str(hub_checkpoints["llava"]), "--data", str(mirror)]
    assert app.main([*base, "--tasks", "paper:nosuch"]) == 2
    assert app.main([*base, "--tasks", "paper", "--budget", "0"]) == 2
    assert app.main([*base, "--tasks", "paper", "--price", "-1"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def config(**changes):
    base = ["--backbone", "llava-1.5-7b", "--tasks", "paper", "--device", "cpu"]
    return replace(short_run.config(base), **changes)


def test_memory_of_a_gpu(monkeypatch):
    text = {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_size": 4096,
    }
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")

    def level(free: float, **changes) -> str:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        (found,) = machine.memory(7.06e9, config(device="cuda:0", dtype="bfloat16", **changes), text)
        return found.level

    # 14.1 GB of weights, 4.3 of caches and overhead, 4.3 of keys and values for 8 prompts of 1,024 tokens
    assert [level(gb * 1e9) for gb in (13, 16, 23)] == [MISSING, NOTE, OK]
    assert level(20e9, batch_size=1) == OK


def test_the_estimate_counts_the_runs_answers():
    found = list(estimate.check(config(methods=("fastv", "uniform")), [], None, 2.0))
    known = sum(b.documents for b in BENCHMARKS.values()) - BENCHMARKS["vqav2"].documents + 10_000
    assert f"{known} documents x 3 methods and budgets = {3 * known} answers" in found[0].text
    assert len(found) == 4 and all(
        "not this machine" in f.text and "at 2 an hour" in f.text for f in found[1:]
    )
    hours = [float(f.text.split("at least ")[1].split()[0]) for f in found[1:]]
    assert hours == sorted(hours, reverse=True) and hours[-1] > 0.05, "A6000, A100, H100"


def test_the_estimate_knows_what_questions_on_one_image_share():
    own = config(methods=("fastv", "uniform"))
    share = {b.name: estimate.passes(own, b, b.documents) for b in own.benchmarks}
    gqa = 398 / 12_578
    assert share["gqa"] == pytest.approx(gqa + (1 - gqa) / 8), "31 questions an image, batches of 8"
    assert share["scienceqa"] == 1.0
    assert 0.85 < share["vqav2"] < 1.0, "10,000 of 214,354 questions meet few images twice"
    assert estimate.passes(replace(own, batch_size=1), BENCHMARKS["gqa"], 12_578) == 1.0
    for found in list(estimate.check(own, [], None, None))[1:]:
        hours = float(found.text.split("at least ")[1].split()[0])
        apart = float(re.search(r"([\d.]+) if methods and questions", found.text)[1])
        assert hours < 0.8 * apart, found.text


def test_online_says_so_first(monkeypatch, caplog):
    files = [SimpleNamespace(rfilename=n, size=s) for n, s in (("data/test-0.parquet", 2e9), ("x.bin", 9e9))]

    class Api:
        def dataset_info(self, repo, **more):
            assert caplog.messages[0].startswith("NETWORK: asking"), "before the hub is asked"
            if repo == "org/closed":
                raise OSError("403 forbidden\nmore")
            return SimpleNamespace(siblings=files, sha="c0ffee", gated="auto")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    wanted = [(repo, "dataset", None, ("data/test-*",)) for repo in ("org/open", "org/closed")]
    wanted.append(("org/other", "dataset", None, ("dev/*",)))
    found = list(online.check(wanted))
    assert [f.level for f in found] == [OK, MISSING, MISSING]
    assert "commit c0ffee, 1 files, 2.0 GB" in found[0].text and "gated" in found[0].text
    assert "403 forbidden" in found[1].text
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (found,) = online.check(wanted)
    assert found.level == MISSING and len(caplog.messages) == 1
