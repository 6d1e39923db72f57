"""StepPrune as a method that is trained: see `methods.learned.Learned`."""

from __future__ import annotations

from collections.abc import Mapping

from methods.stepprune.training.options import SETTINGS_OF_2605_28051

DEFAULTS: Mapping[str, object] = {}
PRESETS: Mapping[str, Mapping[str, object]] = {
    # how the shipped policies were trained, on pocket-llava at 64 tokens
    "shipped": {
        "text_gate_until": 1.0,
        "token_lr": 0.0,
        "words_from": "random",
        "slots": 288,
        "max_steps": 160,
    },
    # The sister paper's; our copy of StepPrune's lost its own. The same scaffold, so likely the same, never
    # certain.
    "2605.28051": SETTINGS_OF_2605_28051,
}
UNUSED: frozenset[str] = frozenset()

ABLATIONS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    # Table 4: what differs from the method
    "paper": {
        "encoder: causal": {"causal_encoder": True},
        "aggregation: last step": {"aggregation": "last"},
        "aggregation: uniform sum": {"aggregation": "uniform"},
        "aggregation: alive, gamma = 1": {"aggregation": "alive"},
    },
    "ours": {
        "K-bar of the batch": {"k_from": "batch"},
        "no straight-through chain": {"chain": 0},
        "no text": {"text": "off"},
        "alpha over the whole run": {"text_gate_until": 1.0},
        "one learning rate": {"token_lr": 0.0},
        "words start at random": {"words_from": "random"},
    },
    # what the paper leaves open, one value changed at a time
    "open": {
        "temperature 0.1": {"temperature": 0.1},
        "temperature 0.5": {"temperature": 0.5},
        "sharpness 1 to 4": {"sharpness": 1.0, "final_sharpness": 4.0},
        "gamma 0.97": {"gamma": 0.97},
        "alpha at 1 after a quarter": {"text_gate_until": 0.25},
        "learning rate 2e-4": {"lr": 2e-4},
        "learning rate 8e-4": {"lr": 8e-4},
        "two decoder layers": {"decoder_layers": 2},
        "pointer: attention logits": {"pointer": "attention", "decoder_layers": 2},
    },
}


def kind() -> type:
    from methods.stepprune.policy import PolicyConfig

    return PolicyConfig


def shape(options, width: int, text_width: int, n: int):
    from methods.stepprune.training import train

    return train.shape_of(options, width, text_width, n)


def objective(options, policy, denoiser, frozen):
    from methods.stepprune.training import train

    return train.objective_of(options, policy, denoiser, frozen)


def new_objective(options, frozen, batch):
    from methods.stepprune.training import train

    return train.new_objective(options, frozen, batch)


def holds(options) -> bool:
    return options.length_mode == "held" and options.supervise == "loss"


def checkpoint_name(options) -> str:
    target, weight = options.target_tokens, options.length_weight
    name = f"k{target:g}" if target is not None else f"lambda{weight:g}"
    name += "-no-text" * (options.text == "off")
    return name if options.supervise == "loss" else f"{name}-evidence"


def serves(options) -> bool:
    return options.text == "on" and options.supervise == "loss"


def most_tokens(pruner) -> int | None:
    return pruner._policy.config.max_steps


def controls(pruner, held_out) -> Mapping:
    from methods.stepprune import controls

    return controls.ways(pruner, *held_out())
