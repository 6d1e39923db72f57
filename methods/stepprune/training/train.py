"""Training a policy on a frozen backbone: `python -m harness train METHOD`, or the same under `accelerate
launch` for several GPUs. What is particular to a method comes from its `methods.learned.Learned`; StepPrune's
starting values are here.

The paper's: AdamW, cosine decay, alpha annealed 0 to 1, LM loss + lambda E[K] / N at a fixed lambda
(`--length-weight`). Ours: a stop bias that holds a wanted mean K (`--target-tokens`), the
starting values of `initialise`, and the calibration that every checkpoint gets at the end.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from methods import learned
from methods.errors import UserError
from methods.stepprune import checkpoint as checkpoints
from methods.stepprune.gate import LocalDenoiser
from methods.stepprune.policy import InputEncoder, Policy, PolicyConfig, counts
from methods.stepprune.training import calibrate, state
from methods.stepprune.training.data import (
    HELD_OUT_IMAGES,
    Collator,
    LlavaInstructions,
    Source,
    Supplies,
    held_out,
)
from methods.stepprune.training.log import Log, gradient_norms, plot
from methods.stepprune.training.objective import (
    Batch,
    FrozenModel,
    GatedObjective,
    Objective,
    ObjectiveConfig,
    Outcome,
    Step,
    compare_pathways,
)
from methods.stepprune.training.options import TrainOptions
from methods.stepprune.training.scores import default_gamma

#: K-bar is an average over about so many steps
MEMORY = 20
#: of the least squares of `start_words`, as a share of the mean square of a row's components
RIDGE = 1e-3
#: parameters whose size is not that of a layer's weights, so that a rate for these hardly moves them
OWN_RATE = ("policy.stop", "policy.start", "policy.encoder.text.weight", "policy.encoder.text_offset")


# ---- data


class _Chunks(Dataset):
    """Micro-step m -> its examples; `world` processes share the steps."""

    def __init__(self, source, images: int):
        self.source, self.images = source, images

    def __getitem__(self, m: int) -> list:
        return [self.source[m * self.images + i] for i in range(self.images)]

    def __len__(self) -> int:  # for DataLoader alone; indices come from a sampler
        return 1 << 40


def batches(source, collate: Collator, numbers: range, images: int, workers: int) -> Iterator[Batch]:
    """Micro-batches by number, examples made by `workers` processes ahead of time."""
    loader = DataLoader(
        _Chunks(source, images),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=lambda examples: examples,
    )
    return map(collate, loader)


# ---- schedules


def learning_rate(options: TrainOptions, step: int) -> float:
    """Share of the full rate: linear warm-up, then cosine to 2 %."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def text_gate(options: TrainOptions, step: int) -> float:
    """alpha: linear from 0 to 1 over the first `text_gate_until` of the run."""
    if options.text_gate_until <= 0:
        return 1.0
    return min(1.0, step / (options.text_gate_until * options.steps))


def sharpness(options: TrainOptions, step: int) -> float:
    """Geometric from the first to the final value, over the first `sharpen_until` of the run."""
    done = min(1.0, step / max(1e-9, options.sharpen_until * (options.steps - 1)))
    return options.sharpness * (options.final_sharpness / options.sharpness) ** done


@dataclass
class LengthControl:
    """K-bar, and changes of the stop bias from step to step.

    With a target (ours) the bias follows the one that would have given the step's questions that mean, so
    that K stays put however fast the logits change; lambda is then zero (see `ObjectiveConfig.held`).
    Without a target the bias stays, and lambda, the paper's, decides.
    """

    target: float | None
    mean_count: float

    FOLLOW = 0.4

    def update(self, margins: Tensor) -> float:
        """margins: of the latest step's questions over all processes, [B, S]. Returns what to add to the
        stop bias."""
        self.mean_count += (float(counts(margins, 0.0).double().mean()) - self.mean_count) / MEMORY
        if self.target is None:
            return 0.0
        return self.FOLLOW * calibrate.bias_for(margins, self.target)


# ---- the model


