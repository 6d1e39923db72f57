"""Pocket-8: eight small, procedurally drawn data sets in the schemas of the paper's eight benchmarks."""


def ensure(root=None):
    """The folder with the parquet files, drawn on first use; see `harness.pocket8.build.ensure`."""
    from .build import ensure as build_once

    return build_once(root)
