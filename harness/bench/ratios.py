"""`python -m harness bench`: what this program's fast ways save, each as a ratio of two times of one run.

The two ways of a row take turns in one process, the order swapped every round, and a ratio is taken in each
round: what slows the machine down for a while hits both. A row says how much of the machine other processes
used meanwhile; where that was more than `QUIET` cores it is a number of a busy machine, and claims nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

from harness.bench.sweep import answered
from harness.report import tables
from harness.run.device import name_of
from harness.run.sweep import SweepEntry
from harness.store import atomic, records
from harness.store.journal import Journal
from harness.tasks.pruned_model import PrunedModel
from methods import registry
from methods.errors import UserError

log = logging.getLogger("harness")
#: cores that other processes may use while a number is measured that claims something
QUIET = 0.2
#: of all rows with answers: visual tokens kept
BUDGET = 64
#: methods whose sharing is timed one by one, see docs/runs.md
SHARING = ("vanilla", "uniform", "visionzip", "fastv", "pdrop:schedule=kept", "sparsevlm", "dart")


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        backbone: of the rows with answers.
        methods: specs, or ("all",).
        rounds: of each row.
        questions: on one image; a round is one image.
        tokens: visual tokens of an image, of the loops.
        widths: by name, (tower's, language model's), of the loops.
        steps: of StepPrune's loop; tokens that the others keep.
        max_new_tokens: of an answer.
    """

    backbone: str = "pocket-llava"
    methods: tuple[str, ...] = ("all",)
    rounds: int = 5
    questions: int = 8
    tokens: int = 576
    widths: tuple[tuple[str, int, int], ...] = (("pocket-llava", 192, 160), ("LLaVA-1.5-7B", 1024, 4096))
    steps: int = BUDGET
    max_new_tokens: int = 16


@dataclass(frozen=True)
class RatioRow:
    """Two ways of doing one thing.

    Attributes:
        name: of the row.
        ours, other: the ways, in words.
        call: (round, ours?) -> what the way gave.
        equal: (ours, other) -> (equal results, results).
    """

    name: str
    ours: str
    other: str
    call: Callable[[int, bool], object]
    equal: Callable[[object, object], tuple[int, int]]


class Bystanders:
    """Cores that other processes use, by the kernel's counters; None where it has none (not Linux)."""

    def __init__(self):
        self._start = self._now()

    def _now(self) -> tuple[float, float, float]:
        own = resource.getrusage(resource.RUSAGE_SELF)
        return time.monotonic(), own.ru_utime + own.ru_stime, _machine_seconds()

    def cores(self) -> float | None:
        """Mean since it was made."""
        (begin, own, all_), (end, own_end, all_end) = self._start, self._now()
        if all_ != all_ or end <= begin:
            return None
        return max(0.0, (all_end - all_) - (own_end - own)) / (end - begin)


def _machine_seconds() -> float:
    """Processor time of everything on this machine so far; NaN if it cannot be known."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return float("nan")


def measure(row: RatioRow, rounds: int) -> dict:
    """Both ways in turn: one warm-up each, then `rounds` pairs. Seconds and ratios (other / ours), medians
    with 10th and 90th percentile; equal results; cores that others used."""
    for ours in (True, False):
        row.call(0, ours)
    beside, pairs, same, results = Bystanders(), [], 0, 0
    for number in range(rounds):
        times, found = {}, {}
        for ours in (True, False) if number % 2 else (False, True):
            begin = time.perf_counter()
            found[ours] = row.call(number, ours)
            times[ours] = time.perf_counter() - begin
        pairs.append((times[True], times[False]))
        equal, all_ = row.equal(found[True], found[False])
        same, results = same + equal, results + all_
    cores = beside.cores()
    return {
        "name": row.name,
        "ours": row.ours,
        "other": row.other,
        "rounds": rounds,
        "ours_seconds": _spread([a for a, _ in pairs]),
        "other_seconds": _spread([b for _, b in pairs]),
        "ratio": _spread([b / a for a, b in pairs]),
        "equal": [same, results],
        "others_cores": cores,
        "claims": cores is not None and cores <= QUIET,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    import numpy as np

    low, high = np.percentile(values, [10, 90])
    return {"p10": float(low), "median": statistics.median(values), "p90": float(high)}


# ---- answers to questions grouped by image


class _Group:
    """The questions on one image, as `harness.run.sweep` takes a task of lmms-eval's."""

    def __init__(self, name: str, example, questions: int):
        self.config = SimpleNamespace(task=name)
        self.dataset = {"eval": [text for text, _ in example.asked[:questions]]}
        generation = {"until": [], "do_sample": False}

        def messages(text: str) -> list[dict]:
            content = [{"type": "image", "url": example.image}, {"type": "text", "text": text}]
            return [{"role": "user", "content": content}]

        self.instances = [
            SimpleNamespace(args=(text, messages, generation, i, name, "eval"))
            for i, text in enumerate(self.dataset["eval"])
        ]


