"""A cache that lets pruners on one model share the runs of its vision tower."""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator

import torch
from torch import nn

from backbones.families.family import Images
from methods.base import Signal


class Known(dict):
    """What is known of one image: {signal: tensor}, and under other keys what was derived from it."""


class VisionCache:
    """Signals of the images seen so far, least recently used first to go when they exceed `max_bytes`.

    An image is known by a digest of its pixels, its raster, and the one the tower saw it at. `wanted` grows
    with every request: a run of the tower collects everything that any method has asked for so far. `runs`
    counts the images that went through the tower.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.runs = 0
        self.wanted: set[Signal] = set()
        self._images: OrderedDict[Hashable, Known] = OrderedDict()
        self._latest: tuple[weakref.ref, int, list[str]] | None = None

    def digests(self, images: Images) -> list[str]:
        """One digest an image. The same tensor, unchanged since, is not read again."""
        pixels = images.tensor
        version = None if pixels.is_inference() else pixels._version
        if self._latest and self._latest[0]() is pixels and self._latest[1] == version:
            return self._latest[2]
        rows = [part.detach().contiguous().cpu().flatten().view(torch.uint8).numpy() for part in images.parts]
        digests = [hashlib.blake2b(row, digest_size=16).hexdigest() for row in rows]
        if version is not None:
            self._latest = (weakref.ref(pixels), version, digests)
        return digests

    def get(self, key: Hashable) -> Known:
        """What is known of an image (maybe nothing), now the most recently used."""
        if key in self._images:
            self._images.move_to_end(key)
        return self._images.get(key, Known())

    def add(self, key: Hashable, values: dict) -> Known:
        """Add [.., d] tensors to what is known of an image; returns all of it."""
        known = self._images.setdefault(key, Known())
        for name, value in values.items():
            if name not in known:
                known[name] = value.clone()  # not a view, which would keep the whole batch
                self.bytes += value.nbytes
        self._images.move_to_end(key)
        while self.bytes > self.max_bytes and len(self._images) > 1:
            _, dropped = self._images.popitem(last=False)
            self.bytes -= sum(v.nbytes for v in dropped.values())
        return known


_active: weakref.WeakKeyDictionary[nn.Module, VisionCache] = weakref.WeakKeyDictionary()


def active_cache(model: nn.Module) -> VisionCache | None:
    """The cache that is open on `model`, if one is."""
    return _active.get(model)


@contextlib.contextmanager
def vision_cache(model: nn.Module, max_bytes: int) -> Iterator[VisionCache]:
    """While open, pruners put on `model` share the vision tower's results. RuntimeError if one is open."""
    if model in _active:
        raise RuntimeError("a vision cache is already open on this model")
    _active[model] = VisionCache(max_bytes)
    try:
        yield _active[model]
    finally:
        del _active[model]
