"""The same prefill under each paper's way of counting FLOPs, by name.

Papers print anything from 2.98 to 8.89 T for one model, because they differ in what counts: the vision tower,
the text, causal attention, one or two for a multiply-accumulate (MAC). A convention here is a rule; where a
paper states none, it is one that gives the figures it prints, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.costs.closed_form import closed_form_head, closed_form_layer
from harness.costs.shape_counter import TEXT_TOKENS, Budget, ShapeCounter
from methods.errors import UserError


@dataclass(frozen=True)
class Convention:
    """One way to count a prefill.

    Attributes:
        name: by which it is asked for.
        paper: who prints figures that follow from it.
        stated: whether the paper states the rule; otherwise it was found from the figures.
        per_mac: FLOPs a multiply-accumulate, 1 or 2.
        text_tokens: of the prompt; 0: visual tokens alone.
        causal: attention in the language model counts half, the pairs under the mask.
        feed_forward: matrices of the feed-forward layer that count, of three.
        tower: the vision tower counts as it is, without its attention, or not at all.
        projector: counts, on the tokens that the method projects.
        head: counts, at one position.
        own: what the method itself computes counts.
    """

    name: str
    paper: str
    stated: bool
    per_mac: int = 2
    text_tokens: int = TEXT_TOKENS
    causal: bool = False
    feed_forward: int = 3
    tower: Literal["whole", "no attention", "none"] = "none"
    projector: bool = False
    head: bool = False
    own: bool = False

    @property
    def rule(self) -> str:
        """In words, for a table."""
        text = f"{self.text_tokens} text tokens" if self.text_tokens else "no text"
        tower = {"whole": "tower", "no attention": "tower without attention", "none": "no tower"}
        parts = [f"{self.per_mac} a MAC", text]
        parts.append("causal attention counted half" if self.causal else "full attention")
        if self.feed_forward != 3:
            parts.append(f"{self.feed_forward} of 3 feed-forward matrices")
        parts.append(tower[self.tower])
        parts += [name for name in ("projector", "head") if getattr(self, name)]
        return ", ".join(parts + ["the method's own work"] * self.own)

    def tera(self, counter: ShapeCounter, spec: str, budget: Budget | None) -> float:
        """1e12 FLOPs (or MAC) of a method's prefill, from its plan by `counter`.

        Raises what `ShapeCounter.count` does.
        """
        count, shape = counter.count(spec, budget), counter.shape
        made, config = count.plan, shape.config
        total = sum(
            closed_form_layer(config.text_config, n + self.text_tokens, self.causal, self.feed_forward)
            for n in made.visual_tokens
        )
        if self.tower != "none":
            pixels = shape.pixels_of(made.grid)
            attention = shape.family.tower_attention_macs(config.vision_config, *pixels)
            total += count.tower - (attention if self.tower == "no attention" else 0)
        total += count.projector * self.projector + closed_form_head(config.text_config) * self.head
        return self.per_mac * (total + count.own * self.own) / 1e12


#: in the order of tables
CONVENTIONS = {
    c.name: c
    for c in (
        Convention("ours", "this project", True, tower="whole", projector=True, head=True, own=True),
        Convention(
            "stepprune", "StepPrune's Table 3 and DiffPrune (arXiv 2606.16067, 2605.28051)", False,
            text_tokens=73, causal=True, tower="no attention", projector=True, head=True,
        ),
        Convention("hiprune", "HiPrune", False, text_tokens=73),
        Convention("provip", "ProViP", False, per_mac=1),
        Convention("pdrop", "PyramidDrop's supplement (arXiv 2410.17247)", True, per_mac=1, text_tokens=0),
        Convention(
            "fastv", "FastV's formula, as PIO-FVLM uses it", True, per_mac=1, text_tokens=0, feed_forward=2
        ),
    )
}  # fmt: skip


def named(name: str) -> Convention:
    """Raises UserError that lists the known ones."""
    if name not in CONVENTIONS:
        known = ", ".join(CONVENTIONS)
        raise UserError(f"--convention {name}: no such way of counting; known: {known}, or all")
    return CONVENTIONS[name]
