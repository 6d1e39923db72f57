"""How many kernels a prefill launches, by part: counted on a narrow model of the same depth, on the CPU.

The number depends on layers, on tokens where a method loops over them, and not on widths. Every operator that
makes or fills a tensor counts as one launch; views count nothing. On a GPU an operator is one kernel with few
exceptions. A loop that a method records as a CUDA graph there (StepPrune's) counts step by step.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backbones.shapes import Shape
from harness.costs import latency, random_weights

#: make no kernel, though their schemas do not call them views
_FREE = ("_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class _Launches(TorchDispatchMode):
    """Counts; a meter for `latency.Split`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        aliases = [r.alias_info for r in operator._schema.returns]
        view = any(a is not None and not a.is_write for a in aliases)
        name = operator._schema.name.removeprefix("aten::")
        self.count += not view and name not in _FREE
        return operator(*args, **(kwargs or {}))

    def mark(self) -> int:
        return self.count

    @staticmethod
    def between(first: int, last: int) -> int:
        return last - first


class LaunchCounter:
    """Counts methods on one shape. Raises UserError for a family without a narrow form.

    bfloat16 whatever was measured: it is what the estimates are about, and norms cast there.
    """

    def __init__(self, shape: Shape, text_tokens: int):
        self._backbone = random_weights.build(random_weights.narrow(shape), "cpu", "bfloat16")
        self._inputs = self._backbone.synthetic(text_tokens)

    def count(self, pruner) -> dict[str, int]:
        """Launches by part. Batch size 1; larger batches launch as many, but for methods that look at one
        image at a time."""
        self._backbone.give_weights(pruner)
        meter = _Launches()
        split = latency.Split(meter)
        # no_grad, not inference_mode: there, composite operators stay whole, casts among them
        with torch.no_grad(), latency.put_on(pruner, self._backbone.model), meter:
            latency.split_prefill(self._backbone, pruner, self._inputs, split)
        return {part: int(n) for part, n in split.parts().items()}