@torch.no_grad()
def start_words(
    encoder: InputEncoder, frozen: FrozenModel, batch: Batch, source: Literal["patches", "random"] = "random"
) -> None:
    """Give W_p weights that bring the batch's words to unit scale (ours).

    source: `random`, or `patches`: by least squares over the batch's patches, such that a word and a patch's
    row are as alike in the tower's space as the word and the projected patch are in the language model's.
    That is the transpose of the linear map from rows to projected rows, which finds the patches that a word
    names far better than the map back does.
    """
    words, valid = frozen.words(batch)
    weight = encoder.text.weight
    if source == "random":
        scale = words[valid].float().square().mean().sqrt()
        weight.normal_(0, 1 / (float(scale) * words.shape[2] ** 0.5))
        return
    rows = batch.features.flatten(0, 1) if batch.valid is None else batch.features[batch.valid]
    seen, rows = frozen.adapter.project(rows.to(frozen.model.dtype)).double(), rows.double()
    gram = rows.T @ rows
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight.copy_(torch.linalg.solve(gram, rows.T @ seen))
    weight.div_(encoder.text(words[valid].to(weight.dtype)).square().mean().sqrt())


@torch.no_grad()
def initialise(
    policy: Policy, frozen: FrozenModel, batch: Batch, words_from: Literal["patches", "random"] = "random"
) -> None:
    """Starting values that depend on the data (ours).

    Word embeddings are projected to unit scale, see `start_words`. Pointer logits get unit variance over the
    tokens of an image, which `temperature` counts on. The stop slot starts as the mean of the rows, hence its
    logit at the mean of theirs.
    """
    words, valid = frozen.words(batch)
    if policy.config.text:
        start_words(policy.encoder, frozen, batch, words_from)
    rows = policy.encoder(batch.features, words, batch.valid, valid, 1.0)
    policy.stop.copy_((rows if batch.valid is None else rows[batch.valid]).mean(tuple(range(rows.ndim - 1))))
    memory = policy.remember(batch.features, words, batch.valid, valid)
    first = policy.logits(policy.start.expand(len(batch), 1, -1), memory)[:, 0, :-1]
    spread = sum(float(own[own.isfinite()].std()) for own in first) / len(first)
    by_attention = policy.config.pointer == "attention"
    query = policy.decoder[-1].query if by_attention else policy.pointer_query
    for parameter in query.parameters():
        parameter.mul_(1 / spread)


def start_at(policy: Policy, frozen: FrozenModel, batch: Batch, tokens: float) -> None:
    """Set the stop bias such that the policy takes `tokens` on average: training can then move a working
    length instead of having to find one, and images start with about the same (ours)."""
    margins = calibrate.collect(policy, frozen, [batch])
    policy.stop_bias.add_(calibrate.bias_for(margins, tokens))


def go_on_from(path: Path, policy: nn.Module, denoiser: LocalDenoiser) -> None:
    """Take the weights of a checkpoint. Raises UserError if it is not there or of another shape."""
    found = checkpoints.read(path, type(policy.config))
    # how many steps there may be is no part of the weights
    free = {"max_steps": policy.config.max_steps} if hasattr(policy.config, "max_steps") else {}
    if replace(found.config, **free) != policy.config:
        raise UserError(f"--start-from {path}: that policy has another shape than this run's")
    for module, trained in zip((policy, denoiser), found.load()):
        module.load_state_dict(trained.state_dict())


def new_objective(options: TrainOptions, frozen: FrozenModel, batch: Batch) -> Objective:
    """Policy and denoiser for the backbone, ready to be trained."""
    n = batch.features.shape[1]
    torch.manual_seed(options.seed)
    policy = Policy(shape_of(options, frozen.width, frozen.text_width, n))
    denoiser = LocalDenoiser(frozen.width)
    policy.to(batch.features.device)
    if options.start_from is None:
        initialise(policy, frozen, batch, options.words_from)
    else:
        go_on_from(options.start_from, policy, denoiser)
    if options.supervise == "loss":  # evidence teaches when to stop, too
        start_at(policy, frozen, batch, min(options.tokens, n / 2))
    else:
        policy.stop_bias.zero_()
        denoiser.requires_grad_(False)
    return objective_of(options, policy, denoiser.to(batch.features.device), frozen)


