"""Pocket-8: eight small, procedurally drawn data sets in the schemas of the paper's eight benchmarks."""

_ANY_SIZE = ("qwen2_5_vl",)


def ensure(root=None, varied=False):
    """The folder with the parquet files, drawn on first use; see `harness.pocket.data.build.ensure`."""
    from .build import ensure as build_once

    return build_once(root, varied)


def varied_for(family):
    """Whether backbones of a family (`config.model_type`) are asked about canvases of varied size by default:
    those that take images of any size."""
    return family in _ANY_SIZE
