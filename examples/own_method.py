"""Your own pruning method against the shipped ones: `python examples/own_method.py --budget 64 --limit 8`.

All options are those of run_all.py. The class below is known to this process only; in a package of your own,
the entry-point group `visual_token_pruners` makes it known to every command.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

from harness.cli.app import run_all
from methods.base import ImageView, Pruner, Selection
from methods.registry import register


@register
@dataclass
class Brightest(Pruner):
    """Keep the patches whose features are largest."""

    name: ClassVar[str] = "brightest"

    def select(self, image: ImageView) -> Selection:
        n = self.count(len(image.features))
        return Selection(image.features.norm(dim=-1).topk(n).indices.sort().values)


if __name__ == "__main__":
    sys.exit(run_all(["--methods", "brightest,random", *sys.argv[1:]]))
