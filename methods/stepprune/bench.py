"""Time of the selection policy at real size: encoder and loop apart, eager and recorded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

from harness.run.session import device_name
from methods.stepprune.fast import ChunkedLoop
from methods.stepprune.policy import Policy, PolicyConfig
from methods.stepprune.training.options import BenchOptions


def milliseconds(call: Callable[[], object], repeats: int, cuda: bool) -> float:
    """Median over `repeats` calls, after two that are not counted."""
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


@torch.inference_mode()
def measure(
    policy: Policy, batch: int, visual_tokens: int, text_tokens: int, repeats: int
) -> dict[str, float | bool]:
    """Milliseconds of encoder and memory, of the eager loop, and of the recorded one, for random inputs; all
    K_max steps are taken. equal: whether both loops choose the same tokens."""
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
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    rows = []
    for steps in options.steps:
        torch.manual_seed(0)
        policy = Policy(PolicyConfig(options.width, options.text_width, max_steps=steps))
        policy = policy.to(device, dtype).eval()
        weights = sum(p.numel() * p.element_size() for p in policy.decoder.parameters())
        for batch in options.batch_size:
            found = measure(policy, batch, options.visual_tokens, options.text_tokens, options.repeats)
            rows.append({"steps": steps, "batch_size": batch, "decoder_weight_bytes": weights, **found})
            print(rows[-1])
    if options.report:
        settings = {
            k: getattr(options, k) for k in ("width", "visual_tokens", "text_tokens", "dtype", "repeats")
        }
        body = {"device": device_name(device), "torch": torch.__version__, **settings, "rows": rows}
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(json.dumps(body, indent=1) + "\n")
    return 0
