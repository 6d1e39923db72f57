"""Pocket-8: eight small, procedurally drawn data sets in the schemas of the paper's eight benchmarks."""


def ensure(root=None, varied=False, version=None):
    """The folder with the parquet files, drawn on first use; see `harness.pocket.data.build.ensure`.

    version: None: the default, `harness.pocket.data.build.VERSION`."""
    from . import build

    return build.ensure(root, varied, build.VERSION if version is None else version)
