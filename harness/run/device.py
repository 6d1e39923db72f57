"""Which device a run computes on, and what records call it."""

from __future__ import annotations

from pathlib import Path

from harness.run.processes import launched, local_rank
from methods.errors import UserError


def resolve(text: str) -> str:
    """`--device` as torch takes it; `auto`: a GPU if there is one. Raises UserError for one there is not."""
    import torch

    if launched() and torch.cuda.is_available() and text in ("auto", "cuda"):
        number, there = local_rank(), torch.cuda.device_count()
        if number >= there:
            raise UserError(
                f"process {number + 1} on this machine has no GPU of its own (torch sees {there}); launch "
                f"{there} here, or pass --device cpu"
            )
        torch.cuda.set_device(number)
        return f"cuda:{number}"
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise UserError(f"--device {text}: unknown; use cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {text}: only cpu and cuda are supported")
    if device.type == "cuda" and not (
        torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    ):
        raise UserError(
            f"--device {text}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return text


def name_of(device: str) -> str:
    """The GPU's name, or the processor's and how many threads torch uses."""
    import torch

    if device.partition(":")[0] == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
