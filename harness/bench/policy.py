"""`python -m harness bench-policy`: time of StepPrune's policy at real size, encoder and loop apart, eager
and recorded as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.run.device import name_of, resolve
from harness.store import records


@dataclass(frozen=True)
class BenchOptions:
    """What `bench-policy` takes. The widths are LLaVA-1.5-7B's.

    Attributes:
        width: Of the vision tower.
        text_width: Of the language model.
        visual_tokens: Of an image.
        text_tokens: Of a question.
        steps: K_max, one or several.
        batch_size: Questions at once, one or several.
        device: cpu, cuda, or auto.
        dtype: Of the policy's weights.
        repeats: Calls timed.
        report: JSON file to write.
    """

    width: int = 1024
    text_width: int = 4096
    visual_tokens: int = 576
    text_tokens: int = 62
    steps: tuple[int, ...] = (64,)
    batch_size: tuple[int, ...] = (1,)
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    repeats: int = 20
    report: Path | None = None


def milliseconds(call: Callable[[], object], repeats: int, cuda: bool) -> float:
    """Median over `repeats` calls, after two that are not counted."""
    import torch

    times = []
    for _ in range(repeats + 2):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times[2:])[repeats // 2]


def measure(
    policy, batch: int, visual_tokens: int, text_tokens: int, repeats: int
) -> dict[str, float | bool]:
    """Milliseconds of encoder and memory, of the eager loop, and of the recorded one, for random inputs; all
    K_max steps are taken. equal: whether both loops choose the same tokens."""
    import torch

    from methods.stepprune.fast import ChunkedLoop

    like, c = policy.start, policy.config
    visual = torch.randn(batch, visual_tokens, c.width, device=like.device, dtype=like.dtype)
    text = torch.randn(batch, text_tokens, c.text_width, device=like.device, dtype=like.dtype)
    policy.stop_bias.fill_(-1e4)  # never stops: the time of all steps
    memory = policy.remember(visual, text)
    loop = ChunkedLoop(policy, memory)
    cuda = like.is_cuda
    return {
        "encoder_ms": milliseconds(lambda: policy.remember(visual, text), repeats, cuda),
        "eager_ms": milliseconds(lambda: policy.decode(memory), repeats, cuda),
        "recorded_ms": milliseconds(lambda: loop(memory, look=False), repeats, cuda),
        "equal": torch.equal(policy.decode(memory).order, loop(memory).order),
    }


def run(options: BenchOptions) -> int:
    """`python -m harness bench-policy`."""
    import torch

    from methods.stepprune.policy import Policy, PolicyConfig

    device = resolve(options.device)
    dtype = getattr(torch, options.dtype)
    rows = []
    for steps in options.steps:
        torch.manual_seed(0)
        policy = Policy(PolicyConfig(options.width, options.text_width, max_steps=steps))
        policy = policy.to(device, dtype).eval()
        weights = sum(p.numel() * p.element_size() for p in policy.decoder.parameters())
        for batch in options.batch_size:
            with torch.inference_mode():
                found = measure(policy, batch, options.visual_tokens, options.text_tokens, options.repeats)
            rows.append({"steps": steps, "batch_size": batch, "decoder_weight_bytes": weights, **found})
            print(rows[-1])
    if options.report:
        settings = {
            k: getattr(options, k) for k in ("width", "visual_tokens", "text_tokens", "dtype", "repeats")
        }
        body = {
            "schema_version": records.SCHEMA_VERSION,
            "kind": "policy_bench",
            "git_commit": records.git_commit(),
            "packages": records.package_versions(),
            "device": {"kind": device.partition(":")[0], "name": name_of(device)},
            **settings,
            "rows": rows,
        }
        options.report.parent.mkdir(parents=True, exist_ok=True)
        records.write(options.report, body)
    return 0
