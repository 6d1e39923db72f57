"""What can be told of a run before a model is read or a folder made: refused here, a bad command costs a
second.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.run.config import RunConfig, method_at
from methods.errors import UserError


def check(config: RunConfig) -> None:
    """Methods, budgets, data files and the place for results. Raises UserError for what is wrong.

    Whatever needs the weights is asked again, and the rest with it, when the run's session is made.
    """
    check_place(config.out)
    check_methods(config.methods, config.budgets, config.seed)
    check_budgets(config)
    if config.data is not None or not config.suite.synthetic:
        from harness.tasks.sources import locate

        for benchmark in () if config.load.download else config.benchmarks:
            locate(config.suite, benchmark, config.data)


def check_budgets(config: RunConfig) -> None:
    """Raises UserError for a budget that the checkpoint's images, or none of the methods, can have."""
    from methods import registry

    tokens, layers = sizes(config)
    for budget in config.budgets if tokens else ():
        registry.build("vanilla", budget).check_budget(tokens)
        refused = [_refusal(spec, budget, tokens, layers) for spec in _named(config.methods)]
        if refused and all(refused):
            raise refused[0]


def check_methods(specs: Sequence[str], budgets: Sequence[int | float], seed: int = 0) -> None:
    """Raises UserError for an unknown method or parameter, or one method given twice."""
    from methods import registry

    registry.available()
    seen: dict[str, str] = {}
    for spec in _named(specs):
        method = method_at(spec, budgets[0], seed)
        same = json.dumps([method.name, dict(method.parameters)], sort_keys=True, default=str)
        if same in seen:
            raise UserError(f"--methods: {seen[same]} and {spec} are the same; name one of them")
        seen[same] = spec


def check_place(folder: Path) -> None:
    """Raises UserError unless `folder` is there or could be made, and files in it. Makes nothing."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"cannot write to {folder} ({there} is a file); choose another folder with --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder} (Permission denied); choose another folder with --out")


def sizes(config: RunConfig) -> tuple[int | None, int | None]:
    """Visual tokens of an image and decoder layers, as far as the checkpoint's config.json tells them."""
    from backbones.hub.find import find, read_config

    if config.load.download:
        return None, None
    body = read_config(find(config.backbone, config.load.revision).folder)
    text, vision = (body.get(part) if isinstance(body.get(part), dict) else {} for part in _PARTS)
    tokens, layers = body.get("image_seq_length"), text.get("num_hidden_layers")
    side, patch = vision.get("image_size"), vision.get("patch_size")
    if tokens is None and isinstance(side, int) and isinstance(patch, int):
        tokens = (side // patch) ** 2
    return (tokens, layers) if isinstance(tokens, int) else (None, None)


_PARTS = ("text_config", "vision_config")


def _named(specs: Sequence[str]) -> Iterator[str]:
    """The methods that were asked for by name and prune."""
    return (s for s in specs if s not in ("all", "vanilla"))


def _refusal(spec: str, budget: int | float, tokens: int, layers: int | None) -> UserError | None:
    """Why the method cannot have that budget."""
    from methods import registry

    try:
        if layers is not None:
            registry.build(spec, budget).validate(tokens, layers)
    except UserError as error:
        return error
    return None
