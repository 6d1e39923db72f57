"""Names, parameters and plug-ins."""

from __future__ import annotations

import importlib.metadata
import json

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
        ("fastv:schedule=mean", "schedule is 'mean'; it takes kept or average"),
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


def test_broken_entry_points(plugins):
    plugins(plugin_two=None)
    with pytest.raises(UserError, match=r"plug-in plugin_two .* cannot be loaded .* fix or uninstall"):
        registry.available()
    plugins(plugin_three=PLUGIN.format(name="fastv"))
    with pytest.raises(UserError, match="two methods are named fastv"):
        registry.available()
    plugins(plugin_four="First = dict")
    with pytest.raises(UserError, match="no subclass"):
        registry.available()
    plugins(plugin_five=PLUGIN.format(name=""))
    with pytest.raises(UserError, match="attribute `name`"):
        registry.available()
