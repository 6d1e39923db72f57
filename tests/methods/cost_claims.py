"""What each method's own work costs, by formula (docs/methods.md prints the same ones), and how many visual
tokens its schedule leaves, by running its choices on random tensors of the right shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from methods import clip_text, registry
from methods.base import ImageView, Pruner, StageView
from methods.cdpruner import CDPruner
from methods.dart import DART
from methods.errors import UserError
from methods.holov import HoloV
from methods.schedules import mean_over_layers
from methods.sparsevlm import recycling
from methods.vispruner import VisPruner


@dataclass(frozen=True)
class Shape:
    """N patches of an image, d width of the tower, h of one of its heads, D of the language model, Dkv of
    its keys; layers; W tokens of the prompt, the image's included, Q of them text after the image."""

    N: int
    d: int
    h: int
    D: int
    Dkv: int
    layers: int
    W: int
    Q: int

    @classmethod
    def of(cls, config, prompt: int, after: int) -> Shape:
        vision, text = config.vision_config, config.get_text_config()
        head = text.hidden_size // text.num_attention_heads
        return cls(
            N=(vision.image_size // vision.patch_size) ** 2, d=vision.hidden_size,
            h=vision.hidden_size // vision.num_attention_heads, D=text.hidden_size,
            Dkv=head * text.num_key_value_heads, layers=text.num_hidden_layers, W=prompt, Q=after,
        )  # fmt: skip


def nothing(pruner: Pruner, s: Shape, raters: int) -> int:
    return 0


def fastv(pruner: Pruner, s: Shape, raters: int) -> int:
    return s.D**2 + s.W * s.D


def visionzip(pruner: Pruner, s: Shape, raters: int) -> int:
    dominant, contextual = pruner.split(s.N)
    left = s.N - (dominant - 1)
    return (s.N + 1) * s.d + (left - contextual) * contextual * s.h


def prumerge(pruner: Pruner, s: Shape, raters: int) -> int:
    n = pruner.count(s.N) - 1
    return (s.N + 1) * s.d + 2 * n * s.N * s.d + (s.N - n) * s.d


def sparsevlm(pruner: Pruner, s: Shape, raters: int) -> int:
    total, visual = s.N * s.Q * s.D, s.N
    for _, keep in pruner.plan(s.N, s.layers):
        width = s.W - s.N + visual
        total += raters * (s.D**2 + width * s.D)
        visual = keep + recycling(visual - keep)[1]
    return total


def pdrop(pruner: Pruner, s: Shape, raters: int) -> int:
    total, visual = 0, s.N
    for _, left in pruner.plan(s.N, s.layers):
        width = s.W - s.N + visual
        total += width * s.D * s.Dkv + s.D**2 + width * s.D
        visual = left
    return total


def holov(pruner: HoloV, s: Shape, raters: int) -> int:
    crops = pruner.number_of_crops(s.N)
    longest = -(-s.N // crops)
    return (s.N + 1) * s.d + (crops * longest**2 * s.D if pruner.alpha else 0)


def divprune(pruner: Pruner, s: Shape, raters: int) -> int:
    return s.N**2 * s.D


def vispruner(pruner: VisPruner, s: Shape, raters: int) -> int:
    important, diverse = pruner.split(s.N)
    return (s.N + 1) * s.d + ((s.N - important) ** 2 * s.d if diverse else 0)


def dart(pruner: DART, s: Shape, raters: int) -> int:
    return (pruner.image_pivots + pruner.text_pivots) * s.N * s.D


def cdpruner(pruner: Pruner, s: Shape, raters: int) -> int:
    """clip_text.LARGE: the text tower's sizes; one row of it for the question."""
    w, f, layers, e = (
        clip_text.LARGE[f"{name}"]
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "projection_dim")
    )
    row = clip_text.ROW
    text = layers * (row * (4 * w**2 + 2 * w * f) + 2 * row**2 * w) + w * e
    n = pruner.count(s.N)
    return s.N**2 * s.D + s.N * s.d * e + s.N * e + n * (n - 1) // 2 * s.N + text


#: multiply-accumulates of a method's own work, for (pruner, shape, number of rater words)
CLAIMS: dict[str, Callable[[Pruner, Shape, int], int]] = {
    "vanilla": nothing,
    "random": nothing,
    "uniform": nothing,
    "downsample": nothing,
    "fastv": fastv,
    "visionzip": visionzip,
    "prumerge": prumerge,
    "prumerge_plus": prumerge,
    "sparsevlm": sparsevlm,
    "pdrop": pdrop,
    "holov": holov,
    "divprune": divprune,
    "vispruner": vispruner,
    "dart": dart,
    "cdpruner": cdpruner,
}


@dataclass(frozen=True)
class Counts:
    """Visual tokens of an image that enter the language model, and that are left after so many layers."""

    entering: int
    cuts: tuple[tuple[int, int], ...]
    layers: int

    @property
    def kept(self) -> int:
        return self.cuts[-1][1] if self.cuts else self.entering

    @property
    def mean(self) -> float:
        left = [self.entering, *(n for _, n in self.cuts)]
        return mean_over_layers([layer for layer, _ in self.cuts], left, self.layers)


def tiny_tower(width: int) -> clip_text.TextTower:
    """Random, of 16 channels and 20 words, for a vision tower of that width."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=12, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = torch.nn.Linear(width, 12, bias=False)
        return clip_text.TextTower(CLIPTextModelWithProjection(config), linear)


def counts(spec: str, budget: int, layers: int, grid: tuple[int, int] = (24, 24), seed: int = 0) -> Counts:
    """What the method's own `select` leaves of a random image and prompt. Raises UserError as `validate`."""
    pruner = registry.build(spec, budget)
    total = grid[0] * grid[1]
    pruner.validate(total, layers)
    generator = torch.Generator().manual_seed(seed)
    entering = total
    if pruner.selects:
        rows, columns = pruner.image_grid(grid)
        seen, heads, d = rows * columns, 2, 8
        hidden, query, keys = torch.randn(3, 1 + seen, d, generator=generator)
        signals = {s: query[:1] if s.kind == "cls_query" else keys for s in pruner.signals}
        view = ImageView(hidden, (rows, columns), heads, hidden, lambda x: x, signals)
        if isinstance(pruner, CDPruner):
            pruner.take(tiny_tower(d))
            view = replace(view, question=(1, 2, 3), final_norm=lambda x: x)
        entering = len(pruner.select(view).kept)
    left, cuts = entering, []
    for stage in pruner.stages(total, layers) if pruner.acts else ():
        attention = torch.rand(2, 3 if stage.rows else 1, left, generator=generator)
        hidden = torch.randn(left + 12, 8, generator=generator)  # 5 text tokens before, 7 behind
        columns = torch.arange(5, 5 + left)
        sample = StageView(
            attention, torch.arange(left), entering, 1, hidden, columns, stage.count, (entering,),
            len(hidden), hidden, lambda x: x,
        )  # fmt: skip
        left = len(stage.select(sample).kept)
        cuts.append((stage.layer, left))
    return Counts(entering, tuple(cuts), layers)


#: LLaVA-1.5-7B with 62 text tokens, 27 of them after the image
SHAPE_7B = Shape(N=576, d=1024, h=64, D=4096, Dkv=4096, layers=32, W=576 + 62, Q=27)
RATERS_7B = 10
BUDGETS = (192, 128, 64)


def schedule_row(spec: str, budget: int) -> str:
    """The schedule of 576 visual tokens for 32 and for 12 layers, as docs/methods.md prints it."""
    cells = [f"`{spec}`", str(budget)]
    for layers in (32, 12):
        try:
            found = counts(spec, budget, layers)
        except UserError:
            cells += ["refused", "–"]
        else:
            cells.append(", ".join([str(found.entering), *(f"{n} after {cut}" for cut, n in found.cuts)]))
            cells.append(f"{found.kept} / {found.mean:.2f}")
    return "| " + " | ".join(cells) + " |"


def cost_row(spec: str) -> list[str]:
    """GFLOP of the method's own work at LLaVA-1.5-7B's shape, by budget."""
    claim = CLAIMS[spec.partition(":")[0]]
    macs = [claim(registry.build(spec, b), SHAPE_7B, RATERS_7B) for b in BUDGETS]
    return [f"{2 * n / 1e9:.3f}" for n in macs]
