"""What the rest of the project has to know of a model family: `Family`, the facts, which need no model, and
`Adapter`, which holds one loaded model for the engine. How to add one: docs/backbones.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backbones.layout import Layout, Move
from methods.base import Pruner, Signal
from methods.errors import UserError

Grid = tuple[int, int]


@dataclass(frozen=True)
class Images:
    """The images of one call of `get_image_features`.

    Attributes:
        tensor: all their pixels as given: [images, 3, height, width], or [patches, values of a patch] where
            images differ; the model's dtype.
        parts: each image's own, views of `tensor`.
        grids: rows and columns of visual tokens that each would have unpruned.
    """

    tensor: Tensor
    parts: Sequence[Tensor]
    grids: Sequence[Grid]

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def sizes(self) -> list[int]:
        """Visual tokens of each image, unpruned."""
        return [rows * columns for rows, columns in self.grids]


@dataclass(frozen=True)
class KnownCheckpoint:
    """A checkpoint of the hub that has a short name here.

    Attributes:
        repo: its id on the hub.
        parameters: their number, as published.
    """

    repo: str
    parameters: float

    @property
    def weight_bytes(self) -> float:
        """Of its safetensors files: 2 a parameter."""
        return 2 * self.parameters


@dataclass(frozen=True)
class Part:
    """A module and its inputs, for a tracer that counts multiply-accumulates.

    Attributes:
        module: on the meta device or a real one.
        inputs: its positional arguments.
        times: how often the model runs one like it.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    times: int = 1


