"""Pocket-8: eight small, procedurally drawn data sets in the schemas of the paper's eight benchmarks."""

_ANY_SIZE = ("qwen2_5_vl",)


def ensure(root=None, varied=False, version=None):
    """The folder with the parquet files, drawn on first use; see `harness.pocket.data.build.ensure`.

    version: None: the default, `harness.pocket.data.build.VERSION`."""
    from . import build

    return build.ensure(root, varied, build.VERSION if version is None else version)


def varied_for(family):
    """Whether backbones of a family (`config.model_type`) are asked about canvases of varied size by default:
    those that take images of any size."""
    return family in _ANY_SIZE
