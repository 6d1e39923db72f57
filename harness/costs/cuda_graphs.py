"""The LLM's prefill as a CUDA graph: what it takes without the launching of its kernels from the host.

A short prefill is launch-bound: the host needs the same time for about 1,600 launches (7B) whatever the
length. Recorded is the language model on what a method leaves of the prompt, and the head at one position;
vision tower and selection stay eager.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.costs import latency, macs
from harness.costs.timer import Timer, synchronize

Record = Callable[[Callable[[], None]], Callable[[], None]]


class NotRecordable(Exception):
    """A prefill of which no graph can be made; the message is the reason."""


@dataclass
class Graphed:
    """milliseconds: of every replay; empty if there is no graph, for `reason`."""

    milliseconds: list[float] = field(default_factory=list)
    reason: str = ""

    def summary(self) -> dict:
        """JSON-able."""
        return latency.percentiles(self.milliseconds) if self.milliseconds else {"reason": self.reason}


def compare(
    backbone, pruners: Sequence, inputs: Mapping[str, Tensor], repeats: int, record: Record | None = None
) -> list[Graphed]:
    """Replay every pruner's graph `repeats` times, in turn. record: as in `prefill`."""
    device = backbone.model.device
    results, replays = [Graphed() for _ in pruners], {}
    if record is None and device.type != "cuda":
        return [Graphed(reason="there is no CUDA device") for _ in pruners]
    for i, pruner in enumerate(pruners):
        try:
            replays[i], _ = prefill(backbone, pruner, inputs, record)
        except NotRecordable as reason:
            results[i].reason = str(reason)
        except RuntimeError as error:  # torch's, from the recording
            results[i].reason = f"recording failed: {str(error).splitlines()[0]}"
    for replay in replays.values():
        for _ in range(latency.WARM_UP[device.type]):
            replay()
    order = list(replays)
    for _, i in latency.in_turn(len(order), repeats):
        timer = Timer(device)
        synchronize(device)
        begin = timer.mark()
        replays[order[i]]()
        end = timer.mark()
        synchronize(device)
        results[order[i]].milliseconds.append(timer.between(begin, end))
    return results


def prefill(
    backbone, pruner, inputs: Mapping[str, Tensor], record: Record | None = None
) -> tuple[Callable[[], None], Tensor]:
    """(what replays the LLM's prefill, where it leaves the logits [B, 1, vocab]).

    record: turns a function that works in place into what replays it; left out, a CUDA graph. Raises
    NotRecordable for a method that cuts inside the language model, and for a batch of unequal lengths.
    """
    if record is None:
        from methods.stepprune.fast import as_cuda_graph as record
    if pruner.acts and pruner.stages(backbone.num_visual_tokens, backbone.num_layers):
        raise NotRecordable("it cuts inside the LLM, where sizes and rows are read on the host")
    model = backbone.model
    arguments = _arguments_of_llm(model, pruner, inputs)
    mask = arguments.pop("attention_mask", None)
    if mask is not None and not bool(mask.all()):
        raise NotRecordable("samples of different length are padded")
    with torch.inference_mode():
        fixed = {name: value.clone() for name, value in arguments.items() if value is not None}
        logits = torch.empty(
            len(inputs["input_ids"]), 1, model.lm_head.out_features,
            device=model.device, dtype=model.lm_head.weight.dtype,
        )  # fmt: skip

        def run() -> None:
            hidden = model.model.language_model(**fixed, use_cache=True).last_hidden_state
            logits.copy_(model.lm_head(hidden[:, -1:]))

        replay = record(run)

    def replayed() -> None:
        with torch.inference_mode():
            replay()

    return replayed, logits


def _arguments_of_llm(model, pruner, inputs: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """What the language model gets in an eager prefill, behind all of the pruner's hooks."""
    seen: dict[str, Tensor | None] = {}

    def note(module, args, kwargs) -> None:
        seen.update({k: kwargs.get(k) for k in ("inputs_embeds", "position_ids", "attention_mask")})

    with torch.inference_mode(), latency.put_on(pruner, model):
        handle = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            macs.prefill(model, inputs)
        finally:
            handle.remove()
    return seen
