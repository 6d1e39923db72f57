#!/usr/bin/env python3
"""Measure every registered pruning method and print a leaderboard: `python run_all.py --budget 64`."""

import sys

from harness.cli.app import run_all

if __name__ == "__main__":
    sys.exit(run_all())