class _Answers:
    """Answers of some methods to a group of questions, in two ways; results by (method, question)."""

    def __init__(self, backbone, groups: Sequence[_Group], options: Options):
        self.backbone, self.groups, self.options = backbone, groups, options

    def ask(self, number: int, specs: Sequence[str], together: bool, one_image: bool = True) -> dict:
        """Of group `number`, from scratch. together: all methods batch by batch, in one vision cache; else
        one after the other, one question at a time. one_image: the questions are known to be on one image."""
        group, size = self.groups[number % len(self.groups)], self.options.questions
        with tempfile.TemporaryDirectory() as scratch:
            entries = []
            for place, spec in enumerate(specs):
                pruner = registry.build(spec, budget=None if spec == "vanilla" else BUDGET)
                model = PrunedModel(
                    self.backbone,
                    pruner,
                    Journal(Path(scratch) / f"{place}.jsonl"),
                    identity={},
                    batch_size=size,
                    max_new_tokens=self.options.max_new_tokens,
                    image_of=lambda task, i: task if one_image else f"{task} {i}",
                )
                entries.append(SweepEntry(SimpleNamespace(name=spec), model))
            answered(self.backbone, group, entries, together, size)
            return {
                (spec, answer.row): answer.text
                for spec, entry in zip(specs, entries)
                for answer in entry.model.journal.answers.values()
            }


def _usable(backbone, spec: str) -> bool:
    """Whether the method can do the budget here, and lacks nothing (a checkpoint, CLIP's text tower)."""
    pruner = registry.build(spec, budget=None if spec == "vanilla" else BUDGET)
    try:
        pruner.validate(backbone.num_visual_tokens, backbone.num_layers)
        backbone.family.check_signals(pruner)
        pruner.resources(backbone.model)
    except UserError:
        return False
    return True


def _same(ours: dict, other: dict) -> tuple[int, int]:
    return sum(ours[key] == other.get(key) for key in ours), max(len(ours), len(other))


def answer_rows(backbone, options: Options) -> Iterator[RatioRow]:
    """The sweep against its cells alone; then what questions on one image save, method by method."""
    from harness.pocket.supplies import PocketSupplies

    source = PocketSupplies().held_out(backbone)
    groups = [_Group(f"image {i}", source[i], options.questions) for i in range(options.rounds)]
    asked = _Answers(backbone, groups, options)
    wanted = list(registry.available()) if options.methods == ("all",) else list(options.methods)
    specs = [spec for spec in wanted if _usable(backbone, spec)]
    n = len(groups[0].instances)
    yield RatioRow(
        f"sweep of {len(specs)} methods",
        f"all together, batches of {n} questions on one image",
        "each alone, one question at a time",
        lambda number, ours: asked.ask(number, specs, together=ours),
        _same,
    )
    for spec in SHARING:
        if spec.partition(":")[0] in {own.partition(":")[0] for own in specs}:
            yield RatioRow(
                f"image prefix, {spec}",
                f"{n} questions share what is known of their image",
                "each question in full, batch and vision cache the same",
                lambda number, ours, spec=spec: asked.ask(number, [spec], together=True, one_image=ours),
                _same,
            )


# ---- loops of single methods


def loop_rows(options: Options) -> Iterator[RatioRow]:
    """StepPrune's loop against `Policy.decode`; DivPrune's and VisPruner's against their plain forms."""
    import torch

    from methods.divprune import farthest
    from methods.stepprune.fast import Decoder
    from methods.stepprune.policy import Policy, PolicyConfig
    from methods.vispruner import choose

    def same(ours, other) -> tuple[int, int]:
        return sum(set(a) == set(b) for a, b in zip(ours.tolist(), other.tolist())), len(ours)

    @torch.inference_mode()
    def twice(ways, inputs, ours: bool):
        return ways[0 if ours else 1](*inputs)

    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    n, steps = options.tokens, options.steps
    for batch in (1, 8):
        for title, width, text_width in options.widths:
            torch.manual_seed(0)
            policy = Policy(PolicyConfig(width, text_width, max_steps=steps)).eval()
            with torch.inference_mode():
                policy.stop_bias.fill_(-1e4)  # never stops: the time of all steps
                memory = policy.remember(random(batch, n, width), random(batch, 62, text_width))
            fast = Decoder(policy)
            ways = (lambda m, fast=fast: fast(m).order), (lambda m, policy=policy: policy.decode(m).order)
            yield RatioRow(
                f"StepPrune's loop, {title}, batch {batch}",
                f"the loop that runs here, {steps} steps",
                "the reference, step by step",
                lambda number, ours, ways=ways, inputs=(memory,): twice(ways, inputs, ours),
                same,
            )
        for title, width, text_width in options.widths:
            tokens = random(batch, n, text_width)
            yield RatioRow(
                f"DivPrune's loop, {title}, batch {batch}",
                f"a running minimum, {steps} tokens",
                "the minimum over all chosen rows, step by step and image by image",
                lambda number, ours, x=tokens: twice((farthest, plain_farthest), (x, steps), ours),
                same,
            )
            scores, features = random(batch, n).softmax(-1), random(batch, n, width)
            inputs = scores, features, steps // 2, steps - steps // 2
            ways = (lambda *a: choose(*a)[1]), plain_rounds
            yield RatioRow(
                f"VisPruner's loop, {title}, batch {batch}",
                f"cosines once, {steps} tokens",
                "cosines of what is left in every round, image by image",
                lambda number, ours, ways=ways, inputs=inputs: twice(ways, inputs, ours),
                same,
            )


