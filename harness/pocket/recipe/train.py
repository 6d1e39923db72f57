"""The whole recipe of pocket-llava: vision tower, then projector and language model, then the checkpoint
folder.

    python -m harness.pocket.recipe.train                 # two hours on two CPU cores; resumes where it was

Logs go to results/pocket-llava/training/, working files to build/pocket/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.pocket.recipe import train_language, train_vision
from harness.pocket.recipe.export import CHECKPOINT, export


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vision-minutes", type=float, default=24)
    parser.add_argument("--language-minutes", type=float, default=train_language.MINUTES)
    parser.add_argument("--build", type=Path, default=Path("build/pocket"))
    parser.add_argument("--target", type=Path, default=CHECKPOINT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logs = Path("results/pocket-llava/training")
    vision, language = arguments.build / "vision", arguments.build / "language"
    train_vision.train(
        vision, logs / "vision.csv", arguments.vision_minutes, batch=10, lr=2e-3, seed=arguments.seed
    )
    tower = vision / "tower.safetensors"
    train_language.train(
        language,
        tower,
        logs / "language.csv",
        arguments.language_minutes,
        batch=train_language.BATCH,
        lr=train_language.LR,
        seed=arguments.seed,
    )
    print(export(arguments.build, arguments.target))


if __name__ == "__main__":
    main()
