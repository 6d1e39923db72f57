"""`flops` and `latency`: what methods cost and save."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from harness.bench.serve import ServeOptions
from harness.cli.command import command
from harness.cli.options import (
    HOW,
    LONGEST_TEXT,
    WHAT,
    Backbone,
    BatchSizes,
    Budgets,
    Data,
    Device,
    Dtype,
    Match,
    Methods,
    Seed,
    as_path,
    as_text,
    count,
    flag,
    option,
    real,
    split_specs,
)
from harness.run.config import RunConfig
from methods.errors import UserError

FLOPS = """\
examples:
  python -m harness flops                                     llava-1.5-7b at 192, 128 and 64 tokens
  python -m harness flops --backbone qwen2.5-vl-7b --budget 0.333 0.111 --image-size 672
  python -m harness flops --budget 64 --match flops           and each method's budget of equal cost
  python -m harness flops --backbone CHECKPOINT_FOLDER/config.json --methods fastv:k=3,visionzip
  python -m harness flops --convention all --methods fastv,holov   each paper's way of counting

Exit code: 0 all well, 1 the two counters disagree, 2 bad input.
"""
LATENCY = """\
examples:
  python -m harness latency --budget 64                        pocket-llava, here
  python -m harness latency --backbone llava-1.5-7b --random-weights --budget 192 128 64 \\
      --batch-size 1 4                         true 7B shape on a GPU, nothing downloaded
  python -m harness latency --backbone llava-1.5-7b --estimate --budget 64
                                               no GPU: what datasheets say of one
  python -m harness latency --backbone CHECKPOINT_FOLDER --methods fastv:k=3,visionzip --device cuda

A random-weights backbone is a name of `harness flops`, or the path of a config.json. Nothing is
resumed: the same command measures again and replaces its files.