class TracedLayer(nn.Module):
    """An encoder layer of a tower without padding, as a tracer calls it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.layer(hidden, attention_mask=None)
        return out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True)
class TinyParts:
    """Makers of a tiny random checkpoint's parts (`backbones.random_checkpoint`).

    Attributes:
        tokenizer: () -> the tokenizer.
        model: (tokenizer) -> the model with random weights.
        processor: (tokenizer) -> the processor.
        to_hub_layout: (folder, processor) -> None; rewrites what transformers 5 saved to what the published
            repositories hold. None: the same.
    """

    tokenizer: Callable[[], object]
    model: Callable[[object], nn.Module]
    processor: Callable[[object], object]
    to_hub_layout: Callable[[Path, object], None] | None = None


class Family:
    """One model family: subclass it, and `backbones.families.register` an object of it.

    The defaults are those of a family whose images have one size, with a projector of its own behind a tower
    with CLS token. Configurations are Hugging Face's, or any object with the same attributes.
    """

    #: `config.model_type`
    model_type: ClassVar[str]
    #: for people
    title: ClassVar[str]
    #: checkpoints with a short name
    checkpoints: ClassVar[Mapping[str, KnownCheckpoint]] = {}
    #: whether images may have any size, and differ within a batch
    any_size: ClassVar[bool] = False
    #: whether the vision tower has a CLS token, which stands first
    has_cls: ClassVar[bool] = True
    #: whether a projector stands behind the tower; else it is the tower's last part and has run on all tokens
    projects: ClassVar[bool] = True
    #: whether rotary positions are 1-D, so that tokens can be numbered anew
    renumbers: ClassVar[bool] = True
    #: kinds of `Signal` that the adapter's `see` can give
    signals: ClassVar[frozenset[str]] = frozenset({"hidden", "queries", "keys", "values", "cls_query"})
    #: modules that are never quantised: methods read the tower, and these would save next to nothing
    not_quantised: ClassVar[tuple[str, ...]] = ()
    #: the paper's columns that are the default here, by benchmark; "all" of them; None: it has no such table
    paper_columns: ClassVar[tuple[str, ...] | Literal["all"] | None] = None
    #: the short name of the checkpoint whose scores the paper prints; None: of none
    paper_checkpoint: ClassVar[str | None] = None
    #: by a data set's repository, what is uncertain of the paper's column of it
    paper_doubts: ClassVar[Mapping[str, str]] = {}

    # ---- the model

    def architecture(self) -> tuple[type, type]:
        """Hugging Face's classes of the configuration and of the model."""
        from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

        config = type(AutoConfig.for_model(self.model_type))
        return config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config]

    def adapter(self, model: nn.Module) -> Adapter:
        """For one loaded model.

        Args:
            model: Hugging Face's generative model.

        Raises:
            UserError: it is of a kind that is not supported.
        """
        raise NotImplementedError

    def tiny(self) -> TinyParts:
        """A tiny random model of the family, for `python -m backbones.random_checkpoint` and for tests.

        Raises:
            UserError: there is none.
        """
        raise UserError(f"there is no tiny random model of {self.title}")

    def check_signals(self, pruner: Pruner) -> None:
        """Whether a method can be put on models of the family.

        Raises:
            UserError: it reads what the vision tower has not.
        """
        for signal in pruner.reads(self.has_cls):
            if signal.kind == "cls_query" and not self.has_cls:
                raise UserError(
                    f"{pruner.name} reads the CLS token of the vision tower; that of {self.title} has none"
                )
            if signal.kind not in self.signals:
                raise UserError(
                    f"{pruner.name} reads {signal.kind!r} of the vision tower, which is not offered for "
                    f"{self.title}"
                )

    # ---- images and prompts

    def prepare(self, name: str, processor, options) -> dict[str, object]:
        """Change the processor of a checkpoint as the options of loading say.

        Args:
            name: of the checkpoint, for messages.
            processor: changed in place.
            options: `backbones.hub.options.LoadOptions`.

        Returns:
            What a record must tell of it beside the processor's digests; JSON-able.

        Raises:
            UserError: an option does not suit the family.
        """
        if options.min_pixels or options.max_pixels:
            raise UserError(f"--min-pixels, --max-pixels: {name} takes images of one size only")
        return {}

    def published_inputs(self) -> dict[str, object]:
        """Fields of `LoadOptions` that published numbers were made with (`--tasks paper`)."""
        return {}

    def most_visual_tokens(self, processor) -> int:
        """The most visual tokens that an image can have, where images differ.

        Args:
            processor: Hugging Face's.
        """
        raise NotImplementedError

    def pixel_limits(self, processor) -> dict[str, int]:
        """What a record tells of the sizes that images are scaled to, in pixels an image."""
        return {}

    def raster(self, config, inputs: Mapping[str, Tensor]) -> Grid:
        """Rows and columns of visual tokens of the first image.

        Args:
            config: the model's.
            inputs: what the processor made.
        """
        side = config.vision_config.image_size // self.unit(config.vision_config)
        return side, side

    def deviations(self, described: Mapping[str, object]) -> list[str]:
        """Why scores of a backbone cannot stand beside the paper's; empty if they can.

        Args:
            described: `Backbone.describe()`.
        """
        return []

    # ---- shapes and costs, from a configuration alone: `vision` is the tower's, `config` the whole model's;
    # MAC are multiply-accumulates, half as many as FLOPs

    def unit(self, vision) -> int:
        """Side of a visual token in pixels, by the vision tower's configuration."""
        return vision.patch_size

    def tower_width(self, vision) -> int:
        """Width of the tower's layers."""
        return vision.hidden_size

    def feature_width(self, vision) -> int:
        """Width of the features that methods get, d of `ImageView.hidden`."""
        return vision.hidden_size

    def tower_heads(self, vision) -> int:
        """Heads of the tower's attention."""
        return vision.num_attention_heads

    def received_macs(self, vision, layer: int, tokens: int) -> int:
        """MAC of the signal `received`.

        Args:
            vision: the tower's configuration.
            layer: of the tower, as in `Signal`.
            tokens: visual tokens of the image.

        Raises:
            UserError: the layer cannot be planned for.
        """
        raise NotImplementedError

    def tower_macs(self, vision, height: int, width: int) -> int:
        """MAC of the vision tower on one image, by formula, without the projector.

        Args:
            vision: the tower's configuration.
            height: of the image, in pixels.
            width: likewise.
        """
        raise NotImplementedError

    def tower_attention_macs(self, vision, height: int, width: int) -> int:
        """Those of `tower_macs` that are products of queries, keys and values; same arguments."""
        raise NotImplementedError

    def projector_macs(self, config, tokens: int) -> int:
        """MAC of the projector (or the tower's merger) for so many visual tokens out of it, by formula."""
        raise NotImplementedError

    # ---- costs, of a model (true shapes on the meta device, or a loaded one)

    def tower_of(self, inner: nn.Module) -> nn.Module:
        """The vision tower of the multimodal model inside (`model.model`)."""
        return inner.vision_tower

    def projector_of(self, inner: nn.Module) -> nn.Module:
        """Its projector."""
        return inner.multi_modal_projector

    def pixels_seen(self, config, arguments: Mapping[str, object], pixels: Tensor) -> list[tuple[int, int]]:
        """Sizes of the images in a call of the tower.

        Args:
            config: the model's.
            arguments: of the call, those with names.
            pixels: its first argument, see `Images.tensor`.

        Returns:
            (height, width) in pixels of each image.
        """
        return [tuple(pixels.shape[-2:])] * len(pixels)

    def tower_parts(self, model: nn.Module, height: int, width: int) -> tuple[list[Part], int]:
        """What the tower runs on one image.

        Args:
            model: true shapes on the meta device, or a loaded one.
            height: of the image, in pixels.
            width: likewise.

        Returns:
            Its parts, and the MAC of what cannot be traced (torch 2.15 traces no convolution on the meta
            device).
        """
        raise NotImplementedError

    def projector_part(self, model: nn.Module) -> Part:
        """The projector, for one visual token out of it."""
        projector = self.projector_of(model.model)
        first = next(m for m in projector.modules() if isinstance(m, nn.Linear))
        return Part(projector, (first.weight.new_empty(1, 1, first.in_features),))

    def noise(self, vision, pixels: tuple[int, int], batch: int, generator) -> dict[str, Tensor]:
        """What the image processor would make of images of noise, by the names of its outputs.

        Args:
            vision: the tower's configuration.
            pixels: height and width of each image.
            batch: number of images.
            generator: torch's, on the CPU.
        """
        raise NotImplementedError

    def prompt_facts(self, is_image: Tensor) -> dict[str, Tensor]:
        """Inputs beside token ids and images that the processor would make.

        Args:
            is_image: where visual tokens stand, bool [B, n].
        """
        return {}

    def narrow(self, body: Mapping) -> dict:
        """The keyword arguments of a configuration with the same depth and image, but widths of 16 and a
        vocabulary of 512: it runs in a moment anywhere, and launches as many kernels.

        Args:
            body: those of the configuration to be made narrow.

        Raises:
            UserError: none is known.
        """
        raise UserError(f"no narrow form of {self.title} is known")


