"""Prefill latency, split into vision tower, selection and LLM prefill, for several methods in turn.

One measurement runs image features and the forward pass to the first token's logits (never generate(), which
adds its own Python, masks and stopping tests). Every moment of it belongs to one part, that of the innermost
span around it, so the parts add up to the total however the spans nest (a method that reads the prompt
projects its tokens just before the LLM, inside of its own pre-hook):

    vision     tower and projector, whenever they run
    selection  the method's own code: the rest of the image-feature call, and the pre-hooks of the language
               model and of the layers that the method cuts at (an unpruned model has none: all is vision)
    llm        everything else behind the features, up to the logits

A method's taps inside a module (reading q or k) count in that module's part. `wall` is the host's clock from
the first call until the device is done; on a GPU the other times are the device's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from harness.costs import energy, macs
from harness.costs.timer import Timer, synchronize
from methods.errors import UserError

PARTS = ("vision", "selection", "llm")
#: what one measurement gives, in milliseconds; `decode` (a token) only where it was asked for
TIMES = (*PARTS, "total", "wall", "decode")
#: warm-up runs for each input (its shapes are its own), by kind of device
WARM_UP = {"cpu": 2, "cuda": 10}
#: for so long at least a prefill is repeated while its energy is measured
ENERGY_SECONDS = 2.0


class Split:
    """What `meter` counts (time, launches), by part. Its spans are set by hand and by hooks on the model.

    meter: `mark()` gives the number of a mark, `between(a, b)` what was counted from a to b.
    """

    def __init__(self, meter):
        self.meter = meter
        self._open: list[str | None] = [None]
        self._marks: list[tuple[int, str | None]] = []  # (mark, part from there on)

    @contextlib.contextmanager
    def span(self, part: str) -> Iterator[None]:
        self._enter(part)
        yield
        self._leave()

    def _enter(self, part: str) -> None:
        self._open.append(part)
        self._marks.append((self.meter.mark(), part))

    def _leave(self) -> None:
        self._open.pop()
        self._marks.append((self.meter.mark(), self._open[-1]))

    @contextlib.contextmanager
    def hooked(self, model: nn.Module, cuts: Sequence[int] | None) -> Iterator[None]:
        """Spans around the model's own modules. cuts: layers whose pre-hooks are the method's work, and the
        language model's with them; None: there is no method.

        To be entered after the pruner, so that its first-in-line pre-hooks run before the pruner's, and its
        last-in-line ones after.
        """

        # hooks must return None, or torch takes the return value for new arguments
        def enter(part):
            return lambda *_: self._enter(part)

        def leave(*_):
            self._leave()

        handles = []
        for module in _vision(model.model):
            handles.append(module.register_forward_pre_hook(enter("vision")))
            handles.append(module.register_forward_hook(leave))
        llm = model.model.language_model
        for module in () if cuts is None else (llm, *(llm.layers[i] for i in cuts)):
            handles.append(module.register_forward_pre_hook(enter("selection"), prepend=True))
            handles.append(module.register_forward_pre_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def parts(self) -> dict[str, float]:
        """Of each of PARTS. On a GPU the caller has synchronised."""
        spent = dict.fromkeys(PARTS, 0.0)
        for (first, part), (last, _) in pairwise(self._marks):
            if part is not None:
                spent[part] += self.meter.between(first, last)
        return spent


def _vision(inner: nn.Module) -> list[nn.Module]:
    """Tower and projector (Qwen's merger is inside of its tower)."""
    names = ("vision_tower", "multi_modal_projector", "visual")
    return [getattr(inner, name) for name in names if hasattr(inner, name)]


def split_prefill(backbone, pruner, inputs: Mapping[str, torch.Tensor], split: Split):
    """One prefill, counted by `split`; the model's output. To be called with the pruner on the model."""
    model = backbone.model
    cuts = None
    if pruner.acts:
        cuts = [s.layer for s in pruner.stages(backbone.num_visual_tokens, backbone.num_layers)]
    with split.hooked(model, cuts):
        with split.span("vision" if cuts is None else "selection"):
            features = model.model.get_image_features(**macs.image_arguments(model, inputs))
        with split.span("llm"):
            return macs.first_token(model, inputs, features)


def put_on(pruner, model: nn.Module) -> contextlib.AbstractContextManager:
    """The pruner on the model; the reference is the model as it comes, not with hooks that only count."""
    return pruner(model) if pruner.acts else contextlib.nullcontext()


@dataclass(frozen=True)
class Once:
    """One measurement. milliseconds: by TIMES. kv_bytes: of the keys and values behind the prefill.
    cached_tokens: columns of the cache (text, and padding of a batch, included), mean over the layers."""

    milliseconds: dict[str, float]
    kv_bytes: int
    cached_tokens: float


def measure_once(backbone, pruner, inputs: Mapping[str, torch.Tensor], decode_tokens: int = 0) -> Once:
    """One prefill, and `decode_tokens` greedy tokens behind it. inputs: [B, n], on the backbone's device."""
    model, device = backbone.model, backbone.model.device
    split, host = Split(Timer(device)), Timer("cpu")
    with torch.inference_mode(), put_on(pruner, model):
        synchronize(device)
        begin = host.mark()
        output = split_prefill(backbone, pruner, inputs, split)
        synchronize(device)
        end = host.mark()
        times = split.parts()
        times |= {"total": sum(times.values()), "wall": host.between(begin, end)}
        layers = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        kv_bytes = sum(k.nbytes + v.nbytes for k, v in layers)
        columns = sum(k.shape[-2] for k, _ in layers) / len(layers)
        if decode_tokens:
            times["decode"] = _decode(model, inputs, output, decode_tokens) / decode_tokens
    return Once(times, kv_bytes, columns)


def _decode(model, inputs: Mapping[str, torch.Tensor], output, tokens: int) -> float:
    """Milliseconds of so many greedy steps behind a prefill's output."""
    timer, mask = Timer(model.device), inputs["attention_mask"]
    begin = timer.mark()
    for _ in range(tokens):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        output = model(
            input_ids=output.logits[:, -1:].argmax(-1),
            attention_mask=mask,
            past_key_values=output.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
    end = timer.mark()
    synchronize(model.device)
    return timer.between(begin, end)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """10th percentile, median and 90th."""
    import numpy as np

    return dict(zip(("p10", "median", "p90"), map(float, np.percentile(values, [10, 50, 90]))))


@dataclass
class Latency:
    """Every repeat of one method. peak_bytes: allocated at most during a prefill; prefill_bytes: the part of
    it beyond what was there before (the weights, mostly); both None without GPU. joules: of one image, None
    where it cannot be measured; joules_by: how it was."""

    repeats: list[Once] = field(default_factory=list)
    peak_bytes: int | None = None
    prefill_bytes: int | None = None
    joules: float | None = None
    joules_by: str | None = None

    def summary(self) -> dict:
        """JSON-able: median, 10th and 90th percentile of each of TIMES, and the rest."""
        measured = [t for t in TIMES if t in self.repeats[0].milliseconds]
        mean = sum(o.cached_tokens for o in self.repeats) / len(self.repeats)
        return {
            **{t: percentiles([o.milliseconds[t] for o in self.repeats]) for t in measured},
            "repeats": len(self.repeats),
            "kv_bytes": round(sum(o.kv_bytes for o in self.repeats) / len(self.repeats)),
            "cached_tokens": round(mean, 2),
            "peak_bytes": self.peak_bytes,
            "prefill_bytes": self.prefill_bytes,
            "joules": self.joules,
            "joules_by": self.joules_by,
        }


def compare(
    backbone,
    pruners: Sequence[object],
    samples: Sequence[Mapping[str, torch.Tensor]],
    repeats: int,
    progress: Callable[[], None] = lambda: None,
    decode_tokens: int = 0,
) -> list[Latency]:
    """Measure every pruner `repeats` times, in turn (see `in_turn`), after warming up on every sample.

    samples: inputs of equal batch size; repeat r uses sample r modulo their number, the same for every
    pruner. Raises UserError if the model's attention is not the fused one.
    """
    check_fused(backbone.model)
    device = backbone.model.device
    results = [Latency() for _ in pruners]
    for pruner in pruners:
        for inputs in samples:
            for _ in range(WARM_UP[device.type]):
                measure_once(backbone, pruner, inputs, decode_tokens)
    for repeat, i in in_turn(len(pruners), repeats):
        inputs = samples[repeat % len(samples)]
        results[i].repeats.append(measure_once(backbone, pruners[i], inputs, decode_tokens))
        progress()
    if device.type == "cuda":
        for pruner, result in zip(pruners, results):
            _memory_and_energy(backbone, pruner, samples[0], result)
    return results


def in_turn(count: int, repeats: int) -> Iterator[tuple[int, int]]:
    """(repeat, which): 0 1 2, 2 1 0, 0 1 2 ..., so that clock drift hits all alike and none always follows
    the same one."""
    for repeat in range(repeats):
        for i in range(count) if repeat % 2 == 0 else reversed(range(count)):
            yield repeat, i


def check_fused(model: nn.Module) -> None:
    """UserError unless tower and language model both use fused attention (sdpa)."""
    used = {c._attn_implementation for c in (model.config.get_text_config(), model.config.vision_config)}
    if used != {"sdpa"}:
        raise UserError(
            f"attention is {' and '.join(sorted(map(str, used)))}: latencies are compared under fused "
            "attention for all; load the model with attn_implementation='sdpa'"
        )


def _memory_and_energy(backbone, pruner, inputs, result: Latency) -> None:
    device = backbone.model.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    measure_once(backbone, pruner, inputs)
    result.peak_bytes = torch.cuda.max_memory_allocated(device)
    result.prefill_bytes = result.peak_bytes - before
    gpu = energy.find(device)
    if gpu is not None:
        joules, result.joules_by = gpu.joules(lambda: measure_once(backbone, pruner, inputs), ENERGY_SECONDS)
        result.joules = None if joules is None else joules / len(inputs["input_ids"])