Exit code: 0 all well, 1 a method failed or was left out, 2 bad input.
"""


@command("flops", examples=FLOPS)
def flops(
    budget: Budgets = (192, 128, 64),
    methods: Methods = "all",
    backbone: Annotated[
        str,
        option("--backbone", "one of backbones/shapes, or the path of a config.json", "NAME", as_text, WHAT),
    ] = "llava-1.5-7b",
    text_tokens: Annotated[
        int | None, count("--text-tokens", "length of the text (default 62)", WHAT, most=LONGEST_TEXT)
    ] = None,
    image_size: Annotated[
        int | None,
        count("--image-size", "side of the image in pixels, for backbones that take any", WHAT, metavar="PX"),
    ] = None,
    visual_only_macs: Annotated[
        bool,
        flag(
            "--visual-only-macs",
            "also the theoretical column of other papers: LLM layers on visual tokens alone, 1 per MAC",
            HOW,
        ),
    ] = False,
    match: Match = None,
    convention: Annotated[
        list[str] | None,
        option(
            "--convention",
            "instead: the FLOPs as papers count them, and which printed figures follow; one or several of "
            "ours, stepprune, hiprune, provip, pdrop, fastv, or all",
            "NAME...",
            as_text,
            HOW,
        ),
    ] = None,
) -> int:
    """FLOPs of every method at true 7B and 13B shapes, without weights.

    fvcore and a closed form count every part; they must agree to the last multiply-accumulate.
    """
    specs = split_specs(methods)
    if convention:
        if text_tokens or image_size or visual_only_macs or match:
            raise UserError("--convention says what counts; leave the other options of counting out")
        from harness.report import convention_report

        return convention_report.run(backbone, budget, specs, convention)
    from harness.costs.shape_counter import TEXT_TOKENS
    from harness.report import flops_report

    return flops_report.run(
        backbone,
        budget,
        specs,
        text_tokens or TEXT_TOKENS,
        image_size,
        visual_only_macs,
        matched=match == "flops",
    )


@dataclass(frozen=True)
class LatencyOptions:
    backbone: Backbone = RunConfig.backbone
    budget: Budgets = RunConfig.budgets
    methods: Methods = RunConfig.methods[0]
    seed: Seed = RunConfig.seed
    random_weights: Annotated[
        bool,
        flag(
            "--random-weights",
            "build the backbone's true shape on the device itself, from its configuration: latency does not "
            "depend on the values",
            WHAT,
        ),
    ] = False
    estimate: Annotated[
        bool, flag("--estimate", "measure nothing: rows say so, beside their estimates", WHAT)
    ] = False
    text_tokens: Annotated[
        int | None,
        count(
            "--text-tokens",
            "length of the text, with --random-weights and --estimate (default 62, as in flops); a "
            "checkpoint gets questions of the default data",
            WHAT,
            most=LONGEST_TEXT,
        ),
    ] = None
    data: Data = None
    batch_size: BatchSizes = (1,)
    repeats: Annotated[
        int | None, count("--repeats", "prefills of each method (default 15 on a CPU, 50 on a GPU)", HOW)
    ] = None
    decode_tokens: Annotated[
        int, count("--decode-tokens", "tokens decoded after each", HOW, most=LONGEST_TEXT)
    ] = 16
    device: Device = "auto"
    dtype: Annotated[
        Dtype | None,
        option("--dtype", "of the weights (default bfloat16 on a GPU, float32 on a CPU)", panel=HOW),
    ] = None
    profile: Annotated[
        bool, flag("--profile", "print torch's profile of one prefill of each method, too", HOW)
    ] = False
    out: Annotated[
        Path | None,
        option(
            "--out",
            "JSON file to write, and a table with the suffix .md beside it (default "
            "results/runs/latency/BACKBONE-DEVICE.json)",
            "FILE",
            as_path,
            HOW,
        ),
    ] = None


@command("latency", examples=LATENCY)
def latency(options: LatencyOptions) -> int:
    """Prefill latency, decoding, memory and energy of every method.

    Times the prefill from pixels to the first token's logits, split into vision tower, selection (the
    method's own work) and LLM; and with it decoding, memory and energy. Methods are measured in turn in
    one process, under fused attention; the table gives medians, beside estimates from GPU datasheets.
    What each column means, and its limits: docs/efficiency.md.
    """
    if options.random_weights and options.estimate:
        raise UserError("--random-weights measures, --estimate does not; give one of them")
    specs = tuple(split_specs(options.methods))
    from harness.report import latency_report
    from harness.run.device import resolve

    device = resolve(options.device)
    cpu = device.partition(":")[0] == "cpu"
    return latency_report.run(
        latency_report.Request(
            backbone=options.backbone,
            budgets=tuple(dict.fromkeys(options.budget)),
            methods=specs,
            weights="random" if options.random_weights else "none" if options.estimate else "checkpoint",
            text_tokens=options.text_tokens,
            data=options.data,
            batch_sizes=tuple(dict.fromkeys(options.batch_size)),
            repeats=options.repeats or (15 if cpu else 50),
            decode_tokens=options.decode_tokens,
            device=device,
            dtype=options.dtype or ("float32" if cpu else "bfloat16"),
            seed=options.seed,
            profile=options.profile,
            out=options.out,
        )
    )


BENCH = """\
examples:
  python -m harness bench                          on a quiet machine, about five minutes
  python -m harness bench --methods fastv,divprune --rounds 3 --out DIR

Exit code: 0 all well, 1 the machine was busy or an answer differs, 2 bad input.
"""


@command("bench", examples=BENCH)
def bench(
    out: Annotated[Path, option("--out", "folder for bench.json and bench.md", "DIR", as_path)] = Path(
        "results/bench"
    ),
    backbone: Backbone = "pocket-llava",
    methods: Methods = "all",
    rounds: Annotated[int, count("--rounds", "pairs of each row", HOW)] = 5,
) -> int:
    """What this program's fast ways save, as ratios.

    Shared image prefixes and the sweep against each cell alone; the selection loops of StepPrune, DivPrune
    and VisPruner against their plain forms. Both ways take turns in one process; where other processes
    used the machine meanwhile, the number stands in brackets and claims nothing.
    """
    specs = tuple(split_specs(methods))
    from backbones.hub.find import find
    from harness.bench import ratios
    from harness.run import preflight

    preflight.check_methods(specs, (ratios.BUDGET,))
    find(backbone)
    preflight.check_place(out)
    return ratios.run(out, ratios.Options(backbone=backbone, methods=specs, rounds=rounds))


SERVE = """\
examples:
  python -m harness serve-bench --url http://127.0.0.1:8000/v1
  python -m harness serve-bench --url http://127.0.0.1:8000/v1 http://127.0.0.1:8001/v1 \\
      --concurrency 1 8 32             one server without pruning and one with: ratios to the first

