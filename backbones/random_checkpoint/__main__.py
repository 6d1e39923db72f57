"""`python -m backbones.random_checkpoint FAMILY DIR`."""

import argparse
import sys
from pathlib import Path

from backbones.random_checkpoint import available, make


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 2 if DIR has something in it."""
    parser = argparse.ArgumentParser(
        prog="python -m backbones.random_checkpoint",
        description="Write the checkpoint folder of a tiny random model, complete and in hub layout.",
        epilog="then: python run_all.py --backbone DIR --budget 16 (its answers mean nothing)",
    )
    parser.add_argument("family", choices=list(available()), help="of the model")
    parser.add_argument("folder", type=Path, metavar="DIR", help="new or empty folder")
    options = parser.parse_args(arguments)
    if options.folder.exists() and any(options.folder.iterdir()):
        print(f"error: {options.folder} is not empty; name a new folder", file=sys.stderr)
        return 2
    make(options.family, options.folder, hub_layout=True)
    print(f"{options.family} with random weights written to {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