def plain_farthest(tokens, n: int):
    """DivPrune's selection as its released code writes it: each step takes the least distance to all that
    were chosen before, for one image at a time. As `methods.divprune.farthest`."""
    import torch
    import torch.nn.functional as F

    found = []
    for image in tokens:
        unit = F.normalize(image.float(), dim=-1)
        distance = 1 - unit @ unit.T
        distance.fill_diagonal_(torch.inf)
        chosen = [distance.amin(0).argmax()]
        distance.fill_diagonal_(-torch.inf)
        while len(chosen) < n:
            chosen.append(distance[torch.stack(chosen)].amin(0).argmax())
        found.append(torch.stack(chosen))
    return torch.stack(found)


def plain_rounds(scores, features, important: int, diverse: int):
    """VisPruner's diverse tokens as its released code finds them: in every round the cosines of the tokens
    that are left, for one image at a time. As the second of `methods.vispruner.choose`."""
    import torch
    import torch.nn.functional as F

    from methods.vispruner import CUT

    found = []
    for own, image in zip(scores, features):
        pool = own.sort(descending=True, stable=True).indices[important:]
        while len(pool) > diverse:
            even, odd = pool[::2], pool[1::2]
            unit = F.normalize(image[even].float(), dim=-1), F.normalize(image[odd].float(), dim=-1)
            order = (unit[0] @ unit[1].T).amax(1).sort(descending=True, stable=True).indices
            cut = min(CUT, len(pool) - diverse, len(even))
            pool = torch.cat([even[order[cut:]], odd])
        found.append(pool)
    return torch.stack(found)


# ---- the command


def run(out: Path, options: Options) -> int:
    """Measure everything, write OUT/bench.json and OUT/bench.md and print the table. 0 if every row claims
    something (the machine was quiet) and answers are equal, else 1."""
    import backbones
    from harness.tasks.environment import prepare_environment

    prepare_environment(offline=True)
    out.mkdir(parents=True, exist_ok=True)
    backbone = backbones.load(options.backbone)
    beside, begin, rows = Bystanders(), time.monotonic(), []
    for row in (*answer_rows(backbone, options), *loop_rows(options)):
        rows.append(measure(row, options.rounds))
        log.info(f"{row.name}: {_ratio(rows[-1])}")
    record = {
        "schema_version": records.SCHEMA_VERSION,
        "kind": "bench",
        "status": "done",
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": records.git_commit(),
        "packages": records.package_versions(),
        "device": {"kind": "cpu", "name": name_of("cpu")},
        "backbone": {"name": Path(options.backbone).name, **backbone.describe()},
        "options": dataclasses.asdict(options) | {"backbone": Path(options.backbone).name},
        "budget": BUDGET,
        "seconds": time.monotonic() - begin,
        "others_cores": beside.cores(),
        "quiet_cores": QUIET,
        "rows": rows,
    }
    records.write(out / "bench.json", record)
    text = render(record)
    atomic.replace(out / "bench.md", (text + "\n").encode())
    print(text)
    log.info(f"\nIn {out}: bench.json, bench.md")
    return 0 if all(r["claims"] and r["equal"][0] == r["equal"][1] for r in rows) else 1


def render(record: dict) -> str:
    """The record as Markdown."""
    rows = [
        {
            "": r["name"],
            "times as fast": _ratio(r),
            "ours, ms": f"{1e3 * r['ours_seconds']['median']:.1f}",
            "other, ms": f"{1e3 * r['other_seconds']['median']:.1f}",
            "equal results": f"{r['equal'][0]} of {r['equal'][1]}",
            "others' cores": "not known" if r["others_cores"] is None else f"{r['others_cores']:.2f}",
            "ours": r["ours"],
            "other": r["other"],
        }
        for r in record["rows"]
    ]
    busy = [r["name"] for r in record["rows"] if not r["claims"]]
    lines = [
        f"# What the fast ways save: {record['device']['name']}",
        "",
        f"`python -m harness bench`, commit {record['git_commit']}, {record['backbone']['name']}, budget "
        f"{record['budget']}; {record['options']['rounds']} rounds, in each of which both ways take their "
        "turn. Times as fast: median of the rounds' ratios, 10th to 90th percentile.",
    ]
    if busy:
        lines += [
            "",
            f"**No claim**: while {len(busy)} of {len(rows)} rows were measured, other processes used more "
            f"than {record['quiet_cores']} cores (or it cannot be known). Their ratios stand in brackets.",
        ]
    return "\n".join([*lines, "", tables.markdown(rows)])


def _ratio(row: dict) -> str:
    r = row["ratio"]
    text = f"{r['median']:.2f} ({r['p10']:.2f}–{r['p90']:.2f})"
    return text if row["claims"] else f"[{text}]"