Exit code: 0 all well, 1 a request failed, 2 bad input.
"""


@command("serve-bench", examples=SERVE)
def serve_bench(
    url: Annotated[
        list[str],
        option(
            "--url", "base URL of an OpenAI-compatible server with images, one or several", "URL...", as_text
        ),
    ],
    model: Annotated[
        str | None, option("--model", "name that the server knows (default: its first)", "NAME", as_text)
    ] = None,
    concurrency: Annotated[
        list[int], count("--concurrency", "requests in flight, one or several", metavar="N...", most=1024)
    ] = ServeOptions.concurrency,
    requests: Annotated[
        int, count("--requests", "at each concurrency, at least twice as many", most=100_000)
    ] = ServeOptions.requests,
    max_tokens: Annotated[int, count("--max-tokens", "of an answer", most=LONGEST_TEXT)] = (
        ServeOptions.max_tokens
    ),
    prompt: Annotated[
        str, option("--prompt", "text behind the image", "TEXT", as_text)
    ] = ServeOptions.prompt,
    images: Annotated[
        list[Path] | None,
        option("--images", "image files, one or several (default: drawn scenes)", "FILE...", as_path),
    ] = None,
    timeout: Annotated[
        float, real("--timeout", "seconds for one answer", above=0, metavar="SECONDS")
    ] = ServeOptions.timeout,
    report: Annotated[Path | None, option("--report", "JSON file to write", "FILE", as_path)] = None,
) -> int:
    """Time to first token, latency and throughput of a running server, by concurrency.

    Sends questions about images to servers that are running already, at each concurrency so many at
    once, and reads the answers as they stream. The only command that opens connections without
    --download: to the addresses that you name.
    """
    from harness.bench import serve

    return serve.run(
        ServeOptions(
            tuple(dict.fromkeys(url)),
            model or ServeOptions.model,
            tuple(dict.fromkeys(concurrency)),
            requests,
            max_tokens,
            prompt,
            tuple(images or ()),
            timeout,
        ),
        report,
    )


GPU_DAY = """\
examples:
  python -m harness gpu-day                        25 minutes on one GPU; the same command goes on
  python -m harness gpu-day --minutes 8 --out DIR  what fits into eight minutes
  python -m harness gpu-day --rehearse             every piece on tiny shapes, on a CPU

Exit code: 0 every piece is finished, 1 some are left or failed, 2 bad input.
"""


@command("gpu-day", examples=GPU_DAY)
def gpu_day(
    out: Annotated[Path, option("--out", "folder for results", "DIR", as_path)] = Path(
        "results/runs/gpu-day"
    ),
    minutes: Annotated[float, real("--minutes", "no piece is begun that would end later", above=0)] = 25.0,
    device: Device = "cuda",
    rehearse: Annotated[
        bool, flag("--rehearse", "tiny random shapes on the CPU: does every piece run?")
    ] = False,
    full_maps: Annotated[
        str | None,
        option("--full-maps", "run one piece only, on this shape: FastV with full maps", "NAME", as_text),
    ] = None,
    training_step: Annotated[
        str | None,
        option("--training-step", "run one piece only, on this shape: training steps", "NAME", as_text),
    ] = None,
    repeats: Annotated[
        int | None, count("--repeats", "with these: prefills (default 30), training steps (3)")
    ] = None,
) -> int:
    """Everything that a GPU is needed for, most valuable first, resumable.

    True shapes with random weights: prefill split, memory and energy of every method, StepPrune's loop, FastV
    as released, training steps. Each piece is a process of its own and takes less than eight minutes. No
    network.
    """
    from harness.bench import gpu_day
    from harness.store import records

    pieces = {gpu_day.full_maps: full_maps, gpu_day.training_step: training_step}
    for piece, shape in pieces.items():
        if shape is not None:
            records.write(out, piece(shape, device, *(() if repeats is None else (repeats,))))
            return 0
    gpu_day.check_device(device, rehearse)
    if not rehearse:
        return gpu_day.run(gpu_day.pieces("llava-1.5-7b", "qwen2.5-vl-7b", device), out, minutes)
    llava, qwen = gpu_day.tiny_shapes(out)
    return gpu_day.run(gpu_day.pieces(llava, qwen, "cpu", rehearsal=True), out, minutes)