class Adapter:
    """One loaded model of a family, for the engine.

    The base class is for images of one size and 1-D rotary positions; `images` and `see` are always the
    family's own.

    Attributes:
        family: its facts.
        model: the generative model.
        inner: the multimodal model inside.
        language_model: its decoder.
        layers: the decoder's layers, Llama-like (`self_attn.{q,k}_proj`, `input_layernorm`).
        text_config: the decoder's configuration.
        image_token_id: of the places in a prompt.
        grid: rows and columns of visual tokens of every image; None where images differ.
        feature: the signal that the language model would get, before the projector.
        heads: heads of the tower's attention.
        tower_norm: the norm behind the tower's last layer where the feature does not pass it; else None.
    """

    feature: Signal
    grid: Grid | None = None
    tower_norm: nn.Module | None = None

    def __init__(self, family: Family, model: nn.Module):
        self.family, self.model = family, model
        self.inner = model.model
        self.language_model = self.inner.language_model
        self.layers = self.language_model.layers
        self.text_config = model.config.get_text_config()
        self.image_token_id = model.config.image_token_id
        self.heads = family.tower_heads(model.config.vision_config)

    @property
    def visual_tokens(self) -> int | None:
        """Places that the processor leaves for every image in the prompt; None where images differ."""
        return None if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def has_cls(self) -> bool:
        return self.family.has_cls

    @property
    def projects(self) -> bool:
        return self.family.projects

    @property
    def renumbers(self) -> bool:
        return self.family.renumbers

    # ---- the tower

    def images(self, arguments: Mapping[str, object]) -> Images:
        """The images of a call of `get_image_features`.

        Args:
            arguments: of the call, by name.

        Raises:
            RuntimeError: they hold what is not supported.
        """
        raise NotImplementedError

    def see(
        self, images: Images, which: Sequence[int], grids: Sequence[Grid], signals: Iterable[Signal]
    ) -> list[dict[Signal, Tensor]]:
        """Run the vision tower once.

        Args:
            images: of the call.
            which: numbers of those to be looked at.
            grids: rows and columns of visual tokens to look at each of them with.
            signals: wanted beside the feature, which is always given.

        Returns:
            Of each image of `which` its signals, the feature [N, d] among them; shapes as `ImageView` has
            them.

        Raises:
            ValueError: a layer that there is not.
            UserError: a kind of signal that the family has not.
        """
        raise NotImplementedError

    def project(self, features: Tensor) -> Tensor:
        """Features into the language model's space, [.., d] -> [.., D]."""
        return self.family.projector_of(self.inner)(features) if self.projects else features

    # ---- the prompt

    def check_prompt(self, arguments: Mapping[str, object]) -> None:
        """Whether the engine supports a call of the multimodal model.

        Args:
            arguments: of the call, by name.

        Raises:
            RuntimeError: it does not.
        """

    def image_sizes(self, layout: Layout) -> list[list[int]]:
        """Visual tokens of each image of each sample, in order."""
        return [[self.visual_tokens] * (n // self.visual_tokens) for n in layout.visual]

    def check_positions(
        self, layout: Layout, sizes: Sequence[Sequence[int]], positions: Tensor | None
    ) -> None:
        """Whether the language model's positions can be right for a prompt.

        Args:
            layout: of the prompts.
            sizes: see `image_sizes`.
            positions: int64 [B or 1, n], or [3, B, n] of M-RoPE ([4, B, n] where a first row numbers the
                tokens for masks); None: the language model counts them itself.

        Raises:
            RuntimeError: they cannot.
        """

    def prompt_positions(self, before: int, grid: Grid, after: int) -> Tensor:
        """Rotary positions of a prompt with one image.

        Args:
            before: text tokens ahead of it.
            grid: rows and columns of its visual tokens.
            after: text tokens behind it.

        Returns:
            int64 [1, n], or [3, n] of M-RoPE.
        """
        return torch.arange(before + grid[0] * grid[1] + after)[None]

    def following(self, layout: Layout, positions: Tensor | None) -> Tensor:
        """Position of the first decoded token.

        Args:
            layout: of the prompts.
            positions: see `check_positions`.

        Returns:
            int64 [B], by the numbering of `positions`.
        """
        return layout.ends

    def moved(self, positions: Tensor | None, before: Layout, after: Layout, move: Move) -> Tensor:
        """The language model's positions after a cut at its input, where tokens keep theirs.

        Args:
            positions: before the cut, see `check_positions`.
            before: layout before the cut.
            after: layout after it.
            move: which token goes where.

        Returns:
            Shaped as `positions`, with as many columns as are left.
        """
        if positions is None:
            positions = before.positions
        return positions.expand(len(move.place), -1).gather(1, move.place)

    def shrunk(
        self, positions: Tensor, layout: Layout, grids: Sequence[Sequence[tuple[Grid, Grid]]]
    ) -> Tensor:
        """The prompt's positions as if its images had been smaller; a small image's tokens have theirs in its
        first places.

        Args:
            positions: see `check_positions`.
            layout: of the prompts.
            grids: for each sample, each image's raster in the prompt and as it was seen.

        Returns:
            Shaped as `positions`.
        """
        raise NotImplementedError("1-D positions are numbered anew")


#: widths of a narrow model, see `Family.narrow`
NARROW_WIDTH, NARROW_HEAD, NARROW_VOCABULARY = 16, 8, 512


def narrow_text(text: Mapping) -> dict:
    """The language model's configuration, narrow; heads are grouped if they were."""
    grouped = text["num_key_value_heads"] < text["num_attention_heads"]
    return {
        **text,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "hidden_size": NARROW_WIDTH,
        "num_key_value_heads": 1 if grouped else 2,
        "head_dim": NARROW_HEAD,
        "vocab_size": NARROW_VOCABULARY,
        **NO_TOKENS,
    }


NO_TOKENS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))


def with_sdpa(module: type, config, *arguments) -> nn.Module:
    """A module of a model on the meta device, with attention that a tracer can follow."""
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return module(config, *arguments)