def shape_of(options: TrainOptions, width: int, text_width: int, n: int) -> PolicyConfig:
    """The policy's, for models of these widths and images of at most n visual tokens."""
    return PolicyConfig(
        width,
        text_width,
        causal_encoder=options.causal_encoder,
        decoder_layers=options.decoder_layers,
        pointer=options.pointer,
        temperature=options.temperature,
        max_steps=options.max_steps or min(n + 1, math.ceil(3 * options.tokens)),
        text=options.text == "on",
    )


def objective_of(options: TrainOptions, policy: Policy, denoiser: LocalDenoiser, frozen) -> Objective:
    config = ObjectiveConfig(
        options.gamma or default_gamma(options.tokens),
        options.aggregation,
        options.chain,
        options.k_from,
        options.slots,
        held=options.length_mode == "held",
        supervise=options.supervise,
    )
    return Objective(policy, denoiser, frozen, config)


def parameter_groups(objective: GatedObjective, options: TrainOptions) -> list[dict]:
    """A learning rate for the policy, one for the denoiser, and one for each of `OWN_RATE`, by its size; no
    decay of vectors."""
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in objective.named_parameters():
        rate = options.denoiser_lr if name.startswith("denoiser") else options.lr
        if options.token_lr and name in OWN_RATE:
            rate = options.token_lr * float(parameter.detach().square().mean().sqrt())
        decay = options.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": p, "lr": r, "base": r, "weight_decay": d} for (r, d), p in groups.items()]


# ---- the run


def train(options: TrainOptions, supplies: Supplies) -> dict[str, object]:
    """Train, calibrate, write checkpoint, log and plot. Returns the summary that is written as
    <out>.summary.json. Raises UserError if `out` exists or a run is under way and `resume` is not set, if it
    was begun with other options, or if another process is at it."""
    with state.only_training(options):
        return _train(options, supplies)


