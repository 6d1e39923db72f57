"""What the engine has to know of a model family: an adapter holds it for one loaded model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from backbones.layout import Layout, Move
from methods.base import Signal

Grid = tuple[int, int]


@dataclass(frozen=True)
class Images:
    """The images of one call of `get_image_features`.

    tensor: all their pixels as given. parts: each image's own, views of it. grids: rows and columns of visual
    tokens that each would have unpruned.
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


class Adapter(Protocol):
    """One loaded model of a family.

    family: `config.model_type`. inner: the multimodal model inside; language_model, layers, text_config: its
    decoder. image_token_id: of the places in a prompt. visual_tokens: of every image, None where images
    differ. has_cls: the vision tower has a CLS token. feature: the signal that the language model would get,
    before the projector. projects: there is a projector behind it. heads: of the tower's attention.
    renumbers: rotary positions are 1-D, so that tokens can be numbered anew.
    """

    family: str
    model: nn.Module
    inner: nn.Module
    language_model: nn.Module
    layers: nn.ModuleList
    text_config: object
    image_token_id: int
    visual_tokens: int | None
    has_cls: bool
    feature: Signal
    projects: bool
    heads: int
    renumbers: bool

    def images(self, arguments: Mapping[str, object]) -> Images:
        """The images of a call with these arguments. Raises RuntimeError for what is not supported."""

    def see(
        self, images: Images, which: Sequence[int], grids: Sequence[Grid], signals: Iterable[Signal]
    ) -> list[dict[Signal, Tensor]]:
        """Run the vision tower once, on the images numbered `which` at rasters `grids`: each one's signals.

        Raises ValueError for a layer there is not, UserError for a kind of signal.
        """

    def project(self, features: Tensor) -> Tensor:
        """Features into the language model's space, [.., d] -> [.., D]."""

    def check_prompt(self, arguments: Mapping[str, object]) -> None:
        """Raises RuntimeError if the multimodal model is called with what the engine does not support."""

    def image_sizes(self, layout: Layout) -> list[list[int]]:
        """Visual tokens of each image of each sample, in order."""

    def check_positions(
        self, layout: Layout, sizes: Sequence[Sequence[int]], positions: Tensor | None
    ) -> None:
        """Raises RuntimeError if the language model's `positions` cannot be right for such a prompt. sizes:
        see `image_sizes`."""

    def following(self, layout: Layout, positions: Tensor | None) -> Tensor:
        """Position [B] of the first decoded token, by the numbering of the language model's `positions`."""

    def moved(self, positions: Tensor | None, before: Layout, after: Layout, move: Move) -> Tensor:
        """The language model's positions after a cut at its input, where tokens keep theirs."""

    def shrunk(
        self, positions: Tensor, layout: Layout, grids: Sequence[Sequence[tuple[Grid, Grid]]]
    ) -> Tensor:
        """The prompt's positions as if its images had been smaller; a small image's tokens have theirs in its
        first places. grids: for each sample, each image's raster in the prompt and as it was seen."""
