"""The whole recipe of pocket-qwen: vision tower, then merger and language model, then the checkpoint folder.

    python -m harness.pocket.recipe.qwen.train            # two hours on two CPU cores; resumes where it was

The language model starts from the shipped pocket-llava. Logs go to results/pocket-qwen/training/, working
files to build/pocket-qwen/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.pocket.recipe.qwen import train_language, train_vision
from harness.pocket.recipe.qwen.export import CHECKPOINT, export


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vision-steps", type=int, default=train_vision.STEPS)
    parser.add_argument("--language-steps", type=int, default=train_language.STEPS)
    parser.add_argument("--build", type=Path, default=Path("build/pocket-qwen"))
    parser.add_argument("--target", type=Path, default=CHECKPOINT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logs = Path("results/pocket-qwen/training")
    vision, language = arguments.build / "vision", arguments.build / "language"
    train_vision.train(
        vision,
        logs / "vision.csv",
        arguments.vision_steps,
        batch=train_vision.BATCH,
        lr=train_vision.LR,
        seed=arguments.seed,
    )
    train_language.train(
        language,
        vision / "tower.safetensors",
        logs / "language.csv",
        arguments.language_steps,
        batch=train_language.BATCH,
        lr=train_language.LR,
        other_lr=train_language.OTHER_LR,
        seed=arguments.seed,
    )
    print(export(arguments.build, arguments.target))


if __name__ == "__main__":
    main()