def _train(options: TrainOptions, supplies: Supplies) -> dict[str, object]:
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from tqdm import tqdm

    _check_free(options)
    accelerator = Accelerator(
        mixed_precision=options.precision,
        gradient_accumulation_steps=options.accumulate,
        cpu=options.device == "cpu",
    )
    set_seed(options.seed)
    backbone = supplies.backbone(options.backbone, str(accelerator.device), options.dtype)
    if options.data is None:
        options = replace(options, drawn=options.drawn or supplies.drawn(backbone))
    frozen = FrozenModel(backbone.model, backbone.adapter, options.checkpointing)
    most = backbone.num_visual_tokens
    if options.target_tokens is not None and not 1 <= options.target_tokens <= most:
        raise UserError(f"--target-tokens must be 1 to {most}, the tokens of an image")
    source, collate = data_source(options, backbone, supplies), Collator(backbone, frozen)
    images = options.batch_size // options.questions
    method = learned.find(options.method)
    objective = method.new_objective(options, frozen, collate([source[i] for i in range(images)]))
    optimiser = torch.optim.AdamW(parameter_groups(objective, options), betas=(0.9, 0.98))
    control = LengthControl(options.target_tokens if method.holds(options) else None, options.tokens)
    start, seconds = 0, 0.0
    if options.resume:
        facts = state.load(options.working_folder, objective, optimiser, state.settings(options))
        if facts:
            start, seconds = int(facts["step"]), float(facts["seconds"])
            control = replace(control, **facts["control"])
    model, optimiser = accelerator.prepare(objective, optimiser)
    world, rank = accelerator.num_processes, accelerator.process_index
    numbers = range(
        start * options.accumulate * world + rank, options.steps * options.accumulate * world, world
    )
    supply = batches(source, collate, numbers, images, options.workers)
    main = accelerator.is_main_process
    if main:
        longest = getattr(objective.policy.config, "max_steps", most)
        log = Log(options.log, options.log_every, longest, start)
    stop_at = min(options.steps, options.stop_at or options.steps)
    bar = tqdm(
        total=options.steps, initial=start, desc=options.method, unit="step", disable=None if main else True
    )
    clock = time.monotonic()
    for step in range(start, stop_at):
        for group in optimiser.param_groups:
            group["lr"] = group["base"] * learning_rate(options, step)
        reports, margins = [], []
        for micro in range(options.accumulate):
            number = (step * options.accumulate + micro) * world + rank
            now = Step(
                text_gate(options, step),
                sharpness(options, step),
                options.length_weight or 0.0,
                control.mean_count,
                options.seed * 1_000_003 + number,
            )
            with accelerator.accumulate(model):
                outcome = model(next(supply), now)
                accelerator.backward(outcome.loss)
                if accelerator.sync_gradients:
                    norms = gradient_norms(objective)
                    accelerator.clip_grad_norm_(objective.parameters(), options.clip)
                optimiser.step()
                optimiser.zero_grad()
            # of one width: images, and so trajectories, may differ from process to process
            margins.append(F.pad(outcome.margins, (0, most + 1 - outcome.margins.shape[1]), value=-math.inf))
            reports.append(_report(outcome))
        margins = accelerator.gather(torch.cat(margins)).cpu()
        means = accelerator.gather(torch.stack(reports)).mean(0).tolist()
        count = counts(margins, 0.0).float()
        objective.policy.bias.add_(control.update(margins))
        if main:
            row = dict(zip(REPORTED, means))
            row |= {"count": float(count.mean()), "count_std": float(count.std())}
            row |= {"stop_bias": float(objective.policy.bias)}
            row |= {"alpha": now.alpha, "sharpness": now.sharpness}
            log.add(step + 1, row | norms, [int(c) for c in count])
            bar.set_postfix(
                loss=f"{row['loss']:.3f}", length=f"{row['expected']:.0f}", K=f"{row['count']:.0f}"
            )
            bar.update()
            if (step + 1) % options.save_every == 0 or step + 1 == stop_at:
                spent = seconds + time.monotonic() - clock
                facts = {"step": step + 1, "seconds": spent, "control": _plain(control)}
                facts["settings"] = state.settings(options)
                state.save(options.working_folder, objective, optimiser, facts)
    bar.close()
    if main and stop_at == options.steps:
        log.flush(stop_at)  # the steps behind the last line
    accelerator.wait_for_everyone()
    if not main or stop_at < options.steps:
        return {}
    seconds += time.monotonic() - clock
    return _finish(options, supplies, backbone, frozen, objective, seconds, control)


REPORTED = ("loss", "lm_loss", "right", "expected", "pointer_max", "gate_undecided", "steps", "recall")


def _report(outcome: Outcome) -> Tensor:
    """`REPORTED` of a micro-step, float32 [8]."""
    gates = outcome.gates
    undecided = ((gates > 0.1) & (gates < 0.9)).float().mean()
    values = (
        outcome.loss.detach(), outcome.lm_loss, outcome.right, outcome.expected, outcome.pointer_max,
        undecided, outcome.steps, outcome.recall,
    )  # fmt: skip
    return torch.stack([torch.as_tensor(v, dtype=torch.float32, device=gates.device) for v in values])


def _plain(control: LengthControl) -> dict[str, float]:
    return {k: v for k, v in asdict(control).items() if k != "target"}


def _check_free(options: TrainOptions) -> None:
    if options.resume:
        return
    for path in (options.out, options.working_folder):
        if path.exists():
            raise UserError(f"{path} exists; give another --out, go on with --resume, or remove it")


def data_source(options: TrainOptions, backbone, supplies: Supplies) -> Source:
    """What questions come from."""
    if options.data is None:
        return supplies.training(backbone, options.questions, options.seed, options.drawn)
    return LlavaInstructions(options.data, options.images, supplies.image, options.questions, options.seed)


