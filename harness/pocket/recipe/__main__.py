"""Train a pocket backbone from its seed, or go on where it was stopped.

python -m harness.pocket.recipe llava --state build/pocket-llava --target build/pocket-llava/checkpoint
python -m harness.pocket.recipe qwen  --state build/pocket-qwen  --target build/pocket-qwen/checkpoint
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.pocket.recipe.families import FAMILIES
from harness.pocket.recipe.run import train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="harness.pocket.recipe",
    )
    parser.add_argument("backbone", choices=list(FAMILIES))
    parser.add_argument("--state", type=Path, help="working folder (default: build/pocket-NAME); resumed")
    parser.add_argument("--target", type=Path, help="checkpoint folder (default: checkpoint, in --state)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so many, to be continued")
    parser.add_argument("--threads", type=int, default=2, help="equal weights need equal numbers of threads")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    state = arguments.state or Path("build") / f"pocket-{arguments.backbone}"
    target = arguments.target or state / "checkpoint"
    done = train(arguments.backbone, state, target, arguments.seed, minutes=arguments.minutes)
    print(f"done: {target}" if done else f"stopped; the same command goes on from {state}")


if __name__ == "__main__":
    main()
