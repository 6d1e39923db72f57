"""Checkpoints of the hub that have a short name; each family names its own."""

from __future__ import annotations

from dataclasses import dataclass

from backbones import families
from backbones.families.family import Family, KnownCheckpoint


@dataclass(frozen=True)
class ShortName:
    """A checkpoint and its family."""

    checkpoint: KnownCheckpoint
    family: Family


def short_names() -> dict[str, ShortName]:
    """By short name."""
    return {
        name: ShortName(checkpoint, family)
        for family in families.known().values()
        for name, checkpoint in family.checkpoints.items()
    }
