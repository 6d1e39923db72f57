"""docs/methods.md says what the code does: its schedules, costs, options and limits, recomputed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cost_claims import BUDGETS, CLAIMS, SHAPE_7B, cost_row, schedule_row

from methods import registry
from methods.base import ImageView, StageView
from methods.errors import UserError

PAGE = (Path(__file__).parents[2] / "docs/methods.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
TITLES = {
    "fastv": "FastV", "visionzip": "VisionZip", "prumerge": "PruMerge", "prumerge_plus": "PruMerge+",
    "sparsevlm": "SparseVLM", "pdrop": "PDrop", "holov": "HoloV",
    "divprune": "DivPrune", "vispruner": "VisPruner", "dart": "DART", "cdpruner": "CDPruner",
}  # fmt: skip
SCHEDULES = re.findall(r"^\| `([^`]+)` \| (\d+) \| \d.+$", PAGE, re.M)
COSTS = re.findall(r"^\| `([^`]+)` \| [^|\d`].+? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.M)


@pytest.mark.parametrize("spec, budget", SCHEDULES)
def test_schedule(spec, budget):
    assert schedule_row(spec, int(budget)) in PAGE.splitlines()


def test_every_method_has_its_schedules():
    stated = set(SCHEDULES)
    assert len(SCHEDULES) == len(stated)
    for name in set(CLAIMS) - {"vanilla"}:
        assert {(name, str(b)) for b in BUDGETS} <= stated
    for name, title in TITLES.items():
        section = SECTIONS[title]
        for word in ("acts", "reads", "keeps", "costs", "options", "source"):
            assert re.search(rf"^\| [\w, ]*\b{word}\b[\w, ]* \| .+ \|$", section, re.M) or (
                name == "prumerge_plus" and word in section
            )
        assert "| deviation | from | why |" in section
        for setting in registry.build(name, 64).parameters():
            assert f"`{setting}`" in section, f"{title} does not name its option {setting}"


def test_costs():
    assert {spec.partition(":")[0] for spec, *_ in COSTS} == set(TITLES)
    for spec, *numbers in COSTS:
        assert numbers == cost_row(spec), spec


def test_the_scale_of_costs():
    n, d, mlp, layers, vocabulary = SHAPE_7B.W, SHAPE_7B.D, 11008, SHAPE_7B.layers, 32064
    llm = layers * (n * (4 * d * d + 3 * d * mlp) + 2 * n * n * d) + d * vocabulary
    assert f"unpruned prefill is {2 * llm / 1e9:.0f} GFLOP" in PAGE
    token = 2 * (SHAPE_7B.d * SHAPE_7B.D + SHAPE_7B.D**2) / 1e9
    assert re.search(rf"one visual token\s+through the projector {token:.3f}\b", PAGE)


LIMITS = [
    (name, int(b), int(layers))
    for name, title in TITLES.items()
    for line in re.findall(r"`average`: smallest b: (.+) \|", SECTIONS[title])
    for b, layers in re.findall(r"(\d+) of (\d+) layers", line)
]


def test_limits_are_stated():
    assert len(LIMITS) == 8


@pytest.mark.parametrize("name, smallest, layers", LIMITS)
def test_limits(name, smallest, layers):
    spec = name if name == "pdrop" else f"{name}:schedule=average"
    registry.build(spec, smallest).validate(576, layers)
    for budget in range(max(1, smallest - 5), smallest):
        with pytest.raises(UserError, match=r"cannot be had|no ratio gives"):
            registry.build(spec, budget).validate(576, layers)


@pytest.mark.parametrize("spec", ["prumerge:schedule=adaptive", "prumerge_plus:schedule=adaptive"])
def test_schedules_that_ignore_the_budget(spec):
    rows = {schedule_row(spec, b).partition(f"| {b} |")[2] for b in BUDGETS}
    assert len(rows) == 1


def test_the_method_written_out_works():
    """The example for authors, as it stands on the page."""
    names: dict = {}
    exec("from methods.base import *; from typing import ClassVar; from dataclasses import dataclass", names)
    names["register"] = lambda cls: cls
    (code,) = re.findall(r"```python\n(.+?)```", SECTIONS["Which hook to use"], re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 13
    exec(compile(code, "docs/methods.md", "exec", dont_inherit=True), names)
    keys = torch.ones(30, 4)
    keys[[6, 11, 20]] = 9.0  # text, visual, visual
    hidden, columns = torch.zeros(32, 4), torch.arange(12, 27)
    view = StageView(None, torch.arange(15), 15, 1, hidden, columns, 2, (15,), 30, keys)
    (stage,) = names["LongKeys"](budget=2).stages(15, 6)
    assert stage.keys and stage.select(view).kept.tolist() == [1, 10]


def test_every_hook_is_listed():
    page = SECTIONS["Which hook to use"]
    for view, own in ((ImageView, ("grid", "heads", "pixels", "signals", "has_cls")), (StageView, ("kept",))):
        for name in view.__dataclass_fields__:
            if not name.startswith("_") and name not in (*own, "total", "count", "length"):
                assert f".{name}" in page, f"{view.__name__}.{name} is missing"
