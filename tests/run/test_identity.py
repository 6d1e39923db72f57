"""What is re-used when code has changed, and what is measured again: by the command, and by digests."""

import sys
from pathlib import Path

import pandas as pd
import pytest

from harness.cli import app
from harness.report import figures
from harness.run import identity
from harness.store import records
from harness.tasks import pruned_model
from harness.tasks.suites import BENCHMARKS
from methods import registry


@pytest.fixture
def edit(monkeypatch):
    """edit(file, old, new): the run reads that source file so from now on; no file is changed."""
    real, edits = identity._read, []

    def read(path, package):
        source = path.read_bytes()
        for file, old, new in edits:
            if str(path).endswith(file):
                assert old.encode() in source, f"{file} has no {old!r} any more; edit another line"
                source = source.replace(old.encode(), new.encode(), 1)
        return identity._parsed(source, package) if edits else real(path, package)

    monkeypatch.setattr(identity, "_read", read)
    return lambda file, old, new: edits.append((file, old, new))


@pytest.fixture(scope="module")
def command(tiny_checkpoint, tiny_data, tmp_path_factory):
    """run_all's arguments for three methods on six questions, into one folder."""
    out = tmp_path_factory.mktemp("run")
    words = ["--backbone", tiny_checkpoint, "--data", tiny_data, "--methods", "random,pdrop", "--limit", "6"]
    words += ["--budget", "32", "--tasks", "pope", "--max-new-tokens", "2", "--latency-repeats", "1"]
    return [str(word) for word in (*words, "--device", "cpu", "--out", out)]


@pytest.fixture
def run(command, capsys, monkeypatch):
    """run(*further arguments) -> (what the command printed, number of answers that it computed)."""
    real, asked = pruned_model.answer, []

    def counted(backbone, pruner, questions, inputs, *more):
        asked.extend(questions)
        return real(backbone, pruner, questions, inputs, *more)

    monkeypatch.setattr(pruned_model, "answer", counted)
    monkeypatch.setattr(figures, "draw", lambda *arguments: None)  # a second per run, and not looked at

    def call(*more):
        asked.clear()
        assert app.run_all([*command, *more]) == 0
        return " ".join(capsys.readouterr().out.split()), len(asked)  # lines are wrapped

    return call


COMMENTED = [
    ("methods/fastv.py", "\ndef ", "\n# a remark\n\n\ndef "),
    ("methods/pdrop.py", '"""', '"""Said otherwise. '),
    ("backbones/engine/hooks.py", "\nclass ", "\n# a remark\nclass "),
    ("harness/tasks/benchmarks/pope.py", '"""', '"""Said otherwise. '),
]
#: a new statement
CHANGE = "\ndef ", "\nCHANGED = True\n\n\ndef "


def test_a_comment_costs_nothing_and_a_changed_helper_costs_its_methods(run, edit, command):
    """The whole story of one folder, in the order in which it happens to a user."""
    said, answers = run()
    each = answers // 3  # documents of the slice
    assert "3 to compute" in said and answers == 3 * each > 0 and "anew" not in said
    for change in COMMENTED:
        edit(*change)
    said, answers = run()
    assert "0 to compute" in said and answers == 0 and "anew" not in said, "comments were measured again"
    # PDrop ranks by a helper that stands in FastV's file
    edit("methods/fastv.py", *CHANGE)
    said, answers = run("--keep-results")
    assert answers == 0 and "pdrop kept as measured before methods/fastv.py changed (--keep-results)" in said
    text = " ".join(Path(command[-1], "leaderboard.md").read_text().split())
    assert "| pdrop ‡ |" in text and "random ‡" not in text and "vanilla ‡" not in text
    assert "‡ measured before methods/fastv.py changed" in text
    table = pd.read_csv(f"{command[-1]}/leaderboard.csv").set_index("method")
    assert table.loc["pdrop", "other_code"] == "methods/fastv.py" and table["other_code"].notna().sum() == 1
    said, answers = run()
    assert "pdrop measured anew: methods/fastv.py changed" in said and answers == each
    assert "2 finished earlier" in said and "‡" not in said
    # scores are made anew from the answers that are there
    edit("harness/tasks/benchmarks/pope.py", *CHANGE)
    said, answers = run()
    assert "all methods scored anew: harness/tasks/benchmarks/pope.py changed" in said and answers == 0
    edit("backbones/hub/load.py", *CHANGE)
    said, answers = run()
    assert "all methods measured anew: backbones/hub/load.py changed" in said and answers == 3 * each
    assert run()[1] == 0


