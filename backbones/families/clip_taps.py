"""Reading signals inside a CLIP tower: forward hooks on the linear maps of the layers concerned, so that the
tower keeps its fused attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from methods.base import Signal

_MODULES = {"queries": "q_proj", "cls_query": "q_proj", "keys": "k_proj", "values": "v_proj"}


@contextlib.contextmanager
def tapped(layers: nn.ModuleList, signals: Iterable[Signal]) -> Iterator[dict[Signal, Tensor]]:
    """Collects `signals`, each [B, 1 + N or 1, d], of the forward pass made inside of the `with`.

    layers: a tower's encoder layers, with `self_attn.{q,k,v}_proj`. Raises ValueError for a layer there is
    not.
    """
    found: dict[Signal, Tensor] = {}
    handles = []
    try:
        for signal in signals:
            if not -len(layers) <= signal.layer < len(layers):
                raise ValueError(f"the vision tower has {len(layers)} layers, none numbered {signal.layer}")
            layer = layers[signal.layer]
            module = layer if signal.kind == "hidden" else getattr(layer.self_attn, _MODULES[signal.kind])
            handles.append(module.register_forward_hook(_keeper(found, signal)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keeper(found: dict[Signal, Tensor], signal: Signal):
    def keep(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        found[signal] = output[:, :1] if signal.kind == "cls_query" else output

    return keep
