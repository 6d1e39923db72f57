"""Pocket-8: eight small, procedurally drawn data sets in the schemas of the paper's eight benchmarks."""


def ensure(root=None, varied=False):
    """The folder with the parquet files, drawn on first use; see `harness.pocket8.build.ensure`."""
    from .build import ensure as build_once

    return build_once(root, varied)


def varied_for(backbone):
    """Whether a backbone is asked about canvases of varied size by default: one that takes any image size.

    backbone: as `Backbone.describe` and records have it.
    """
    return "min_pixels" in backbone
