"""DiffPrune as a method that is trained: see `methods.learned.Learned`."""

from __future__ import annotations

from collections.abc import Mapping

from methods.stepprune.training.options import SETTINGS_OF_2605_28051

DEFAULTS: Mapping[str, object] = {
    "text": "off",
    # temperature 2.0 to 0.1, as in 2605.28051
    "sharpness": 0.25,
    "final_sharpness": 5.0,
}
PRESETS: Mapping[str, Mapping[str, object]] = {
    # its early stopping on a validation loss is not here
    "2605.28051": SETTINGS_OF_2605_28051,
}
UNUSED = frozenset(
    {
        "length_weight", "aggregation", "causal_encoder", "decoder_layers", "pointer", "temperature",
        "max_steps", "gamma", "chain", "length_mode",
    }
)  # fmt: skip
ABLATIONS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "ours": {"with text": {"text": "on"}, "one K for the batch": {"k_from": "batch"}},
    "open": {"sharpness 0.2 to 0.3": {"sharpness": 0.2, "final_sharpness": 0.3}},
}


def kind() -> type:
    from methods.diffprune.policy import ScorerConfig

    return ScorerConfig


def shape(options, width: int, text_width: int, n: int):
    return kind()(width, text_width, options.text == "on")


def objective(options, policy, denoiser, frozen):
    from methods.diffprune.objective import OneShotObjective

    return OneShotObjective(
        policy, denoiser, frozen, options.tokens, options.k_from, options.slots, options.supervise
    )


def new_objective(options, frozen, batch):
    import torch

    from methods.stepprune.gate import LocalDenoiser
    from methods.stepprune.training.train import go_on_from, start_words

    torch.manual_seed(options.seed)
    policy = shape(options, frozen.width, frozen.text_width, batch.features.shape[1]).build()
    denoiser = LocalDenoiser(frozen.width)
    policy.to(batch.features.device)
    if options.start_from is not None:
        go_on_from(options.start_from, policy, denoiser)
        policy.threshold.zero_()
    elif options.text == "on":
        start_words(policy.encoder, frozen, batch, options.words_from)
    denoiser.to(batch.features.device)
    denoiser.requires_grad_(options.supervise == "loss")  # evidence needs none
    return objective(options, policy, denoiser, frozen)


def holds(options) -> bool:
    return False


def checkpoint_name(options) -> str:
    name = f"k{options.target_tokens:g}" + "-text" * (options.text == "on")
    return name if options.supervise == "loss" else f"{name}-evidence"


def serves(options) -> bool:
    return options.supervise == "loss"


def most_tokens(pruner) -> int | None:
    return None


def controls(pruner, held_out) -> Mapping:
    return {}
