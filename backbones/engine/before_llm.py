"""The engine's part before the language model: looks at images, asks the method, projects the survivors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from backbones.engine.selection_check import Offer, check_selections
from backbones.engine.vision_cache import Known, active_cache
from backbones.families.family import Adapter, Grid, Images
from methods.base import ImageView, Pruner, Selection

#: key of the projector's output for all patches, remembered beside the tower's signals
PROJECTED = "projected"


class ImageSide:
    """Vision tower, method and projector of one pruner on one model. Holds nothing between two calls."""

    def __init__(self, adapter: Adapter, pruner: Pruner, model: nn.Module):
        self.adapter, self.pruner, self.model = adapter, pruner, model
        self._needs = {adapter.feature, *pruner.reads(adapter.has_cls)}

    @property
    def involved(self) -> bool:
        """Whether `get_image_features` has to be ours: the method acts here, or a cache can serve it."""
        return self.pruner.selects or active_cache(self.model) is not None

    def look(self, images: Images) -> list[ImageView]:
        """One view an image. With a cache open, equal images get one and the same view."""
        adapter, cache = self.adapter, active_cache(self.model)
        grids = [self.pruner.image_grid(g) for g in images.grids] if self.pruner.acts else images.grids
        if cache is None:
            found = adapter.see(images, range(len(images)), grids, self._needs)
            return [self._view(Known(f), g, p) for f, g, p in zip(found, grids, images.parts)]
        cache.wanted |= self._needs
        keys = list(zip(cache.digests(images), images.grids, grids))
        first = {key: keys.index(key) for key in keys}
        known = {key: cache.get(key) for key in first}
        missing = [key for key in known if not self._needs <= known[key].keys()]
        if missing:
            cache.runs += len(missing)
            which = [first[key] for key in missing]
            found = adapter.see(images, which, [grids[i] for i in which], cache.wanted)
            known |= {key: cache.add(key, own) for key, own in zip(missing, found)}
        views = {key: self._view(known[key], key[-1], images.parts[i], key) for key, i in first.items()}
        return [views[key] for key in keys]

    def _view(self, known: Known, grid: Grid, pixels: Tensor, key=None) -> ImageView:
        a = self.adapter
        known.key = key
        return ImageView(
            known[a.feature],
            grid,
            a.heads,
            pixels,
            a.project,
            known,
            has_cls=a.has_cls,
            final_norm=a.tower_norm,
        )

    def all_tokens(self, views: Sequence[ImageView]) -> list[Tensor]:
        """Every token of each image through the projector, [N, D]; remembered if a cache is open."""
        if not self.adapter.projects:
            return [v.features for v in views]
        cache = active_cache(self.model)
        missing = [v for v in _distinct(views) if PROJECTED not in v.signals]
        if missing:
            tokens = self.adapter.project(torch.stack([v.features for v in missing]))
            for view, own in zip(missing, tokens):
                if cache is not None:
                    own = cache.add(view.signals.key, {PROJECTED: own})[PROJECTED]
                view.signals[PROJECTED] = own
        return [v.signals[PROJECTED] for v in views]

    def select(self, views: Sequence[ImageView], places: Sequence[int]) -> list[tuple[Selection, Tensor]]:
        """The method's answer and its tokens [n, D] for each view; asked once for views that are one object.

        places: in the prompt, for each. Raises BadSelection for an answer that cannot be applied.
        """
        distinct = _distinct(views)
        room = {id(v): n for v, n in zip(views, places)}
        answers = self.pruner.select_all(distinct)
        width = self.adapter.text_config.hidden_size
        offers = [Offer(v.features, len(v.features), room[id(v)], width) for v in distinct]
        check_selections(self.pruner, answers, offers)
        tokens = [v.features[a.kept] if a.tokens is None else a.tokens for v, a in zip(distinct, answers)]
        waiting = [t for t, a in zip(tokens, answers) if not a.projected]
        if waiting:
            projected = iter(self.adapter.project(torch.cat(waiting)).split([len(t) for t in waiting]))
            tokens = [t if a.projected else next(projected) for t, a in zip(tokens, answers)]
        by_view = {id(v): pair for v, pair in zip(distinct, zip(answers, tokens))}
        return [by_view[id(v)] for v in views]

    def select_with_text(
        self, rows: Sequence[Sequence[ImageView]], told: Sequence[dict], places: Sequence[Sequence[int]]
    ) -> list[list[tuple[Selection, Tensor]]]:
        """`select` for the views of each sample, which see of its text what `told` holds by field of
        ImageView; one list per sample."""
        views = [replace(view, **own) for row, own in zip(rows, told) for view in row]
        answers = iter(self.select(views, [n for row in places for n in row]))
        return [[next(answers) for _ in row] for row in rows]


def _distinct(views: Sequence[ImageView]) -> list[ImageView]:
    return list({id(v): v for v in views}.values())
