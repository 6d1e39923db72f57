"""What a GPU says of itself through NVML: its settings, and the energy it uses. Nothing is ever made up: what
the driver does not tell is None.
"""

from __future__ import annotations

import time
from collections.abc import Callable


def find(device, nvml=None) -> Gpu | None:
    """The GPU behind a torch device; None on a CPU, and where NVML cannot be used.

    nvml: stands in for the module `pynvml` (package nvidia-ml-py).
    """
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return None
    if nvml is None:
        try:
            import pynvml as nvml
        except ImportError:
            return None
    # by UUID: NVML's numbers are not CUDA's where CUDA_VISIBLE_DEVICES hides or reorders them
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        nvml.nvmlInit()
        return Gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
    except nvml.NVMLError:
        return None


class Gpu:
    """One GPU. nvml: the module; handle: NVML's, of the device."""

    def __init__(self, nvml, handle):
        self._nvml, self._handle = nvml, handle

    def _ask(self, question: str, *arguments):
        """The answer to an NVML call, None where it is not supported."""
        try:
            return getattr(self._nvml, question)(*arguments)
        except self._nvml.NVMLError:
            return None

    def facts(self) -> dict[str, object]:
        """Driver, clocks in MHz (now, and the highest possible), power limit in watts."""
        milliwatts = self._ask("nvmlDeviceGetEnforcedPowerLimit", self._handle)
        facts = {
            "driver": self._ask("nvmlSystemGetDriverVersion"),
            "power_limit_w": None if milliwatts is None else milliwatts / 1000,
        }
        for name, kind in (("sm", self._nvml.NVML_CLOCK_SM), ("memory", self._nvml.NVML_CLOCK_MEM)):
            facts[f"{name}_mhz"] = self._ask("nvmlDeviceGetClockInfo", self._handle, kind)
            facts[f"{name}_max_mhz"] = self._ask("nvmlDeviceGetMaxClockInfo", self._handle, kind)
        return facts

    def joules(self, run: Callable[[], object], seconds: float) -> tuple[float | None, str | None]:
        """Energy of one `run` (which ends with the device idle), and how it was measured: the board's total
        over repeated runs of `seconds` in all, by its counter. (None, None) if it has none (GPUs older than
        Volta).
        """
        before = self._ask("nvmlDeviceGetTotalEnergyConsumption", self._handle)  # millijoules
        if before is None:
            return None, None
        runs = _repeat(run, seconds)
        after = self._ask("nvmlDeviceGetTotalEnergyConsumption", self._handle)
        return (None, None) if after is None else ((after - before) / 1000 / runs, "energy counter")


def _repeat(run: Callable[[], object], seconds: float) -> int:
    begin, runs = time.perf_counter(), 0
    while not runs or time.perf_counter() - begin < seconds:
        run()
        runs += 1
    return runs
