"""Checks methods against recordings of their authors' released code.

A recording folder holds `model/` (see `harness.parity.recorded`), `inputs.safetensors` (`pixel_values.{i}`
[3, h, w], `ids_before.{i}`, `ids_after.{i}`: the prompt is before + image + after), and a folder `<method>/`
a method with `vectors.safetensors`:

    greedy.{label}.{i}           int64 [t], the greedily generated tokens
    logits.{label}.{i}           [vocabulary], at the prompt's last position (optional)
    kept.{label}.{i}             int64, tokens of the image left after the last stage, in the LLM's order
    kept.{label}.{i}.layer{R}    the same after each cut, by ascending R (optional)
    features.{label}.{i}         [n, width], the tokens that enter the LLM, before or behind the projector
                                 (optional)
    position_ids.{label}.{i}     int64 [3, n], M-RoPE positions of all tokens that enter the LLM (optional)
    greedy_{mode}.{label}.{i}    tokens by another decoding of the released code than the one followed: left
                                 out

In `kept`, a number beyond the image's tokens names a token that the method made (see its docstring; ours is
the negative of it); such tokens may be left out at its end. `label` says how the method was set: a budget, or
a budget and a suffix or prefix (`SETTINGS`); a prefix may stand in front of the key,
`{prefix}.greedy.{label}.{i}`. `vanilla` is the unpruned model.

Recordings on Qwen2.5-VL are `<method>/qwen_vectors.safetensors`, on the model in `qwen_model/` and the inputs
in `qwen_inputs.safetensors`, or a folder `<method>/qwen/` with model, `inputs.` and `vectors.safetensors` of
its own. Their inputs are `pixel_values.{i}` [patches, p] (of one frame, or of two), `image_grid_thw.{i}` [1,
3] and `input_ids.{i}`, the whole prompt. Rows of them name the method with `-qwen`.

A folder `<method>/wide/` holds vectors and a `model/` of its own, on the common inputs; its rows name the
method with `-wide`. A folder `<method>/text/` is CLIP's side of text for methods that read the question
(`harness.parity.recorded.load_recorded_text`), and `questions.safetensors` in it has `clip_ids.{i}`.

Random models and images may be left out and described by their seed instead (`harness.parity.drawn`).

Recordings that have a twin with prefix
`nonoise` hang on a random draw of the released code and are left out. Every recording is made again through
the public path, `with pruner(model): model.generate(...)`, alone and in one left-padded batch with the other
inputs of its label. Whatever is not compared gets a line that says why; it is no failure.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from methods.errors import UserError

if TYPE_CHECKING:
    import torch

    from harness.parity import rounds
    from methods.clip_text import TextTower

#: largest difference of a logit or a feature, float32 on a CPU
TOLERANCE = 1e-4

#: HoloV's Qwen release keeps int(N / 3), int(2 N / 9), int(N / 9) of an image's tokens; our fractions are
#: rounded: these keep as many of the recorded images'
RATES = {"33": 0.331, "22": 0.222, "11": 0.111}
#: DART's recordings on Qwen2.5-VL, and one on LLaVA, are labelled by the share that is pruned (0.778, 2/3,
#: 7/9, 8/9); a hair more than the rest, since the released code truncates
LEFT = {"778": 0.222, "33": 0.3334, "22": 0.2223, "11": 0.1112}
#: how labels are read, by method: (pattern, method spec); `{n}` in a spec is the pattern's n-th group, and
#: group 1 the budget (no group: none), to which a third entry is added, or which that entry translates (None:
#: no budget). A label that is just a budget means the method's default settings. A folder may hold recordings
#: of several methods.
SETTINGS: dict[str, list[tuple[str, str] | tuple[str, str, int | Mapping[str, float] | None]]] = {
    "dart": [
        (r"(\d+)k(\d+)", "dart:k={2}"),
        (r"(\d+)fit", "dart:schedule=fit"),
        (r"(\d+)avg", "dart:schedule=average"),
        (r"(\d+)p(\d+)", "dart:image_pivots={2},text_pivots={2}"),
        (r"r(\d+)", "dart", LEFT),
    ],
    "divprune": [(r"(\d+)unsorted", "divprune:order=picked")],
    "fastv": [(r"(\d+)k(\d+)", "fastv:k={2}"), (r"(\d+)avg", "fastv:schedule=average")],
    "holov": [
        (r"p16\.(\d+)", "holov:crops=16"),
        (r"aligned\.r(\d+)", "holov", RATES),
        (r"r(\d+)", "holov:form=released", RATES),
    ],
    "pdrop": [(r"default", "pdrop:schedule=stock")],
    "prumerge": [
        (r"prumerge\.(\d+)", "prumerge", 1),  # labels count selected patches, budgets the extra token too
        (r"prumerge\.adaptive", "prumerge:schedule=adaptive"),
        (r"prumerge_plus\.(\d+)", "prumerge_plus:schedule=released"),
        (r"prumerge_plus\.adaptive", "prumerge_plus:schedule=adaptive"),
    ],
    "sparsevlm": [(r"nonoise\.(\d+)", "sparsevlm")],
    "vispruner": [(r"(\d+)r([\d.]+)", "vispruner:important_ratio={2}")],
    "visionzip": [(r"(\d\d)\+(\d)", "visionzip:dominant=0.{1},contextual=0.0{2}", None)],
}
#: labels of recordings that are left out, and why
NOT_REPRODUCED: dict[str, list[tuple[str, str]]] = {
    "fastv": [(r"\d+sys36", "the scripts' off-by-one start of the image")],
    "sparsevlm": [(r"v10\..+", "release 1.0, rank-based counts"), (r"v2\..+", "release 2.0, SparseVLM+")],
}


@dataclass(frozen=True)
class Setting:
    """A label, and the method spec and budget that it stands for (vanilla: no budget)."""

    label: str
    spec: str
    budget: int | float | None


@dataclass(frozen=True)
class Recording:
    """Where a method's recordings are: vectors, and the model folder and inputs that they were made on."""

    method: str
    vectors: Path
    model: Path
    inputs: Path
    qwen: bool
    variant: str = ""

    @property
    def name(self) -> str:
        return self.method + ("-qwen" if self.qwen else "") + (self.variant and f"-{self.variant}")

    @property
    def text(self) -> Path | None:
        """The folder of the text tower that the recordings were made with, if they were."""
        folder = self.vectors.parents[1 if self.variant else 0] / "text"
        return folder if folder.is_dir() else None


