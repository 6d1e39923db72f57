"""How far a stage of the training has come, on disk: weights, moments, counters and the log.

A stage that is stopped at any moment and started again goes on from its latest file and ends with the same
weights, bit for bit (on the same machine, with as many threads): every batch is a function of the seed and
the step, and nothing else is random.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from harness.pocket.recipe.optim import Optimiser


class TrainingStage:
    """name: of the stage; its files are `name.safetensors` and `name.csv` in `folder`.

    While it goes on its file has weights and moments in float32. Once it is done the file is what is handed
    on: the weights alone, in float16, which is what a checkpoint keeps; the next stage begins from that.

    Attributes:
        step: steps done.
        seconds: of training so far, over all its starts.
    """

    SAVE_SECONDS = 180

    def __init__(
        self,
        folder: Path,
        name: str,
        steps: int,
        modules: Mapping[str, nn.Module],
        optimiser: Optimiser,
        stop_at: float | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.log = folder / f"{name}.safetensors", folder / f"{name}.csv"
        self.name, self.steps, self.modules, self.optimiser = name, steps, modules, optimiser
        self.step, self.seconds, self.stop_at = 0, 0.0, stop_at
        self.mean: dict[str, float] = {}
        self._ticked = self._saved = time.monotonic()

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    @property
    def fraction(self) -> float:
        """Share of the steps that is done."""
        return self.step / self.steps

    def resume(self) -> bool:
        """Load the latest state, if there is one, and forget the log's rows of later steps. Raises ValueError
        for one of a training of another length."""
        if not self.path.exists():
            return False
        with safe_open(self.path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            state = json.loads(file.metadata()["state"])
        if state["steps"] != self.steps:
            raise ValueError(f"{self.path} is of a training of {state['steps']} steps, not {self.steps}")
        for name, module in self.modules.items():
            head = f"weights/{name}/"
            module.load_state_dict(
                {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}
            )
        self.optimiser.load(
            {k.removeprefix("moments/"): v for k, v in tensors.items() if k.startswith("moments/")}
        )
        self.step, self.seconds, self.mean = state["step"], state["seconds"], state["mean"]
        if self.log.exists():
            with self.log.open(newline="") as file:
                head, *rows = list(csv.reader(file))
            with self.log.open("w", newline="") as file:
                csv.writer(file).writerows([head, *(r for r in rows if int(r[0]) <= self.step)])
        return True

    def save(self) -> None:
        tensors = {
            f"weights/{name}/{key}": value.detach().contiguous()
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        if self.done:
            tensors = {key: value.half() for key, value in tensors.items()}
        else:
            tensors |= {f"moments/{key}": t.contiguous() for key, t in self.optimiser.state().items()}
        state = {"step": self.step, "steps": self.steps, "seconds": self.seconds, "mean": self.mean}
        temporary = self.path.with_suffix(".tmp")
        save_file(tensors, temporary, {"state": json.dumps(state)})
        os.replace(temporary, self.path)
        self._saved = time.monotonic()

    def advance(self, loss: torch.Tensor, report: Mapping[str, float], every: int) -> bool:
        """Update by the gradients that `.grad` has, count, log, save when it is time. False: stop now.

        report: means of the step, smoothed in the log. every: steps between two rows of the log.
        """
        norm = self.optimiser.step(self.fraction)
        self.step += 1
        now = time.monotonic()
        self.seconds, self._ticked = self.seconds + now - self._ticked, now
        for key, value in {"loss": float(loss.detach()), "grad_norm": norm, **report}.items():
            if value == value:
                self.mean[key] = 0.97 * self.mean.get(key, value) + 0.03 * value
        if self.step % every == 0 or self.done:
            self._write()
        stop = self.stop_at is not None and now >= self.stop_at
        if self.done or stop or now - self._saved > self.SAVE_SECONDS:
            self.save()
        return not (self.done or stop)

    def _write(self) -> None:
        """One row: the columns are fixed by the first (`columns`)."""
        row = {"step": self.step, "seconds": round(self.seconds, 1)}
        row |= {key: f"{self.mean[key]:.5g}" if key in self.mean else "" for key in self.columns}
        new = not self.log.exists()
        with self.log.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(self.name, "  ".join(f"{k} {v}" for k, v in row.items() if v != ""), flush=True)

    columns: tuple[str, ...] = ("loss", "grad_norm")


def stage_weights(path: Path, module: str) -> dict[str, torch.Tensor]:
    """The weights of one module in the file of a stage that is done."""
    head = f"weights/{module}/"
    with safe_open(path, "pt") as file:
        return {k.removeprefix(head): file.get_tensor(k) for k in file.keys() if k.startswith(head)}  # noqa: SIM118
