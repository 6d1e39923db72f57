"""One checkpoint for many budgets (ours; the paper trains once for each): a scalar on the stop logit,
calibrated on held-out questions to a requested mean K."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods import learned
from methods.errors import UserError
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.policy import counts
from methods.stepprune.training.data import Supplies, held_out
from methods.stepprune.training.objective import Batch, FrozenModel
from methods.stepprune.training.options import CalibrateOptions

#: means that every trained checkpoint is calibrated to, as multiples of its own
SPREAD = (0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5)


@torch.no_grad()
def collect(policy: nn.Module, frozen: FrozenModel, batches: Iterable[Batch]) -> Tensor:
    """The policy's margins of every question, [Q, S]: all that calibration needs."""
    found = []
    for batch in batches:
        words, valid = frozen.words(batch)
        found.append(policy.margins(batch.features, words, batch.valid, valid).cpu())
    longest = max(own.shape[1] for own in found)  # DiffPrune's are as many as an image has tokens
    return torch.cat([F.pad(own, (0, longest - own.shape[1]), value=-math.inf) for own in found])


def bias_for(margins: Tensor, tokens: float) -> float:
    """The further bias whose mean K is nearest to `tokens`. Raises UserError if no bias gives so many.

    K changes where the bias passes a running minimum of a question's margins. What is returned lies in the
    middle between two of them: at the edge itself, rounding would decide.
    """
    running = margins.cummin(1).values
    always, ever = int((running == math.inf).sum()), int((running > -math.inf).sum())
    least, most = always / len(margins), ever / len(margins)
    if not least <= tokens <= most:
        raise UserError(
            f"this policy takes {least:.0f} to {most:.0f} tokens (StepPrune's: its max_steps); a mean of "
            f"{tokens:g} needs one trained with another --max-steps"
        )
    edges, sizes = running[running.isfinite()].unique(return_counts=True)
    if not len(edges):  # so many whatever the bias
        return 0.0
    edges = torch.cat([edges[:1] - 2, edges, edges[-1:] + 2])
    taken = ever - torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])  # by all questions, between two edges
    i = int((taken - tokens * len(margins)).abs().argmin())
    return float(edges[i] + edges[i + 1]) / 2


def table(margins: Tensor, wanted: Iterable[float], base: float) -> list[tuple[float, float]]:
    """(mean K, bias) for each wanted mean that can be had, ascending. base: the bias already in the
    margins; what is returned includes it."""
    found = {}
    for tokens in wanted:
        try:
            bias = bias_for(margins, tokens)
        except UserError:
            continue
        found[float(counts(margins, bias).double().mean())] = base + bias
    return sorted(found.items())


def add_calibration(
    found: checkpoints.Checkpoint, policy: nn.Module, margins: Tensor, wanted: Iterable[float]
) -> None:
    """Put the mean K at the policy's own bias, and the biases for `wanted` means, in a checkpoint's
    description (not yet on disk)."""
    base = float(policy.bias)
    found.tokens = float(counts(margins, 0.0).double().mean())
    pairs = dict(found.calibration) | dict(table(margins, wanted, base)) | {found.tokens: base}
    found.calibration = sorted(pairs.items())


def run(options: CalibrateOptions, supplies: Supplies) -> int:
    """`python -m harness calibrate METHOD`. supplies: see `methods.stepprune.training.data.Supplies`."""
    kind = learned.find(options.method).kind()
    path = Path(options.checkpoint)
    if not path.exists():
        path = checkpoints.folder(kind) / options.backbone / options.checkpoint
    found = checkpoints.read(path, kind)
    backbone = supplies.backbone(options.backbone, options.device)
    frozen = FrozenModel(backbone.model, backbone.adapter)
    found.check(frozen.width, frozen.text_width)
    policy = found.load()[0].to(backbone.model.device)
    margins = collect(policy, frozen, held_out(supplies.held_out(backbone), backbone, frozen, options.images))
    for tokens in options.tokens:
        bias_for(margins, tokens)  # a mean that cannot be had is an error here
    add_calibration(found, policy, margins, options.tokens)
    found.save_description()
    for tokens in options.tokens:
        k = counts(margins, found.bias_for(tokens) - float(policy.bias)).double()
        print(f"mean {tokens:g}: bias {found.bias_for(tokens):.4f}, K {k.mean():.1f} ± {k.std():.1f}")
    return 0