@dataclass(frozen=True)
class RecordingRow:
    """One recording against our run of it. batched: None where the label has no other input for a batch."""

    method: str
    label: str
    sample: int
    alone: Agreement
    batched: Agreement | None

    @property
    def agrees(self) -> bool:
        return self.alone.ok and (self.batched is None or self.batched.ok)

    def __str__(self) -> str:
        batched = "left out: a single input" if self.batched is None else self.batched
        verdict = "" if self.agrees else "  DISAGREES"
        return f"{self.method:14} {self.label:>22} {self.sample:5}   {self.alone}   {batched}{verdict}"


@dataclass(frozen=True)
class LeftOut:
    """Something that is not compared. label: empty for a whole method."""

    method: str
    label: str
    why: str

    def __str__(self) -> str:
        return f"{self.method:14} {self.label:>22} {'':5}   left out: {self.why}"


@dataclass(frozen=True)
class Agreement:
    """kept: the same tokens of the image at every recorded stage (and at the same positions, where these are
    recorded). tokens: the same generated tokens. difference: largest of a logit, features: largest of a
    feature; None where none was recorded."""

    kept: bool
    tokens: bool
    difference: float | None
    features: float | None = None

    @property
    def ok(self) -> bool:
        largest = max(x for x in (self.difference, self.features, 0.0) if x is not None)
        return self.kept and self.tokens and largest <= TOLERANCE

    def __str__(self) -> str:
        kept, tokens = ("same" if same else "DIFFER" for same in (self.kept, self.tokens))
        numbers = (f"{'-':>8}" if x is None else f"{x:8.1e}" for x in (self.difference, self.features))
        return " ".join([f"{kept:11} {tokens:8}", *numbers])


def main(golden: Path, methods: Iterable[str] | None = None) -> int:
    """Print a row a (method, label, input); 0 if every row agrees, else 1.

    methods: names to check, default every method folder there is. Raises UserError if the folder is not laid
    out as described above, or a name has no folder.
    """
    golden = Path(golden)
    sources = _sources(golden, methods)
    from transformers.utils import logging

    from methods import registry

    logging.disable_progress_bar()
    load = functools.cache(_load_source)
    columns = "alone: kept, tokens, |logit|, |feature|"
    print(f"{'method':14} {'budget':>22} {'input':>5}   {columns}   in a batch")
    failed = rows = left_out = 0
    specs: set[str] = set()
    for source in sources:
        if source.method not in registry.available():
            print(f"{source.method:14} no method of this name is registered: DISAGREES")
            failed += 1
            continue
        for row in _rows(source, load(source.model, source.inputs, source.qwen)):
            print(row, flush=True)
            if isinstance(row, LeftOut):
                left_out += 1
                continue
            rows += 1
            failed += isinstance(row, str) or not row.agrees
            if not isinstance(row, str):
                specs.add(setting_of(source.method, row.label).spec)
    if not rows:
        raise UserError(
            f"{golden} holds no recordings to compare; see the docstring of "
            "harness/parity/compare.py for the layout"
        )
    if methods is None:
        for line in _without_recordings(registry.available(), specs):
            left_out += 1
            print(line)
    verdict = f"{failed} disagree" if failed else "all agree"
    print(f"{rows} rows, {verdict}" + (f"; left out: {left_out}, see above" if left_out else ""))
    return 1 if failed else 0


