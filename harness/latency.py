"""Prefill latency, split into vision tower, selection and LLM prefill, for several methods in turn.

One measurement runs image features and the forward pass to the first token's logits (never generate(), which
adds its own Python, masks and stopping tests), at batch size 1. Marks are set where module hooks allow:

    start | tower .. tower | projector .. projector | features done | [pruner's pre-hook] LLM | per layer:
    [pruner's pre-hook] layer | logits

`vision` is tower and projector; `selection` is what the method's own code takes: the rest of the
image-feature call, and the pre-hooks of the language model and of its layers; `llm` is everything else after
the features. The three add up to `total`. A method's taps inside a module (reading q or k) count in that
module's part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from harness.flops import image_arguments
from harness.timer import Timer, synchronize

PARTS = ("vision", "selection", "llm", "total")
#: warm-up runs for each input (its shapes are its own), by kind of device
WARM_UP = {"cpu": 2, "cuda": 10}


class _Probe(contextlib.AbstractContextManager):
    """Marks around tower, projector, LLM and layers. Entered after the pruner, so that its own first-in-line
    pre-hooks run before the pruner's, and its last-in-line ones after."""

    def __init__(self, model, timer: Timer):
        inner = model.model
        self._vision = [inner.vision_tower, inner.multi_modal_projector]
        self._llm = [inner.language_model, *inner.language_model.layers]
        self._timer = timer
        self.vision: list[tuple[int, int]] = []
        self.selection: list[tuple[int, int]] = []

    def __enter__(self):
        self._handles = []
        for module in self._vision:
            self._span(module, self.vision, module.register_forward_pre_hook, module.register_forward_hook)
        for module in self._llm:
            self._span(
                module,
                self.selection,
                lambda hook, m=module: m.register_forward_pre_hook(hook, prepend=True),
                module.register_forward_pre_hook,
            )
        return self

    def _span(self, module, spans, at_start: Callable, at_end: Callable) -> None:
        opened: list[int] = []
        # hooks must return None, or torch takes the return value for new arguments
        self._handles.append(at_start(lambda *_: opened.append(self._timer.mark())))
        self._handles.append(at_end(lambda *_: spans.append((opened.pop(), self._timer.mark()))))

    def __exit__(self, *exc):
        for handle in self._handles:
            handle.remove()


def measure_once(backbone, pruner, inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Milliseconds of one prefill by part (see PARTS). inputs: one sample on the backbone's device."""
    model, timer = backbone.model, Timer(backbone.model.device)
    # the reference is the model as it comes, not with hooks that only count
    method = pruner(model) if getattr(pruner, "acts", True) else contextlib.nullcontext()
    with torch.inference_mode(), method, _Probe(model, timer) as probe:
        synchronize(model.device)
        start = timer.mark()
        features = model.model.get_image_features(**image_arguments(model, inputs))
        seen = timer.mark()
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            mm_encoder_outputs={"image": features},
            use_cache=True,
            logits_to_keep=1,
        ).logits
        end = timer.mark()
        synchronize(model.device)
        del logits
    vision = sum(timer.between(a, b) for a, b in probe.vision)
    in_llm = sum(timer.between(a, b) for a, b in probe.selection)
    selection = timer.between(start, seen) - vision + in_llm
    total = timer.between(start, end)
    return {"vision": vision, "selection": selection, "llm": total - vision - selection, "total": total}


@dataclass
class Latency:
    """Milliseconds of every repeat by part, peak memory in bytes and energy in joules an image (None without
    GPU).
    """

    milliseconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PARTS})
    peak_bytes: int | None = None
    joules: float | None = None

    def summary(self) -> dict:
        """Median, 10th and 90th percentile of each part."""
        import numpy as np

        parts = {
            part: dict(zip(("p10", "median", "p90"), map(float, np.percentile(values, [10, 50, 90]))))
            for part, values in self.milliseconds.items()
        }
        return {
            **parts,
            "repeats": len(self.milliseconds["total"]),
            "peak_bytes": self.peak_bytes,
            "joules": self.joules,
        }


def compare(
    backbone,
    pruners: Sequence[object],
    samples: Sequence[Mapping[str, torch.Tensor]],
    repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Latency]:
    """Measure every pruner `repeats` times, in turn (A B C A B C ...), so that clock drift hits all alike.

    samples: inputs of single questions; repeat r uses sample r modulo their number, the same for every
    pruner.
    """
    device = backbone.model.device
    results = [Latency() for _ in pruners]
    for pruner in pruners:
        for inputs in samples:
            for _ in range(WARM_UP[device.type]):
                measure_once(backbone, pruner, inputs)
    for repeat in range(repeats):
        inputs = samples[repeat % len(samples)]
        # every other round runs backwards: no method always follows the same one
        order = range(len(pruners)) if repeat % 2 == 0 else reversed(range(len(pruners)))
        for i in order:
            for part, value in measure_once(backbone, pruners[i], inputs).items():
                results[i].milliseconds[part].append(value)
            progress()
    if device.type == "cuda":
        for pruner, result in zip(pruners, results):
            result.peak_bytes, result.joules = _memory_and_energy(backbone, pruner, samples[0], repeats)
    return results


def _memory_and_energy(backbone, pruner, inputs, repeats: int) -> tuple[int, float | None]:
    """Peak allocated bytes of a prefill, and joules an image by NVML's energy counter (None where it has
    none).
    """
    device = backbone.model.device
    torch.cuda.reset_peak_memory_stats(device)
    measure_once(backbone, pruner, inputs)
    peak = torch.cuda.max_memory_allocated(device)
    try:
        import pynvml
    except ImportError:
        return peak, None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # millijoules
        for _ in range(repeats):
            measure_once(backbone, pruner, inputs)
        synchronize(device)
        return peak, (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1000 / repeats
    except pynvml.NVMLError:
        return peak, None