PLUG_IN = '''
from dataclasses import dataclass
from my_plug_in.helpers import order
from methods.base import ImageView, Pruner, Selection

@dataclass
class Tilted(Pruner):
    """Keep the brightest patches."""
    name = "tilted"

    def select(self, image: ImageView) -> Selection:
        return Selection(order(image.features.float().norm(dim=-1))[: self.count(len(image.features))])
'''
HELPERS = "def order(values):\n    return values.argsort(descending=True)\n"


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Folder of an importable package with a method and a helper module."""
    folder = tmp_path / "my_plug_in"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "method.py").write_text(PLUG_IN)
    (folder / "helpers.py").write_text(HELPERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_registered", dict(registry.available()))
    import my_plug_in.method

    registry.register(my_plug_in.method.Tilted)
    yield folder
    for name in [n for n in sys.modules if n.startswith("my_plug_in")]:
        del sys.modules[name]


def test_a_plug_ins_helper_counts(plug_in, run):
    """A sign turned over in helpers.py was served as "2 finished earlier are re-used"."""
    run("--methods", "tilted")
    (plug_in / "helpers.py").write_text("# brightest first\n" + HELPERS)
    assert run("--methods", "tilted")[1] == 0
    (plug_in / "helpers.py").write_text(HELPERS.replace("True", "False"))
    said, answers = run("--methods", "tilted")
    assert "tilted measured anew: my_plug_in/helpers.py changed" in said and answers > 0


def test_a_single_files_siblings_count(tmp_path, monkeypatch):
    """... also by a lazy or a dynamic import; other distributions count by their version."""
    (tmp_path / "lone_pruner.py").write_text(
        "import numpy\nfrom methods.vanilla import Vanilla\n"
        "class Lone(Vanilla):\n    def stages(self, n, layers):\n        import lone_helper\n"
        "        return ()\n"
    )
    helper, deeper = tmp_path / "lone_helper.py", tmp_path / "lone_deeper.py"
    helper.write_text("import importlib\nx = importlib.import_module('lone_deeper')\n")
    deeper.write_text("y = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import lone_pruner

    before = identity.method_code(lone_pruner.Lone)
    assert {"lone_pruner.py", "lone_helper.py", "lone_deeper.py", "methods/vanilla.py"} <= set(before)
    assert "numpy" in before and not any(name.startswith("torch/") for name in before)
    deeper.write_text("y = 2\n")
    after = identity.method_code(lone_pruner.Lone)
    assert identity.changed({"code": before}, {"code": after}) == (["lone_deeper.py"], [])


def test_every_module_that_is_named_exists():
    for name in (*identity._IN_THE_KEY, *identity._SCORING, *identity._ANSWERING, *identity._MEASURING):
        assert identity._find(name), f"harness/run/identity.py names {name}, which is no module any more"


def test_the_other_family_and_training_do_not_count():
    llava, qwen = identity.answer_code("llava"), identity.answer_code("qwen2_5_vl")
    assert "backbones/families/llava.py" in llava and "backbones/families/llava.py" not in qwen
    assert "backbones/families/qwen2_5_vl.py" in qwen and "backbones/families/qwen2_5_vl.py" not in llava
    for name in ("engine/hooks", "engine/inside_llm", "engine/vision_cache", "layout", "hub/load"):
        assert f"backbones/{name}.py" in llava, f"an answer depends on backbones/{name}.py"
    code = identity.method_code(registry.available()["stepprune"])
    assert "methods/stepprune/policy.py" in code
    assert not [name for name in code if "training" in name or "bench" in name]
    assert "harness/costs/latency.py" in identity.cost_code("llava")
    scoring = identity.scoring_code(BENCHMARKS["mme"])
    assert "harness/tasks/benchmarks/mme.py" in scoring and "harness/tasks/bootstrap.py" in scoring
    assert "harness/tasks/benchmarks/pope.py" not in scoring


def test_layout_and_words_do_not_count():
    def digest(source):
        return identity._parsed(source.encode(), "p")[0]

    plain = "class A:\n    def f(self, x):\n        return x + 1\n"
    dressed = '"""Doc."""\n# why\n\nclass A:\n    """Doc."""\n\n    def f(self, x):\n' \
        '        """Doc."""\n        return (x\n            + 1)  # why\n'  # fmt: skip
    assert digest(plain) == digest(dressed)
    for other in (plain.replace("1", "2"), plain.replace("+", "-"), plain.replace("1", "1.0")):
        assert digest(other) != digest(plain)
    assert digest("x = 'a'") != digest("x = b'a'") != digest("x = a")


def test_a_record_says_what_its_key_is_made_of(run, command):
    run()
    for path in (*Path(command[-1]).glob("cells/*/*.json"), *Path(command[-1]).glob("efficiency/*.json")):
        record = records.read(path, "cell" if path.parts[-3] == "cells" else "efficiency")
        assert records.digest(record["identity"]) == record["key"] and record["key"] in path.name