def _rows(source: Recording, subject) -> Iterator[RecordingRow | rounds.RoundsRow | LeftOut | str]:
    """All rows of one source; those of VisPruner's rounds, where they are recorded, last."""
    from harness.parity import drawn, rounds

    model, inputs = subject
    if source.text is not None:
        inputs = with_questions(inputs, source.text)
    yield from check(model, inputs, source.method, drawn.read(source.vectors), source.name)
    steps = source.vectors.with_name("steps.safetensors")
    if source.method == "vispruner" and steps.is_file():
        yield from rounds.check(drawn.read(steps))


def _without_recordings(methods: Iterable[str], specs: Iterable[str]) -> Iterator[LeftOut]:
    """The methods that none of the compared `specs` is about, and those that were only compared with other
    than their default settings."""
    for name in methods:
        settings = sorted(spec.partition(":")[2] for spec in specs if spec.partition(":")[0] == name)
        if not settings:
            yield LeftOut(name, "", "no recordings of it here")
        elif settings[0]:
            yield LeftOut(name, "default settings", f"recorded are {', '.join(settings)} alone")


def check(
    model, inputs: Mapping[int, Sample], method: str, vectors: Mapping[str, torch.Tensor], name: str = ""
) -> Iterator[RecordingRow | LeftOut | str]:
    """Rows of one method's recordings; a line of text for a label that cannot be read. name: of the method in
    the rows, its own by default."""
    name = name or method
    vectors = {_prefix_to_label(key): tensor for key, tensor in vectors.items()}
    recorded: dict[str, list[int]] = {}
    for key in vectors:
        if found := re.fullmatch(r"greedy\.(.+)\.(\d+)", key):
            recorded.setdefault(found[1], []).append(int(found[2]))
    for label in sorted(recorded, key=lambda label: (label != "vanilla", label)):
        if why := _reason_to_leave_out(method, label, recorded):
            yield LeftOut(name, label, why)
            continue
        setting = setting_of(method, label)
        if setting is None:
            yield f"{name:14} {label:>10}: unknown label: DISAGREES"
            continue
        samples = sorted(recorded[label])
        missing = [i for i in samples if i not in inputs]
        if missing:
            raise UserError(
                f"{name}: recordings of {label} refer to input {missing[0]}, which inputs.safetensors lacks"
            )
        together: list[Agreement | None] = [None]
        if len(samples) > 1:
            together = [*_run(model, setting, [inputs[i] for i in samples], vectors, samples)]
        for i, batched in zip(samples, together):
            (alone,) = _run(model, setting, [inputs[i]], vectors, [i])
            yield RecordingRow(name, label, i, alone, batched)
    other = {found.groups() for key in vectors if (found := re.fullmatch(r"greedy_(\w+)\.(.+)\.\d+", key))}
    for mode, label in sorted(other):
        yield LeftOut(name, f"greedy_{mode}.{label}", "another decoding of the released code than ours")


def _reason_to_leave_out(method: str, label: str, recorded: Iterable[str]) -> str | None:
    for pattern, why in NOT_REPRODUCED.get(method, ()):
        if re.fullmatch(pattern, label):
            return why
    if f"nonoise.{label}" in recorded:
        return f"hangs on a random draw of the released code; see nonoise.{label}"
    return None


def setting_of(method: str, label: str) -> Setting | None:
    """What a label stands for, None if it cannot be read."""
    if label == "vanilla":
        return Setting(label, "vanilla", None)
    for pattern, spec, *more in [*SETTINGS.get(method, ()), (r"(\d+)", method)]:
        if found := re.fullmatch(pattern, label):
            budget = _budget(found, *more) if found.groups() else None
            return Setting(label, spec.format(found[0], *found.groups()), budget)
    return None


