"""Names, parameters and plug-ins."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from methods import registry
from methods.errors import UserError

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.base import Pruner, Selection


@dataclass
class First(Pruner):
    """The first b patches."""

    name: ClassVar[str] = "{name}"

    def select(self, image):
        return Selection(torch.arange(self.count(len(image.features))))
'''


def test_known_methods():
    names = list(registry.available())
    assert names[0] == "vanilla" and names[1:] == sorted(names[1:])
    assert {"random", "uniform", "downsample", "visionzip", "fastv"} <= set(names)


def test_specs():
    pruner = registry.build("fastv:k=3, schedule=average", budget=64)
    assert (pruner.k, pruner.schedule, pruner.kept, pruner.budget) == (3, "average", None, 64)
    assert pruner.parameters() == {"k": 3, "schedule": "average", "kept": None}
    for name in registry.available():
        json.dumps(registry.build(name, budget=0.25).parameters())


@pytest.mark.parametrize(
    "spec, words",
    [
        ("fastvv", "unknown method 'fastvv'; known: vanilla, .*fastv"),
        ("fastv:layer=3", "no parameter 'layer'; it takes: k, kept, schedule"),
        ("random:budget=3", "no parameter 'budget'"),
        ("vanilla:k=3", "it takes: none"),
        ("fastv:k=two", "k is 'two'; it takes a whole number"),
        ("fastv:k=2.5", "whole number"),
        ("fastv:schedule=mean", "schedule is 'mean'; it takes 'kept' or 'average'"),
        ("fastv:k", "'k': write key=value"),
        ("fastv:k=1,k=2", "twice"),
    ],
)
def test_bad_specs(spec, words):
    with pytest.raises(UserError, match=words) as error:
        registry.build(spec, budget=64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("budget", [0, -1, 577, 0.0, 1.5, "many", True])
@pytest.mark.parametrize("name", ["random", "uniform", "downsample", "visionzip", "fastv"])
def test_bad_budgets(name, budget):
    with pytest.raises(UserError, match="budget"):
        registry.build(name, budget=budget).validate(576, 32)


@pytest.mark.parametrize("name", ["random", "uniform", "downsample", "visionzip", "fastv"])
def test_budgets_from_one_to_all(name):
    for budget in (1, 2, 64, 575, 576, 0.001, 0.999):
        registry.build(name, budget=budget).validate(576, 12)
    assert registry.build(name, budget=0.111).count(576) == 64


@pytest.fixture
def plugins(monkeypatch, tmp_path):
    """Pretends that packages with these entry points are installed; the registry is as before afterwards."""
    monkeypatch.setattr(registry, "_registered", dict(registry.available()))
    monkeypatch.syspath_prepend(tmp_path)

    def install(**modules):
        points = []
        for module, source in modules.items():
            if source is not None:
                (tmp_path / f"{module}.py").write_text(source)
            points.append(importlib.metadata.EntryPoint(module, f"{module}:First", registry.GROUP))
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda group: [p for p in points if p.group == group]
        )

    return install


def test_entry_point(plugins, backbone):
    import torch

    plugins(plugin_one=PLUGIN.format(name="first"))
    pruner = registry.build("first", budget=7)
    assert "first" in registry.available()
    tiny = torch.zeros(1, 3, 112, 112)
    ids = torch.tensor([[7] + [backbone.model.config.image_token_id] * 64 + [8, 9]])
    with torch.no_grad(), pruner(backbone.model) as trace:
        backbone.model(input_ids=ids, pixel_values=tiny)
    assert trace.kept[0][0].tolist() == list(range(7)) and trace.visual_tokens.tolist() == [[7] * 6]


@pytest.mark.parametrize(
    "source, words",
    [
        (None, "No module named"),
        (PLUGIN.format(name="fastv"), "two methods are named fastv"),
        ("First = dict", "no subclass"),
        (PLUGIN.format(name=""), "attribute `name`"),
        ("First = (", "SyntaxError: '(' was never closed, line 1"),
    ],
)
def test_a_broken_plug_in_leaves_itself_out(plugins, source, words, capsys, request):
    name = f"plugin_{abs(hash(request.node.name))}"  # Python imports a module once
    plugins(**{name: source})
    for _ in range(2):
        assert "fastv" in registry.available() and "first" not in registry.available()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"plug-in {name} " in said and words in said and "uninstall it" in said
    with pytest.raises(UserError, match=f"method {name} is not available: .*cannot be loaded"):
        registry.build(name)


@pytest.mark.parametrize(
    "source, words",
    [
        ("def f(:\n", "SyntaxError: invalid syntax, line 1"),
        ("import nowhere_to_be_found\n", "ModuleNotFoundError: No module named"),
        ("1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_broken_file_of_this_package_leaves_one_method_out(tmp_path, source, words):
    """In a process of its own, on a copy of the package: every command and --list went down with it."""
    import shutil
    import subprocess
    import sys

    package = Path(registry.__file__).parent
    shutil.copytree(
        package, tmp_path / "methods", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__")
    )
    (tmp_path / "methods" / "mine.py").write_text(source)
    code = "from methods import registry; print(*registry.available()); registry.build('mine')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True
    )
    assert {"vanilla", "fastv", "stepprune"} <= set(done.stdout.split())
    first, *_, last = done.stderr.splitlines()
    assert first.startswith("LEFT OUT methods/mine.py cannot be imported (") and words in first
    assert last.startswith("methods.errors.UserError: method mine is not available: methods/mine.py")
