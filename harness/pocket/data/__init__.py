"""Pocket-8: eight small, procedurally drawn data sets in the schemas of the paper's eight benchmarks."""


def ensure(root=None, varied=False, version=None):
    """The folder with the parquet files, drawn on first use; see `harness.pocket.data.build.ensure`."""
    from . import build

    return build.ensure(root, varied, version)
