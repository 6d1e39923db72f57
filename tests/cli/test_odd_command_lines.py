"""Some 2,000 odd command lines in one process: each is refused with one line and exit code 2, and nothing is
loaded, drawn, made or locked for it."""

import json
import subprocess
import sys

import pytest
import short_run

from harness.cli import app

#: arguments with which a command would run, where it needs any or may be dangerous without
COMMANDS = {
    "run": [],
    "doctor": ["--no-estimate"],
    "sweep-bench": [],
    "check": [],
    "parity": ["--golden", "tests/golden"],
    "flops": [],
    "latency": [],
    "overlay": [],
    "adaptive": ["results"],
    "train": ["stepprune", "--target-tokens", "64"],
    "ablate": ["stepprune"],
    "calibrate": ["stepprune", "--checkpoint", "k64", "--tokens", "48"],
    "bench-policy": ["stepprune"],
    "serve-bench": ["--url", "http://127.0.0.1:1/v1"],
    "bench": [],
}
#: by the parser of an option's values: what it must refuse
WRONG = {
    "whole": [
        "",
        " ",
        "many",
        "1.5",
        "1e3",
        "³",
        "0x10",
        "nan",
        "-7",
        "--",
        "99999999999999999999",
        "+1 ",
        "1,2",
    ],
    "number": ["", " ", "many", "nan", "inf", "-inf", "1e999", "--", "³", "1,5", "-1e-300"],
    "as_text": ["", "   ", "a\0b", "\udc80"],
    "as_path": ["", "   ", "a\0b", "\udc80"],
    "as_budget": [
        "",
        "0",
        "-4",
        "1.0",
        "0.0",
        "nan",
        "inf",
        "1e3",
        "many",
        "--",
        "64,32",
        "²",
        "-0.5",
        "٣",
        "6_4",
        "+64",
        "1e-1",
        ".",
        "0x40",
    ],
    "as_limit": ["", "0", "-3", "some", "³", "1.5", "ALL", "--", "nan"],
    "one_of": ["", "nonsense", "PAPER", "paper,open"],
    "choice": ["", "nonsense", "--", "FLOAT32"],
}
#: what goes wrong only when it is looked at more closely
MEANING = {
    "run": [
        "--methods nosuch",
        "--methods ,",
        "--methods k=3",
        "--methods all,fastv",
        "--methods fastv:nosuch=1",
        "--methods fastv:k",
        "--methods fastv:k=",
        "--methods fastv:k=2.5",
        "--methods fastv:k=nan",
        "--methods fastv:k=inf",
        "--methods fastv:k=-1",
        "--methods fastv:k=99",
        "--methods fastv:k=99999999999999999999999",
        "--methods holov:alpha=nan",
        "--methods holov:alpha=inf",
        "--methods holov:alpha=-inf",
        "--methods fastv:k=1,k=2",
        "--methods fastv:k=2,fastv",
        "--methods fastv,fastv",
        "--methods random:seed=0,random",
        "--methods stepprune:checkpoint=nowhere.safetensors",
        "--methods stepprune:checkpoint=/",
        "--methods stepprune:checkpoint=.",
        "--methods random:seed=1e99",
        "--tasks nosuch",
        "--tasks ,",
        "--tasks all,pope",
        "--tasks pope,paper",
        "--tasks paper,pope",
        "--tasks paper:",
        "--tasks paper:nosuch",
        "--tasks paper",  # nothing in the cache
        "--backbone nosuch",
        "--backbone no/such/thing",
        "--backbone tests",
        "--backbone README.md",
        "--backbone llava-1.5-7b",
        "--backbone {long}",
        "--backbone pocket-llava --revision main",
        "--budget 577",
        "--budget 64 577",
        "--budget 0.0001",
        "--budget",
        "--device tpu",
        "--device cuda:99",
        "--device cuda:-1",
        "--device meta",
        "--device cpu:cpu",
        "--workers 2",
        "--address auto",
        "--min-pixels 10 --max-pixels 5",
        "--data nowhere",
        "--data README.md",
        "--out README.md",
        "--out README.md/below",
        "extra",
        "-- extra",
        "-x",
        "-",
        "--fresh=1",
        "--budget=64 32",
    ],
    "doctor": ["--price 0", "--price -1", "--price nan", "--budget 577", "--methods nosuch", "--device tpu"],
    "bench": ["--methods nosuch", "--methods fastv:k=x", "--backbone nosuch"],
    "sweep-bench": ["--engine ray", "--methods nosuch", "--budget 577", "--data nowhere"],
    "check": ["nowhere", "README.md", "results nowhere", "--baseline nowhere"],
    "parity": ["--golden nowhere", "--golden README.md", "extra"],
    "flops": [
        "--backbone gpt",
        "--backbone nowhere/config.json",
        "--backbone {listed}",
        "--budget 577",
        "--methods nosuch",
        "--methods fastv:k=nan",
        "--image-size 100",
        "--image-size 448",
        "--text-tokens 99999999",
        "--text-tokens 131073",
    ],
    "latency": [
        "--random-weights --estimate",
        "--text-tokens 5",
        "--backbone llava-1.5-7b",
        "--backbone nosuch",
        "--backbone gpt --estimate",
        "--methods nosuch",
        "--methods fastv:k=2,fastv",
        "--budget 577",
        "--data nowhere",
        "--out README.md/below.json",
        "--decode-tokens 99999999",
        "--device cuda:99",
    ],
    "overlay": [
        "--images README.md",
        "--images nowhere.png --question What?",
        "--images README.md pyproject.toml --question What?",
        "--device cuda:99",
        "--device tpu",
        "--methods nosuch",
        "--methods fastv:k=nan",
        "--backbone nosuch",
        "--out tests",
        "--out README.md/x.png",
        "--budget 64 32",
    ],
    "adaptive": ["--method nosuch", "extra"],
    "serve-bench": [
        "--url ftp://here",
        "--url localhost:8000",
        "--concurrency 0",
        "--concurrency 1 x",
        "extra",
    ],
    "train": [
        "--length-weight 0.1",
        "--batch-size 30",
        "--data x.json",
        "--data nowhere.json --images tests",
        "--start-from nowhere.safetensors",
        "--backbone nosuch",
        "--gamma 1.5",
        "--chain -2",
        "--text-gate-until 2",
        "extra",
    ],
    "ablate": [
        "--max-steps -1",
        "--rows nosuch",
        "--rows paper nosuch",
        "--seeds 0",
        "--target-tokens 1 --length-weight 1",
    ],
    "calibrate": [
        "--tokens 48 many",
        "--tokens -1",
        "--backbone nosuch",
        "--checkpoint nowhere",
        "--device tpu",
    ],
    "bench-policy": [
        "--repeats 0",
        "--steps 0",
        "--steps 5 x",
        "--batch-size 0",
        "--dtype int8",
        "--device cuda:99",
    ],
}
TOGETHER = ["", "nosuch", "--nosuch", "trian stepprune", "RUN", "train", "train fastv --target-tokens 3"]
TOGETHER += ["calibrate stepprune", "calibrate stepprune --tokens 3", "parity", "adaptive", "bench-policy"]


