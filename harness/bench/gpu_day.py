"""Everything that a GPU is needed for, in order of worth, in pieces that are resumed.

Each piece is a command of its own process, so that one that fails or hangs takes nothing down and GPU memory
is free for the next. A piece that is finished has its file in the folder and is not run again; one that does
not fit into the time left waits for the next call. No network, no weights: true shapes with random weights.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.store import records
from methods.errors import UserError

log = logging.getLogger("harness")
#: a piece is stopped after so many seconds
PIECE_SECONDS = 480
#: prefills timed per way in `full_maps`
REPEATS = 30
#: side of the image in a rehearsal of a family whose images have any size
REHEARSAL_PIXELS = 168


@dataclass(frozen=True)
class Piece:
    """One step of the day.

    Attributes:
        name: of its file, OUT/NAME.json.
        what: it measures, one line.
        minutes: expected on an H100-class card.
        arguments: of `python -m harness`, without --out and --report.
        output: the option that names its file.
    """

    name: str
    what: str
    minutes: float
    arguments: tuple[str, ...]
    output: str = "--out"


def pieces(llava: str, qwen: str, device: str, rehearsal: bool = False) -> list[Piece]:
    """The day's steps, most valuable first.

    Args:
        llava, qwen: shapes, or paths of a config.json.
        device: cuda, or cpu in a rehearsal.
        rehearsal: two methods, one repeat, short loops.
    """
    few = ("--repeats", "1") if rehearsal else ()
    methods = ("--methods", "fastv,uniform") if rehearsal else ()
    common = ("--random-weights", "--device", device, *methods, *few)
    counts, shares = (
        (("16",), ("0.333",)) if rehearsal else (("192", "128", "64"), ("0.333", "0.222", "0.111"))
    )
    llava_run = ("latency", "--backbone", llava, *common, "--budget", *counts)
    qwen_run = ("latency", "--backbone", qwen, *common, "--budget", *shares)
    loop = (
        ("--width", "32", "--text-width", "64", "--visual-tokens", "36", "--steps", "4") if rehearsal else ()
    )
    dtype = ("--dtype", "float32") if rehearsal else ()
    return [
        Piece("llava-batch-1", "prefill by part, memory, energy; eager and as a CUDA graph", 5, llava_run),
        Piece(
            "pointer-loop", "StepPrune's loop at real size, 64 steps", 1,
            ("bench-policy", "stepprune", "--device", device, "--batch-size", "1", "8", *loop, *dtype, *few),
            "--report",
        ),
        Piece(
            "fastv-full-maps", "FastV with full attention maps, as released, against one row", 2,
            ("gpu-day", "--full-maps", llava, "--device", device, *(("--repeats", "2") if rehearsal else ())),
        ),
        Piece(
            "training-step", "a training step of every learned method, and of the frozen model alone", 2,
            ("gpu-day", "--training-step", llava, "--device", device, *few),
        ),
        Piece("qwen-batch-1", "the same of Qwen2.5-VL", 5, qwen_run),
        Piece("llava-batch-8", "eight questions at once", 5, (*llava_run, "--batch-size", "8")),
        Piece("qwen-batch-8", "eight questions at once", 6, (*qwen_run, "--batch-size", "8")),
    ]  # fmt: skip


def run(steps: Sequence[Piece], out: Path, minutes: float) -> int:
    """Run what is not finished and fits into `minutes`; write OUT/README.md. 0 if every piece is finished,
    else 1."""
    out.mkdir(parents=True, exist_ok=True)
    start, states = time.monotonic(), {}
    for piece in steps:
        path = out / f"{piece.name}.json"
        left = minutes - (time.monotonic() - start) / 60
        if _finished(path):
            states[piece.name] = "finished earlier"
        elif piece.minutes > left:
            states[piece.name] = "left for the next call"
        else:
            states[piece.name] = _run(piece, path)
        log.info(f"{piece.name}: {states[piece.name]}")
    write_summary(steps, states, out)
    log.info(f"{out / 'README.md'}")
    return 0 if all(_finished(out / f"{p.name}.json") for p in steps) else 1


def _finished(path: Path) -> bool:
    try:
        records.read(path)
    except UserError:  # not there, or cut off when the piece was stopped
        return False
    return True


def _run(piece: Piece, path: Path) -> str:
    command = [sys.executable, "-m", "harness", *piece.arguments, piece.output, str(path)]
    begin = time.monotonic()
    with open(path.with_suffix(".log"), "w", encoding="utf-8") as log_file:
        try:
            code = subprocess.run(
                command, stdout=log_file, stderr=subprocess.STDOUT, timeout=PIECE_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            return f"FAILED: stopped after {PIECE_SECONDS} seconds, see {path.with_suffix('.log').name}"
    if code and not _finished(path):
        return f"FAILED with exit code {code}, see {path.with_suffix('.log').name}"
    return f"{time.monotonic() - begin:.0f} s" + ("" if code == 0 else f", exit code {code}")


def write_summary(steps: Sequence[Piece], states: Mapping[str, str], out: Path) -> None:
    """OUT/README.md: the pieces and how they went, on which device."""
    from tabulate import tabulate

    devices = set()
    for piece in steps:
        path = out / f"{piece.name}.json"
        if _finished(path):
            device = records.read(path).get("device")
            devices |= {device["name"]} if device else set()
    rows = [{"piece": p.name, "measures": p.what, "state": states[p.name]} for p in steps]
    where = ", ".join(sorted(devices)) or "no device named yet"
    text = f"# GPU day: {where}\n\n{tabulate(rows, headers='keys', tablefmt='github')}\n"
    (out / "README.md").write_text(text, encoding="utf-8")


def full_maps(shape: str, device: str, repeats: int = REPEATS) -> dict:
    """FastV's prefill the way the released code runs it (eager attention that returns every layer's full map)
    against ours (fused attention and one query row), beside the unpruned model both ways. Milliseconds,
    medians.

    Raises UserError if the shape cannot be built on the device.
    """
    import torch

    from backbones import shapes
    from harness.costs import random_weights
    from harness.costs.timer import synchronize
    from methods import registry

    cuda = torch.device(device).type == "cuda"
    backbone = random_weights.build(shapes.load(shape), device, "bfloat16" if cuda else "float32")
    inputs = backbone.synthetic(62)
    budget = min(64, backbone.num_visual_tokens // 2)

    def prefill(method: str, maps: bool) -> Callable[[], None]:
        pruner = registry.build(method, budget=None if method == "vanilla" else budget)

        def once() -> None:
            with torch.inference_mode(), pruner(backbone.model):
                backbone.model(**inputs, use_cache=True, logits_to_keep=1, output_attentions=maps)

        return once

    result: dict[str, object] = {**_header("full_maps", device), "budget": budget}
    for ways, maps in (("sdpa", False), ("eager", True)):
        backbone.model.set_attn_implementation(ways)
        for method in ("vanilla", "fastv"):
            call, times = prefill(method, maps), []
            for _ in range(repeats + 2):
                synchronize(backbone.model.device)
                begin = time.perf_counter()
                call()
                synchronize(backbone.model.device)
                times.append(1e3 * (time.perf_counter() - begin))
            result[f"{method}_{'full_maps' if maps else 'fused'}_ms"] = sorted(times[2:])[repeats // 2]
    return result


def training_step(shape: str, device: str, repeats: int = 3) -> dict:
    """Seconds of a training step (forward and backward) of every learned method at a shape with random
    weights, eight questions on two images, and of the frozen model's alone on all tokens. On a GPU the frozen
    model is in bfloat16, and the step under autocast.

    Raises UserError if the shape cannot be built on the device.
    """
    import torch

    from backbones import shapes
    from harness.costs import random_weights
    from methods import learned
    from methods.stepprune.training.objective import FrozenModel, Step
    from methods.stepprune.training.options import TrainOptions
    from methods.stepprune.training.train import step_cost

    cuda = torch.device(device).type == "cuda"
    backbone = random_weights.build(shapes.load(shape), device, "bfloat16" if cuda else "float32")
    frozen = FrozenModel(backbone.model, backbone.adapter)
    batch = _random_batch(backbone, frozen)
    tokens = min(64, backbone.num_visual_tokens // 2)
    found = {}
    for name in learned.names():
        method = learned.find(name)
        options = TrainOptions(Path("unused"), name, target_tokens=tokens, **method.DEFAULTS)
        objective = method.new_objective(options, frozen, batch)
        step = Step(1.0, options.final_sharpness, 0.0, float(tokens), 0)
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            found[name] = step_cost(objective, batch, step, repeats)
    return {**_header("training_step", device), "target_tokens": tokens, "methods": found}


def _random_batch(backbone, frozen, images: int = 2, questions: int = 4, answer: int = 2):
    """What the trainer's collator makes of drawn scenes, of noise and random words: `questions` on each of
    `images`, 62 text tokens, the last `answer` of them to be learned."""
    import torch

    from methods.stepprune.training.objective import IGNORE, Batch

    inputs = backbone.synthetic(62, images)
    ids = inputs["input_ids"]
    is_image = ids[0] == backbone.model.config.image_token_id
    start, end = int(is_image.int().argmax()), int(is_image.nonzero()[-1]) + 1
    pictures = {k: inputs[k] for k in ("pixel_values", "image_grid_thw") if k in inputs}
    seen, grids = frozen.features(pictures)
    after = ids[:, end:].repeat_interleave(questions, 0)
    targets = torch.full_like(after, IGNORE)
    targets[:, -answer:] = after[:, -answer:]
    rows, device = len(after), ids.device
    positions = frozen.positions(start, grids[0], after.shape[1]).to(device)
    return Batch(
        torch.stack(seen).repeat_interleave(questions, 0),
        ids[0, :start],
        after,
        targets,
        torch.full((rows,), after.shape[1] - answer, device=device),
        torch.full((rows,), -1, device=device),
        positions[:, None].expand(-1, rows, -1),
    )


def _header(kind: str, device: str) -> dict[str, object]:
    from harness.run.device import name_of

    return {
        "schema_version": records.SCHEMA_VERSION,
        "kind": kind,
        "git_commit": records.git_commit(),
        "packages": records.package_versions(),
        "device": {"kind": device.partition(":")[0], "name": name_of(device)},
    }


def tiny_shapes(out: Path) -> tuple[str, str]:
    """Paths of the config.json of a tiny LLaVA and a tiny Qwen2.5-VL, made below `out` for a rehearsal."""
    from backbones import random_checkpoint

    found = []
    for family in ("llava-1.5", "qwen2.5-vl"):
        path = random_checkpoint.make(family, out / "shapes" / family) / "config.json"
        body = json.loads(path.read_text(encoding="utf-8"))
        body["vision_config"].setdefault("image_size", REHEARSAL_PIXELS)  # a family of free sizes names none
        path.write_text(json.dumps(body), encoding="utf-8")
        found.append(str(path))
    return tuple(found)


def check_device(device: str, rehearsal: bool) -> None:
    """Raises UserError unless there is a GPU or it is a rehearsal."""
    import torch

    if not rehearsal and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError("gpu-day needs a CUDA device; --rehearse runs every piece on tiny shapes on this CPU")