def _budget(found: re.Match, third: int | Mapping[str, float] | None = 0) -> int | float | None:
    """What group 1 of a label means; third: see `SETTINGS`."""
    if third is None:
        return None
    return third[found[1]] if isinstance(third, Mapping) else int(found[1]) + third


def _prefix_to_label(key: str) -> str:
    """`prefix.greedy.64.0` -> `greedy.prefix.64.0`; other keys as they are."""
    return re.sub(r"^(\w+)\.(greedy|logits|kept)\.", r"\2.\1.", key)


@dataclass(frozen=True)
class Sample:
    """One recorded input: pixels [3, h, w], or [patches, p] with the image's grid [1, 3] (frames, rows and
    columns of patches); places: of the image in the prompt; token ids before and after it, int64 [n].
    question, text: ids of the question in the recorded text tower, and that tower, for methods with one."""

    pixels: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    places: int
    grid: torch.Tensor | None = None
    question: list[int] | None = None
    text: TextTower | None = None


def _run(model, setting: Setting, samples: list[Sample], vectors, numbers: list[int]) -> list[Agreement]:
    """Generate for all samples in one left-padded batch and compare each with its recording."""
    import torch

    from methods import registry

    steps = len(vectors[f"greedy.{setting.label}.{numbers[0]}"])
    batch = left_padded(samples, model.config.image_token_id)
    pruner = registry.build(setting.spec, setting.budget)
    asked = None
    if pruner.reads_question and samples[0].text is not None:
        pruner.take(samples[0].text)
        asked = [sample.question for sample in samples]
    with torch.inference_mode(), pruner(model, asked) as trace, _entering(model) as prompts:
        made = model.generate(
            **batch, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    new = made.sequences[:, batch["input_ids"].shape[1] :]
    entered, positions = prompts[0]
    rows = []
    for b, (i, sample) in enumerate(zip(numbers, samples)):
        name = f"{setting.label}.{i}"
        row = _compare(vectors, name, trace.kept[b], new[b], made.logits[0][b], sample.places)
        if (theirs := vectors.get(f"features.{name}")) is not None:
            end = entered.shape[1] - len(sample.after)
            ours = entered[b, end - int(trace.visual_tokens[b, 0]) : end]
            if f"kept_slice.{name}" in vectors:  # theirs are of a slice that may end one early
                ours = ours[: len(theirs)]
            row = replace(row, features=_feature_difference(model, ours, theirs))
        if (theirs := vectors.get(f"position_ids.{name}")) is not None:
            row = replace(row, kept=row.kept and torch.equal(positions[-3:, b, -theirs.shape[1] :], theirs))
        rows.append(row)
    return rows


@contextlib.contextmanager
def _entering(model) -> Iterator[list[tuple[torch.Tensor, torch.Tensor | None]]]:
    """Collects what enters the language model, embeddings [B, W, D] and positions of each call, behind the
    hooks of a pruner that is on."""
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["inputs_embeds"], kwargs.get("position_ids"))),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        handle.remove()


def _feature_difference(model, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference of a feature; ours are behind the projector, theirs may be before it."""
    import torch

    forms = [theirs]
    projector = getattr(model.model, "multi_modal_projector", None)
    if projector is not None and model.config.vision_config.hidden_size == theirs.shape[-1]:
        with torch.inference_mode():
            forms.append(projector(theirs))
    return min(float((ours - x).abs().max()) if x.shape == ours.shape else math.inf for x in forms)


def _compare(
    vectors, name: str, kept: list[torch.Tensor], tokens: torch.Tensor, logits: torch.Tensor, places: int
) -> Agreement:
    """places: of an image's tokens in the prompt; see the module's docstring for numbers beyond.

    HoloV's Qwen release cuts a slice of the prompt that starts one token before the image, and `kept_slice`
    counts from there; where it differs from `kept`, the image's last token, behind the slice, stays as well.
    """
    import torch

    stages = sorted(
        (int(found[1]), key)
        for key in vectors
        if (found := re.fullmatch(rf"kept\.{re.escape(name)}\.layer(\d+)", key))
    )
    expected = [torch.where(vectors[key] < places, vectors[key], -vectors[key]) for _, key in stages]
    last, cut = (vectors.get(f"{key}.{name}") for key in ("kept", "kept_slice"))
    if cut is not None and not torch.equal(cut, last):
        last = torch.cat([cut, torch.tensor([places])])
    same = len(kept) == len(expected) if expected else len(kept) == (last is not None)
    same = same and all(torch.equal(ours, theirs) for ours, theirs in zip(kept, expected))
    if last is not None:
        same = same and torch.equal(kept[-1][: len(last)], last) and bool((kept[-1][len(last) :] < 0).all())
    theirs = vectors.get(f"logits.{name}")
    difference = None if theirs is None else float((logits[: len(theirs)].float() - theirs).abs().max())
    return Agreement(same, torch.equal(tokens, vectors[f"greedy.{name}"]), difference)


def left_padded(samples: list[Sample], image_token: int) -> dict[str, torch.Tensor]:
    """generate()'s arguments for a batch of samples with one image each."""
    import torch

    prompts = [torch.cat([s.before, torch.full((s.places,), image_token), s.after]) for s in samples]
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(p)).long() for p in prompts])
    batch = {"input_ids": ids, "attention_mask": mask}
    if samples[0].grid is None:
        return {**batch, "pixel_values": torch.stack([s.pixels for s in samples])}
    return {
        **batch,
        "mm_token_type_ids": (ids == image_token).int(),
        "pixel_values": torch.cat([s.pixels for s in samples]),
        "image_grid_thw": torch.cat([s.grid for s in samples]),
    }


