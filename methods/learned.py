"""Methods that are trained (`python -m harness train METHOD`): what the trainer has to know of each.

A learned method's package has a module `learned` with the names of `Learned`; that is all it takes to be
trained, calibrated and ablated. It imports nothing heavy at its top, so that the commands' help answers at
once.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from methods.errors import UserError

if TYPE_CHECKING:
    from methods.base import Pruner


class Learned(Protocol):
    """The module `methods.<name>.learned`. Options are those of `methods.stepprune.training.options`.

    Attributes:
        DEFAULTS: options of a training whose default is another than `TrainOptions` has.
        PRESETS: by name, options that `--preset NAME` gives, unless they are given themselves.
        UNUSED: options that say nothing to the method: giving one is refused.
        ABLATIONS: groups of variants for `ablate`: group -> row -> options that it changes.
    """

    DEFAULTS: Mapping[str, object]
    PRESETS: Mapping[str, Mapping[str, object]]
    UNUSED: frozenset[str]
    ABLATIONS: Mapping[str, Mapping[str, Mapping[str, object]]]

    def kind(self) -> type:
        """Class of a policy's configuration, see `methods.stepprune.checkpoint.Config`."""

    def shape(self, options: Any, width: int, text_width: int, n: int) -> Any:
        """A policy's configuration for models of these widths and images of at most n visual tokens."""

    def objective(self, options: Any, policy: Any, denoiser: Any, frozen: Any) -> Any:
        """What is trained, of its parts: a `methods.stepprune.training.objective.GatedObjective`."""

    def new_objective(self, options: Any, frozen: Any, batch: Any) -> Any:
        """What is trained, its starting values made with the first batch."""

    def holds(self, options: Any) -> bool:
        """Whether training moves the policy's bias such that the mean K stays at the target."""

    def checkpoint_name(self, options: Any) -> str:
        """Of the file of such a training, without its ending."""

    def serves(self, options: Any) -> bool:
        """Whether runs shall find the policy without being told of its file."""

    def most_tokens(self, pruner: Any) -> int | None:
        """Tokens that a pruner of the method, put on a model before, takes of an image at most; None: as many
        as its budget says."""

    def controls(
        self, pruner: Any, held_out: Callable[[], tuple[Any, Sequence[Any]]]
    ) -> Mapping[str, Pruner]:
        """What the method's steps and its training are held against, by what a table calls it: pruners that
        take as many tokens in another way. Empty for a method without steps.

        Args:
            pruner: the method's.
            held_out: for what has to be calibrated: makes the pruner ready for the model, and gives a
                `methods.stepprune.training.objective.FrozenModel` and held-out `Batch`es.
        """


@functools.cache
def names() -> tuple[str, ...]:
    """Of all learned methods, in alphabetical order."""
    here = Path(__file__).parent
    return tuple(sorted(path.parent.name for path in here.glob("*/learned.py")))


def find(name: str) -> Learned:
    """The learned method of that name.

    Raises:
        UserError: there is none.
    """
    if name not in names():
        raise UserError(f"{name!r} is no learned method; known: {', '.join(names())}")
    return importlib.import_module(f"methods.{name}.learned")


def settled(name: str, given: Mapping[str, object], preset: str | None = None) -> dict[str, object]:
    """Options of a training: what a person gave, then the preset's, then the method's own defaults.

    Args:
        name: the method's.
        given: what was given, by the option's name in `TrainOptions`.
        preset: its name; None: none.

    Raises:
        UserError: no such method or preset, or an option that the method has no use for.
    """
    method = find(name)
    for option in given:
        if option in method.UNUSED:
            raise UserError(f"--{option.replace('_', '-')} says nothing to {name}; leave it out")
    if preset is not None and preset not in method.PRESETS:
        known = ", ".join(method.PRESETS) or "none"
        raise UserError(f"--preset {preset}: {name} has no such preset; known: {known}")
    chosen = method.PRESETS[preset] if preset else {}
    return {"method": name, **method.DEFAULTS, **chosen, **given}
