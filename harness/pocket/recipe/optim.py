"""Optimiser, schedule and checkpointing that both training stages use."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz iterations (Jordan et al., 2024), in float32.

    `torch.optim.Muon` iterates in bfloat16, which is some 20 times slower than float32 on a CPU without
    native bfloat16; equal shapes are also stacked here into one batched product. The step is scaled so that
    an AdamW learning rate fits (0.2 sqrt(max(rows, columns))).
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def _orthogonalise(self, updates: torch.Tensor) -> torch.Tensor:
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
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
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

    def __init__(
        self, modules: dict[str, nn.Module], lr: float, hidden: tuple[str, ...], other_lr: float = 2e-3
    ) -> None:
        matrices, others = [], []
        for module in modules.values():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    is_hidden = parameter.ndim == 2 and any(part in name for part in hidden)
                    (matrices if is_hidden else others).append(parameter)
        self.parameters = matrices + others
        self.lrs, self.steps = (lr, other_lr), 0
        self.optimisers = [
            Muon(matrices, lr=lr, weight_decay=0.02),
            torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]

    def step(self, progress: float, warmup: float = 0.02) -> float:
        """Clip, update, clear; `progress` 0..1 sets the learning rate: linear warm-up, then cosine to 2 %."""
        scale = (
            min(1.0, progress / warmup)
            if progress < warmup
            else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        )
        # The moments start empty after every resume too.
        self.steps += 1
        scale *= min(1.0, self.steps / 50)
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser, lr in zip(self.optimisers, self.lrs):
            for group in optimiser.param_groups:
                group["lr"] = lr * max(scale, 1e-3)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return float(norm)


class Run:
    """Log (CSV, appended) and weights (safetensors, written atomically) of one training stage."""

    def __init__(self, folder: Path, modules: dict[str, nn.Module], log: Path) -> None:
        self.folder, self.modules, self.log = folder, modules, log
        folder.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.state = {"step": 0, "seconds": 0.0, "samples": 0}
        self._columns: list[str] | None = None

    def save(self) -> None:
        for name, module in self.modules.items():
            temporary = self.folder / f".{name}.tmp"
            save_file({k: v.contiguous() for k, v in module.state_dict().items()}, temporary)
            os.replace(temporary, self.folder / f"{name}.safetensors")
        (self.folder / "state.json").write_text(json.dumps(self.state))

    def resume(self) -> bool:
        """Load the weights and counters of an earlier run (not the optimiser's moments, which refill in ~100
        steps).
        """
        if not (self.folder / "state.json").exists():
            return False
        for name, module in self.modules.items():
            module.load_state_dict(load_file(self.folder / f"{name}.safetensors"))
        self.state.update(json.loads((self.folder / "state.json").read_text()))
        return True

    def write(self, row: dict[str, float]) -> None:
        row = {
            "step": self.state["step"],
            "samples": self.state["samples"],
            "seconds": round(self.state["seconds"], 1),
            **row,
        }
        new = not self.log.exists()
        with self.log.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row), restval="")
            if new:
                writer.writeheader()
            writer.writerow({k: (f"{v:.5g}" if isinstance(v, float) else v) for k, v in row.items()})
        print(
            "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
            flush=True,
        )


class Clock:
    """Training seconds, across resumes."""

    def __init__(self, run: Run) -> None:
        self.run, self.last = run, time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        self.run.state["seconds"] += now - self.last
        self.last = now