def kind(option) -> str:
    parser = option.type_descriptor.parameter_info.parser
    return parser.__qualname__.partition(".")[0] if parser else "choice"


def lines() -> list[tuple[str, ...]]:
    found = [tuple(line.split()) for line in TOGETHER]
    for name, command in app.parser().commands.items():
        base = COMMANDS.get(name, [])
        for option in command.params:
            if option.param_type_name != "option":
                continue
            flag = option.opts[0]
            found += [(name, *base, f"{flag}x"), (name, *base, f"-{flag}", "1")]
            if option.is_flag:
                found.append((name, *base, f"{flag}=yes"))
                continue
            values = WRONG[kind(option)]
            if flag == "--chain":
                values = [v for v in values if v != "-1"]
            found += [(name, *base, f"{flag}={value}") for value in values]
            found.append((name, *base, flag))
        found += [(name, *base, *line.split()) for line in MEANING.get(name, ())]
    return found


@pytest.fixture
def nothing_happens(monkeypatch, tmp_path):
    """Whatever loads, draws or makes something fails the test. Returns a look at the folder for results."""

    def forbid(what: str):
        return lambda *a, **k: pytest.fail(f"{what} for a command line that is refused")

    monkeypatch.setattr("backbones.load", forbid("loaded a model"))
    monkeypatch.setattr("backbones.hub.load.load", forbid("loaded a model"))
    monkeypatch.setattr("harness.costs.random_weights.build", forbid("built a model"))
    monkeypatch.setattr("harness.pocket.data.ensure", forbid("drew Pocket-8"))
    for module in ("report.latency_report", "bench.sweep", "run.runner"):  # importers first
        monkeypatch.setattr(f"harness.{module}.check_writable", forbid("made a folder"))
    monkeypatch.setattr("harness.run.runner.only_run", forbid("locked a folder"))
    monkeypatch.setattr("methods.stepprune.training.train.train", forbid("trained"))
    monkeypatch.setattr("harness.check.run", forbid("checked"))
    monkeypatch.setattr("harness.bench.serve.measure", forbid("asked a server"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def test_every_odd_command_line_is_one_line(nothing_happens, tmp_path, capsys, no_network):
    listed = tmp_path / "config.json"
    listed.write_text(json.dumps([1, 2]))
    every = lines()
    assert len(every) > 2000
    wrong = []
    for line in every:
        arguments = [a.format(long="x" * 300, listed=listed) if a.startswith("{") else a for a in line]
        try:
            code = app.main(arguments)
        except BaseException as error:  # a traceback is what this test looks for
            code = f"{type(error).__name__}: {error}"
        said = capsys.readouterr()
        if code != 2 or said.err.count("\n") != 1 or not said.err.startswith("error: "):
            wrong.append(f"{line}: {code}, {said.err[-300:]!r}")
    assert not wrong, f"{len(wrong)} of {len(every)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", app.parser().commands)
def test_help_of_every_command_has_examples_and_fits_a_hundred_columns(name, capsys):
    assert app.main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert "example" in said
    assert not [line for line in said.splitlines() if len(line) > 100]


def test_help_imports_nothing_heavy():
    code = """
import sys
from harness.cli import app
for name in app.parser().commands:
    assert app.main([name, "--help"]) == 0
assert app.main(["--help"]) == app.main(["--version"]) == 0
heavy = {"torch", "pandas", "transformers", "PIL", "matplotlib", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "visual-token-pruning-bench 0." in done.stdout


def test_several_values_behind_one_option_or_the_option_several_times():
    def budgets(*arguments: str) -> tuple:
        return short_run.config(arguments).budgets

    assert budgets("--budget", "192", "0.5", "64") == (192, 0.5, 64)
    assert budgets("--budget", "192", "--budget", "0.5", "--budget=64") == (192, 0.5, 64)
    assert budgets("--budget", "192", "128", "--blind", "--budget", "64", "64") == (192, 128, 64)
    assert budgets() == (64,)


def test_a_reader_that_closes_the_pipe_is_no_error():
    script = f"{sys.executable} run_all.py --list | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("methods")