def held_out_batches(options: TrainOptions, backbone, frozen: FrozenModel, supplies: Supplies) -> list[Batch]:
    """Questions that the run is not trained on: drawn ones, or those of `data` that are kept back."""
    if options.data is None:
        return list(held_out(supplies.held_out(backbone, options.drawn), backbone, frozen))
    own = LlavaInstructions(options.data, options.images, supplies.image, options.questions, held_out=True)
    return list(held_out(own, backbone, frozen, min(HELD_OUT_IMAGES, len(own))))


def _finish(options, supplies, backbone, frozen, objective, seconds, control) -> dict[str, object]:
    """Calibrate and write the checkpoint; compare the pathways; sum up."""
    checkpoints.round_as_stored(objective.eval())
    policy, held = objective.policy, held_out_batches(options, backbone, frozen, supplies)
    margins = calibrate.collect(policy, frozen, held)
    if options.target_tokens is not None:  # training held the mean of its own questions
        policy.bias.add_(calibrate.bias_for(margins, options.target_tokens))
        margins = calibrate.collect(policy, frozen, held)
    found = checkpoints.Checkpoint(options.out, policy.config, options.backbone)
    mean = float(counts(margins, 0.0).double().mean())
    wanted = {round(mean * s) for s in calibrate.SPREAD} | (
        {options.tokens} if options.target_tokens else set()
    )
    calibrate.add_calibration(found, policy, margins, sorted(wanted))
    if frozen.adapter.visual_tokens is None:
        sizes = torch.cat([batch.visual_tokens for batch in held])
        found.visual_tokens = float(sizes.double().mean())
    left_out = {"out", "resume", "stop_at", "device", "workers", "cost"} | learned.find(options.method).UNUSED
    found.training = {
        k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items() if k not in left_out
    } | {"backbone_weights": backbone.describe()["weights"], **objective.settled()}
    for folder in ("data", "images", "start_from"):  # a name, not a place on somebody's disk
        if found.training[folder]:
            found.training[folder] = Path(found.training[folder]).name
    found.save(policy, objective.denoiser)
    if options.steps:
        plot(options.log)
    end = last_step(options, control)
    summary = {
        "steps": options.steps,
        "seconds": seconds,
        "seconds_a_step": seconds / max(1, options.steps),
        "mean_tokens": found.tokens,
        "std_tokens": float(counts(margins, 0.0).double().std()),
        "pathways": pathways(objective, held, end),
    }
    if options.cost:
        summary["cost"] = step_cost(objective, held[0], end)
    options.out.with_suffix(".summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"{options.out}: mean K {summary['mean_tokens']:.1f} ± {summary['std_tokens']:.1f} "
        "on held-out questions"
    )
    return summary


def last_step(options: TrainOptions, control: LengthControl) -> Step:
    """The schedules' end, where the pathways are compared."""
    return Step(1.0, options.final_sharpness, options.length_weight or 0.0, control.mean_count, 0)


def pathways(objective: Objective, held: Iterable[Batch], step: Step) -> dict[str, dict[str, float]]:
    """The train/inference gap: mean LM loss and right answers of every pathway on held-out questions."""
    totals: dict[str, Tensor] = {}
    n = 0
    for batch in held:
        n += len(batch)
        for name, values in compare_pathways(objective, batch, step).items():
            totals[name] = totals.get(name, 0) + len(batch) * torch.tensor(values)
    return {name: dict(zip(("lm_loss", "right"), (t / n).tolist())) for name, t in totals.items()}


def step_cost(objective: Objective, batch: Batch, step: Step, repeats: int = 3) -> dict[str, float]:
    """Seconds of a training step's forward and backward pass, and of the frozen model's alone on all tokens
    (median of `repeats`)."""

    def seconds(run) -> float:
        times = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            run().backward()
            if batch.features.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            objective.zero_grad(set_to_none=True)
        return sorted(times[1:])[repeats // 2]

    def frozen_alone() -> Tensor:
        return objective.frozen.loss(batch, batch.features.clone().requires_grad_())[0]

    return {
        "questions": len(batch),
        "step_seconds": seconds(lambda: objective(batch, step).loss),
        "frozen_model_seconds": seconds(frozen_alone),
    }