def _sources(golden: Path, methods: Iterable[str] | None) -> list[Recording]:
    if not golden.is_dir():
        raise UserError(
            f"no recordings: {golden} is not a folder; name one with model/, inputs.safetensors and methods"
        )
    found = [
        Recording(p.parent.name, p, golden / "model", golden / "inputs.safetensors", qwen=False)
        for p in golden.glob("*/vectors.safetensors")
    ]
    found += [
        Recording(p.parent.name, p, golden / "qwen_model", golden / "qwen_inputs.safetensors", qwen=True)
        for p in golden.glob("*/qwen_vectors.safetensors")
    ]
    found += [
        Recording(p.parents[1].name, p, p.parent, p.with_name("inputs.safetensors"), qwen=True)
        for p in golden.glob("*/qwen/vectors.safetensors")
    ]
    found += [
        Recording(
            p.parents[1].name, p, p.parent / "model", golden / "inputs.safetensors", False, p.parent.name
        )
        for p in golden.glob("*/wide/vectors.safetensors")
    ]
    found.sort(key=lambda source: source.name)
    names = sorted({source.method for source in found})
    wanted = names if methods is None else list(methods)
    for name in wanted:
        if name not in names:
            raise UserError(f"no recordings of {name} in {golden}; there are: {', '.join(names) or 'none'}")
    return [source for source in found if source.method in wanted]


def _load(golden: Path):
    return _load_source(golden / "model", golden / "inputs.safetensors", qwen=False)


def _load_source(model: Path, inputs: Path, qwen: bool):
    """(model, inputs by number). Raises UserError if a file is missing or incomplete."""
    from harness.parity import drawn, recorded

    loaded = recorded.load_recorded(model, "qwen" if qwen else "llava")
    tensors = drawn.read(inputs)
    numbers = [int(key.split(".")[1]) for key in tensors if re.fullmatch(r"pixel_values\.\d+", key)]
    sample = _qwen_sample if qwen else _llava_sample
    try:
        return loaded, {i: sample(tensors, i, loaded.config) for i in numbers}
    except KeyError as error:
        raise UserError(f"{inputs} lacks {error}") from error


def with_questions(inputs: Mapping[int, Sample], folder: Path) -> dict[int, Sample]:
    """The inputs with the recorded questions and the text tower in `folder`."""
    from harness.parity import drawn, recorded

    tower = recorded.load_recorded_text(folder)
    ids = drawn.read(folder / "questions.safetensors")
    return {
        i: replace(sample, question=ids[f"clip_ids.{i}"].tolist(), text=tower) for i, sample in inputs.items()
    }


def _llava_sample(tensors: Mapping[str, torch.Tensor], i: int, config) -> Sample:
    names = (f"{name}.{i}" for name in ("pixel_values", "ids_before", "ids_after"))
    return Sample(*(tensors[name] for name in names), config.image_seq_length)


def _qwen_sample(tensors: Mapping[str, torch.Tensor], i: int, config) -> Sample:
    vision, ids = config.vision_config, tensors[f"input_ids.{i}"]
    places = (ids == config.image_token_id).nonzero()[:, 0].tolist()
    pixels = tensors[f"pixel_values.{i}"].unflatten(1, (vision.in_channels, -1, vision.patch_size**2))
    pixels = pixels.expand(-1, -1, vision.temporal_patch_size, -1).flatten(1)
    before, after = ids[: places[0]], ids[places[-1] + 1 :]
    return Sample(pixels, before, after, len(places), tensors[f"image_grid_thw.{i}"])
