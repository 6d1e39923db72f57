"""The optimiser of both stages, and a learning rate that follows steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz iterations (Jordan et al., 2024), in float32.

    `torch.optim.Muon` iterates in bfloat16, which is some 20 times slower than float32 on a CPU without
    native bfloat16; equal shapes are also stacked here into one batched product. The step is scaled so that
    an AdamW learning rate fits (0.2 sqrt(max(rows, columns))).
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def _orthogonalise(self, updates: Tensor) -> Tensor:
        """[M, rows, columns] -> the nearest semi-orthogonal matrices, roughly."""
        tall = updates.shape[1] > updates.shape[2]
        x = updates.mT if tall else updates
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        a, b, c = self.COEFFICIENTS
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if tall else x

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    buffer = state["momentum"]
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(buffer, group["momentum"]))
                step = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, self._orthogonalise(torch.stack(updates))):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step * update)


class Optimiser:
    """Muon for the hidden weight matrices, AdamW for everything else, one learning-rate schedule for both.

    Muon gets further per sample on matrices this small, which is what counts on two CPU cores.
    """

    def __init__(self, modules: Mapping[str, nn.Module], hidden: tuple[str, ...], lr: float) -> None:
        self.named: dict[str, nn.Parameter] = {}
        matrices, others = [], []
        for module_name, module in modules.items():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    is_hidden = parameter.ndim == 2 and any(part in name for part in hidden)
                    (matrices if is_hidden else others).append(parameter)
                    self.named[f"{module_name}.{name}"] = parameter
        self.lr = lr
        self.optimisers = [
            Muon(matrices, lr=lr, weight_decay=0.02),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]

    def step(self, progress: float, warmup: float = 0.02) -> float:
        """Clip, update, clear; progress 0..1 sets the learning rate: linear warm-up, then cosine to 2 %.
        Returns the gradient's norm."""
        scale = (
            max(progress / warmup, 1e-3)
            if progress < warmup
            else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        )
        norm = nn.utils.clip_grad_norm_(list(self.named.values()), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.lr * scale
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """Every moment, by parameter and name: all there is to go on from."""
        found = {}
        for name, parameter in self.named.items():
            for optimiser in self.optimisers:
                for key, value in optimiser.state.get(parameter, {}).items():
                    found[f"{name}:{key}"] = value
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        for key, value in state.items():
            name, _, moment = key.rpartition(":")
            parameter = self.named[name]
            owner = next(
                o
                for o in self.optimisers
                if any(parameter is p for group in o.param_groups for p in group["params"])
            )
            owner.state[parameter][moment] = value.float().clone()
