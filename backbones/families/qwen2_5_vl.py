"""Qwen2.5-VL: Qwen2_5_VLForConditionalGeneration, images of any size, windows in the tower, M-RoPE.

A visual token is what the tower's 2 x 2 merger makes of four patches; the merger is the projector, and runs
on all tokens. Inside the tower they stand in window order, and only its last output is put back into raster
order. Everything that leaves this file is one row per visual token, in raster order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from backbones.families import window_tower
from backbones.families.family import (
    NARROW_WIDTH,
    NO_TOKENS,
    Adapter,
    Family,
    Grid,
    Images,
    KnownCheckpoint,
    Part,
    TinyParts,
    narrow_text,
    with_sdpa,
)
from backbones.families.tiny import qwen as tiny_qwen
from backbones.layout import Layout, Move, gather
from methods.base import Signal
from methods.errors import UserError

#: lmms-eval 0.7.3's own adapter scales images to this many pixels (256 to 2048 visual tokens)
LMMS_EVAL_PIXELS = {"min_pixels": 256 * 28 * 28, "max_pixels": 1_605_632}

_VQA = "our copy of Table 2 does not tell whether its column VQA is VQAv2 or TextVQA"


class QwenVL(Family):
    """What Qwen2-VL and Qwen2.5-VL have in common."""

    any_size = True
    has_cls = False
    projects = False
    renumbers = False
    signals = frozenset({"hidden", "queries", "keys", "values", "received", "order"})
    not_quantised = ("model.visual", "lm_head")

    def adapter(self, model: nn.Module) -> QwenAdapter:
        return QwenAdapter(self, model)

    # ---- images and prompts

    def prepare(self, name: str, processor, options) -> dict[str, object]:
        limit_pixels(processor.image_processor, options.min_pixels, options.max_pixels)
        return {}

    def published_inputs(self) -> dict[str, object]:
        return LMMS_EVAL_PIXELS

    def most_visual_tokens(self, processor) -> int:
        images = processor.image_processor
        return images.size["longest_edge"] // (images.patch_size * images.merge_size) ** 2

    def pixel_limits(self, processor) -> dict[str, int]:
        size = processor.image_processor.size
        return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}

    def raster(self, config, inputs: Mapping[str, Tensor]) -> Grid:
        merge = config.vision_config.spatial_merge_size
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        return rows // merge, columns // merge

    # ---- shapes and costs

    def unit(self, vision) -> int:
        return vision.patch_size * vision.spatial_merge_size

    def tower_heads(self, vision) -> int:
        return vision.num_heads

    def feed_forward(self, vision) -> int:
        """MAC of a block's feed-forward part, per patch and per channel of its input."""
        raise NotImplementedError

    def windows(self, vision, height: int, width: int) -> list[int] | None:
        """Patches in each attention window of an image of so many pixels; None: there are no windows."""
        return None

    def full_blocks(self, vision) -> int:
        """Blocks of the tower whose patches see the whole image."""
        return vision.depth

    def tower_macs(self, vision, height: int, width: int) -> int:
        """Patch convolution (each image stands twice, as two frames), then per block n(4d² + feed-forward) +
        2Σs²d over its windows of s patches, or s = n in blocks without."""
        d, p = self.tower_width(vision), vision.patch_size
        n = (height // p) * (width // p)
        linear = vision.depth * n * (4 * d * d + d * self.feed_forward(vision))
        attention = self.tower_attention_macs(vision, height, width)
        return self._convolution(vision, n) + linear + attention

    def tower_attention_macs(self, vision, height: int, width: int) -> int:
        n, full = (height // vision.patch_size) * (width // vision.patch_size), self.full_blocks(vision)
        inside = sum(s * s for s in self.windows(vision, height, width) or ())
        return 2 * self.tower_width(vision) * (full * n * n + (vision.depth - full) * inside)

    def projector_macs(self, config, tokens: int) -> int:
        """The merger: n(w² + wD), w the width of four patches together."""
        vision = config.vision_config
        wide = self.tower_width(vision) * vision.spatial_merge_size**2
        return tokens * (wide * wide + wide * self.feature_width(vision))

    def received_macs(self, vision, layer: int, tokens: int) -> int:
        """`window_tower.Tap`: the queries of all patches times the keys, in a layer that sees the whole image
        (attention that a windowed layer gives is not planned for)."""
        return (tokens * vision.spatial_merge_size**2) ** 2 * self.tower_width(vision)

    def _convolution(self, vision, patches: int) -> int:
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return patches * pixels * self.tower_width(vision)

    def tower_of(self, inner: nn.Module) -> nn.Module:
        return inner.visual

    def projector_of(self, inner: nn.Module) -> nn.Module:
        return inner.visual.merger

    def pixels_seen(self, config, arguments: Mapping[str, object], pixels: Tensor) -> list[tuple[int, int]]:
        size = config.vision_config.patch_size
        return [(rows * size, columns * size) for _, rows, columns in arguments["grid_thw"].tolist()]

    def tower_parts(self, model: nn.Module, height: int, width: int) -> tuple[list[Part], int]:
        vision = model.config.vision_config
        n, d = (height // vision.patch_size) * (width // vision.patch_size), self.tower_width(vision)
        block = with_sdpa(type(self.tower_of(model.model).blocks[0]), vision)
        inputs = (
            torch.empty(n, d, device="meta"),
            *[torch.empty(n, d // self.tower_heads(vision), device="meta")] * 2,
        )
        full, windows = self.full_blocks(vision), self.windows(vision, height, width)
        parts = [Part(_TracedBlock(block, [n]), inputs, full)]
        if windows is not None:
            parts.append(Part(_TracedBlock(block, windows), inputs, vision.depth - full))
        return parts, self._convolution(vision, n)

    def projector_part(self, model: nn.Module) -> Part:
        merger, vision = self.projector_of(model.model), model.config.vision_config
        like = next(merger.parameters())
        return Part(merger, (like.new_empty(vision.spatial_merge_size**2, self.tower_width(vision)),))

    def noise(self, vision, pixels: tuple[int, int], batch: int, generator) -> dict[str, Tensor]:
        rows, columns = (n // vision.patch_size for n in pixels)
        wide = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": torch.randn(batch * rows * columns, wide, generator=generator),
            "image_grid_thw": torch.tensor([[1, rows, columns]] * batch),
        }

    def prompt_facts(self, is_image: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": is_image.int()}

    def narrow(self, body: Mapping) -> dict:
        tower = body["vision_config"] | self.narrow_tower()
        text = narrow_text(body["text_config"])
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        return {
            **body, **NO_TOKENS, "vision_config": tower, "text_config": text, "image_token_id": 511,
            "video_token_id": 510, "vision_start_token_id": 509, "vision_end_token_id": 508,
        }  # fmt: skip

    def narrow_tower(self) -> dict:
        """What is changed of the tower's configuration."""
        raise NotImplementedError


class Qwen2_5_VL(QwenVL):
    model_type = "qwen2_5_vl"
    title = "Qwen2.5-VL"
    checkpoints: ClassVar = {
        "qwen2.5-vl-3b": KnownCheckpoint("Qwen/Qwen2.5-VL-3B-Instruct", 3.75e9),
        "qwen2.5-vl-7b": KnownCheckpoint("Qwen/Qwen2.5-VL-7B-Instruct", 8.29e9),
    }
    # Table 2, whose last column is "VQA" with a mark that our copy has lost; 84.8 for the unpruned model fits
    # TextVQA without OCR tokens
    paper_columns = ("mmbench_en", "mme", "pope", "scienceqa", "textvqa")
    paper_checkpoint = "qwen2.5-vl-7b"
    paper_doubts: ClassVar = {"VQAv2": _VQA, "textvqa": _VQA}

    def tiny(self) -> TinyParts:
        return TinyParts(
            tiny_qwen.make_tokenizer, tiny_qwen.make_model, tiny_qwen.make_processor, tiny_qwen.to_hub_layout
        )

    def feature_width(self, vision) -> int:
        return vision.out_hidden_size

    def feed_forward(self, vision) -> int:
        return 3 * vision.intermediate_size

    def windows(self, vision, height: int, width: int) -> list[int]:
        """Squares of window_size pixels laid from the top left; those at the far edges are cut."""
        unit = self.unit(vision)
        side = vision.window_size // unit

        def spans(length: int) -> list[int]:
            merged = length // unit
            return [min(side, merged - start) for start in range(0, merged, side)]

        return [h * w * vision.spatial_merge_size**2 for h in spans(height) for w in spans(width)]

    def full_blocks(self, vision) -> int:
        return len(vision.fullatt_block_indexes)

    def received_macs(self, vision, layer: int, tokens: int) -> int:
        if layer % vision.depth not in vision.fullatt_block_indexes:
            raise UserError(
                f"attention of layer {layer} of the vision tower is asked for; that sees windows only"
            )
        return super().received_macs(vision, layer, tokens)

    def narrow_tower(self) -> dict:
        return {
            "intermediate_size": 32, "num_heads": 2, "hidden_size": NARROW_WIDTH,
            "out_hidden_size": NARROW_WIDTH,
        }  # fmt: skip


class _TracedBlock(nn.Module):
    """A block of the tower as a tracer calls it, over attention windows of known sizes."""

    def __init__(self, block: nn.Module, sizes: Sequence[int]):
        super().__init__()
        self.block = block
        # on the host: the block splits by their values, which meta tensors have not
        self.ends = torch.tensor([0, *sizes], device="cpu").cumsum(0)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.block(hidden, cu_seqlens=self.ends, position_embeddings=(cos, sin))


def limit_pixels(image_processor, least: int | None, most: int | None) -> None:
    """Every image is scaled to a number of pixels between these; each visual token is 28 x 28 of them. None
    leaves the checkpoint's own. Raises UserError if the least is above the most."""
    size = dict(image_processor.size)
    size |= {"shortest_edge": least} if least else {}
    size |= {"longest_edge": most} if most else {}
    if size["shortest_edge"] > size["longest_edge"]:
        raise UserError(
            f"--min-pixels {size['shortest_edge']} is more than --max-pixels {size['longest_edge']}"
        )
    image_processor.size = type(image_processor.size)(**size)


class QwenAdapter(Adapter):
    """Raises UserError if the model's decoder has sliding-window layers."""

    def __init__(self, family: QwenVL, model: nn.Module):
        super().__init__(family, model)
        if set(self.text_config.layer_types) != {"full_attention"}:
            raise UserError(f"{family.title} with sliding-window layers in its decoder is not supported")
        self._tower, self._vision = family.tower_of(self.inner), model.config.vision_config
        self._merge = self._vision.spatial_merge_size
        self.feature = Signal("hidden", len(self._tower.blocks))  # one behind the last block: the merger

    # ---- the tower

    def images(self, arguments: Mapping[str, object]) -> Images:
        for name, value in arguments.items():
            if name not in ("pixel_values", "image_grid_thw", "return_dict") and value:
                raise RuntimeError(
                    f"get_image_features({name}={value}) is not supported while a pruner is on"
                )
        pixels, shapes = arguments["pixel_values"], arguments["image_grid_thw"].tolist()
        if any(frames != 1 for frames, _, _ in shapes):
            raise RuntimeError("images of several frames are not supported while a pruner is on")
        parts = pixels.split([rows * columns for _, rows, columns in shapes])
        return Images(pixels, parts, [(r // self._merge, c // self._merge) for _, r, c in shapes])

    def see(
        self, images: Images, which: Sequence[int], grids: Sequence[Grid], signals: Iterable[Signal]
    ) -> list[dict[Signal, Tensor]]:
        pixels = images.tensor
        if list(grids) != list(images.grids):  # fewer images, or other sizes
            parts = [(images.parts[i], images.grids[i]) for i in which]
            pixels = torch.cat(
                [window_tower.resized(*part, wanted, self._vision) for part, wanted in zip(parts, grids)]
            )
        shapes = torch.tensor([[1, r * self._merge, c * self._merge] for r, c in grids])
        order = [signal for signal in signals if signal.kind == "order"]
        inner = [signal for signal in signals if signal not in (*order, self.feature)]
        with window_tower.tapped(self._tower.blocks, inner, self.family.title) as taps:
            pixels = pixels.type(self._tower.dtype)
            merged = self._tower(pixels, grid_thw=shapes.to(pixels.device)).pooler_output
        ends = list(accumulate((rows * columns for rows, columns in grids), initial=0))
        places = self.tower_order(shapes).to(pixels.device)
        found = []
        for start, end in pairwise(ends):
            own = places[start:end] - start
            known = {self.feature: merged[start:end], **dict.fromkeys(order, own)}
            for signal in inner:
                in_tower = taps[signal.layer].read(signal.kind, slice(start, end), self._merge**2)
                known[signal] = in_tower[own.argsort()]
            found.append(known)
        return found

    def tower_order(self, shapes: Tensor) -> Tensor:
        """Which token, all images' one after the other in raster order, stands at each place of the tower.
        shapes: int64 [images, 3], frames, rows and columns of patches."""
        return window_tower.window_order(shapes, self._vision)

    # ---- the prompt

    def check_prompt(self, arguments: Mapping[str, object]) -> None:
        videos = (arguments.get("mm_encoder_outputs") or {}).get("video")
        if videos is not None or arguments.get("pixel_values_videos") is not None:
            raise RuntimeError("videos are not supported while a pruner is on")

    def image_sizes(self, layout: Layout) -> list[list[int]]:
        """Lengths of the runs of places: the chat template puts other tokens around every image."""
        sizes = []
        for columns in (own.tolist() for own in layout.columns):
            starts = [i for i, column in enumerate(columns) if i == 0 or column != columns[i - 1] + 1]
            sizes.append([end - start for start, end in pairwise([*starts, len(columns)])])
        return sizes

    def check_positions(
        self, layout: Layout, sizes: Sequence[Sequence[int]], positions: Tensor | None
    ) -> None:
        """transformers falls back to 1-D positions, without a word, where it is not told which tokens are an
        image's, or how large it is. M-RoPE gives all tokens of an image one and the same time."""
        row = next((b for b, own in enumerate(sizes) if own), None)
        if row is None:
            return
        if positions is not None and positions.ndim == 3:
            first, last = layout.columns[row][[0, sizes[row][0] - 1]]
            times = positions[-3].expand(len(sizes), -1)[row]
            if first == last or times[first] == times[last]:
                return
        raise RuntimeError(
            "these positions are not M-RoPE's: give mm_token_type_ids and image_grid_thw, as the processor "
            "makes them"
        )

    def prompt_positions(self, before: int, grid: Grid, after: int) -> Tensor:
        rows, columns = grid
        kinds = torch.zeros(1, before + rows * columns + after, dtype=torch.int32)
        kinds[:, before : before + rows * columns] = 1
        shape = torch.tensor([[1, rows * self._merge, columns * self._merge]])
        return self.inner.get_rope_index(kinds.long(), kinds, image_grid_thw=shape)[0][:, 0]

    def following(self, layout: Layout, positions: Tensor | None) -> Tensor:
        if positions is None:
            return layout.ends
        last = positions[..., -1] + 1
        return (last if last.ndim == 1 else last[-3:].amax(0)).expand(len(layout.lengths))

    def moved(self, positions: Tensor | None, before: Layout, after: Layout, move: Move) -> Tensor:
        moved = torch.stack([gather(axis, move.place) for axis in positions])
        if len(moved) == 4:  # the first row numbers the tokens, for masks
            moved[0] = after.positions
        return moved

    def shrunk(
        self, positions: Tensor, layout: Layout, grids: Sequence[Sequence[tuple[Grid, Grid]]]
    ) -> Tensor:
        positions = positions.expand(-1, len(grids), -1).clone()
        for own, columns, images in zip(positions[-3:].unbind(1), layout.columns, grids):
            places = columns.split([rows * wide for (rows, wide), _ in images])
            for (grid, seen), place in zip(images, places):
                raster = torch.cartesian_prod(*(torch.arange(n, device=place.device) for n in (1, *seen))).T
                own[:, place[: raster.shape[1]]] = own[:, place[:1]] + raster
                own[:, int(place[-1]) + 1 :] -= max(grid) - max(seen)
        return positions
