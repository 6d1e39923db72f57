"""The schema of published tables: one pydantic model per kind of YAML file, and one per kind of row in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PlainValidator,
    PrivateAttr,
    Strict,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from harness.tasks.suites import BENCHMARKS


def _number(value: object) -> float:
    """A finite number as it is written: whole numbers stay whole, since they tell the precision."""
    if type(value) not in (int, float):
        raise ValueError(f"must be a number, not {value!r}")
    if not -1e9 < value < 1e9:
        raise ValueError(f"must be a finite number, not {value!r}")
    return value


def _percent(value: float) -> float:
    if not 0 <= value <= 100:
        raise ValueError(f"must lie between 0 and 100, not {value!r}")
    return value


def _positive(value: float) -> float:
    if not value > 0:
        raise ValueError(f"must be positive, not {value!r}")
    return value


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names or len(set(names)) < len(names):
        raise ValueError("must be a list of different names")
    return names


Number = Annotated[float, PlainValidator(_number)]
Percent = Annotated[Number, AfterValidator(_percent)]
Positive = Annotated[Number, AfterValidator(_positive)]
Count = Annotated[int, AfterValidator(_positive)]
Text = Annotated[str, StringConstraints(min_length=1)]
Item = TypeVar("Item")
#: YAML has lists; everything else is strict
Several = Annotated[tuple[Item, ...], Strict(False)]
Names = Annotated[Several[Text], AfterValidator(_different)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Citation(_Entry):
    """Where a table stands.

    Attributes:
        work: the paper or repository.
        place: in it, `Table 1`.
    """

    work: Text
    place: Text


def _scores(scores: Mapping[str, object]) -> Mapping[str, float]:
    """Printed scores by task. In %, they must be written with a decimal: a 63 for 63.0 would tell less."""
    for task, value in scores.items():
        # mme_perception is a part of MME, in points as well
        points = BENCHMARKS.get(task) or BENCHMARKS.get(task.partition("_")[0])
        if points and points.unit == "points":
            fits = type(value) in (int, float) and 0 <= value <= points.maximum
            wanted = f"points up to {points.maximum}"
        else:
            top = 100 if task in BENCHMARKS else 1e4
            fits = type(value) is float and 0 <= value <= top
            wanted = f"a number with a decimal, at most {top:g}"
        if not fits:
            raise ValueError(f".{task} must be {wanted}, not {value!r}")
    return scores


Scores = Annotated[dict[Text, Any], AfterValidator(_scores)]


#: where a figure comes from: the method's own paper, a measurement by others, or another work
Standing = Literal["own", "rerun", "copied"]


class OtherPrint(_Entry):
    """A cell, or the average, of a row as other works print it.

    Attributes:
        column: a task, or `average`.
        value: as they print it.
        by: which works, or how many.
        note: what is known of the difference.
    """

    column: Text
    value: Number
    by: Text
    note: Text = ""


class ScoreRow(_Entry):
    """One row of a table of scores.

    Attributes:
        method: a name of `methods.registry`, or one that is not implemented here.
        scores: by task, in % or points as printed. A list in the file, in the order of the table's `tasks`.
        average: mean of score / vanilla's, in %, as printed; None where the table prints none.
        tokens: visual tokens kept; None where the table names a pruning rate alone.
        pruning_rate: in %.
        version: of the method's code.
        adaptive: whether `tokens` is a mean over inputs.
        average_follows: whether `average` is expected to follow from the cells.
        average_over: columns that `average` does follow over, where these are not the table's; cells that
            only another work prints are in `further`.
        further: cells of the row that another work prints and this table does not, by task.
        further_source: that work.
        standing: `own`, `rerun` or `copied`; None where nothing is known.
        copied_from: the work, for a copied row.
        elsewhere: cells that other works print otherwise.
        reproduces: False if the released code is known not to give these figures, so that a run is not held
            against them; `note` says why.
    """

    method: Text
    scores: Scores
    average: Number | None
    tokens: Count | None = None
    pruning_rate: Percent | None = None
    version: Text | None = None
    adaptive: bool = False
    average_follows: bool = True
    average_over: Names | None = None
    further: Scores = {}
    further_source: Text = ""
    standing: Standing | None = None
    copied_from: Text = ""
    elsewhere: Several[OtherPrint] = ()
    reproduces: bool = True
    note: Text = ""

    @property
    def all_scores(self) -> Mapping[str, float]:
        """Of the table and of `further`."""
        return {**self.scores, **self.further}

    @model_validator(mode="after")
    def _says_enough(self) -> ScoreRow:
        if self.method != "vanilla" and self.tokens is None and self.pruning_rate is None:
            raise ValueError(".tokens or pruning_rate must say how much was pruned")
        if not self.reproduces and not self.note:
            raise ValueError(".note must say why the row does not reproduce")
        if self.further and not self.further_source:
            raise ValueError(".further_source must say which work prints the further cells")
        if bool(self.copied_from) != (self.standing == "copied"):
            raise ValueError(".copied_from must name the work, for standing copied and no other")
        if missing := [t for t in self.average_over or () if t not in self.all_scores]:
            raise ValueError(f".average_over names {missing[0]}, which is in neither scores nor further")
        if odd := [o.column for o in self.elsewhere if o.column not in (*self.scores, "average")]:
            raise ValueError(f".elsewhere names {odd[0]}, which is no column of the row")
        return self


class _Table(_Entry):
    """What all kinds of files have in common."""

    schema_version: Literal[1]
    source: Citation
    _path: Path = PrivateAttr()

    @property
    def path(self) -> Path:
        return self._path

    @property
    def name(self) -> str:
        """The file's, without its suffix."""
        return self._path.stem

    @property
    def place(self) -> str:
        return self.source.place


class Accuracy(_Table):
    """Rows of scores on one backbone.

    Attributes:
        backbone: a name of `backbones.shapes`.
        tasks: the columns.
        rows: the first is the unpruned model, which averages refer to.
        visual_tokens: of the unpruned model; None where it varies with the image.
    """

    kind: Literal["accuracy"]
    backbone: Text
    tasks: Names
    rows: Several[ScoreRow]
    visual_tokens: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _scores_by_task(cls, body: Mapping) -> Mapping:
        tasks, rows = body.get("tasks"), body.get("rows")
        if not isinstance(tasks, list) or not isinstance(rows, list):
            return body  # the fields' own checks say so
        named = []
        for i, row in enumerate(rows):
            values = row.get("scores") if isinstance(row, dict) else None
            if isinstance(values, list):
                if len(values) != len(tasks):
                    raise ValueError(f"rows[{i}].scores has {len(values)} values for {len(tasks)} tasks")
                row = {**row, "scores": dict(zip(map(str, tasks), values))}
            named.append(row)
        return {**body, "rows": named}

    @field_validator("rows")
    @classmethod
    def _are_different(cls, rows: tuple[ScoreRow, ...]) -> tuple[ScoreRow, ...]:
        if not rows:
            raise ValueError("must not be empty")
        seen = set()
        for i, row in enumerate(rows):
            if (row.method == "vanilla") != (i == 0):
                raise ValueError(f"[{i}].method must be vanilla in the first row, and nowhere else")
            key = row.method, row.tokens, row.pruning_rate, row.version
            if key in seen:
                raise ValueError(f"[{i}].method {row.method} stands twice in one block")
            seen.add(key)
            if odd := [t for t in row.average_over or () if t not in rows[0].all_scores]:
                raise ValueError(f"[{i}].average_over names {odd[0]}, which the first row lacks")
        return rows

    @property
    def vanilla(self) -> ScoreRow:
        return self.rows[0]


class CostRow(_Entry):
    """One row of a table of costs.

    Attributes:
        tokens: visual tokens kept.
        tflops: 1e12 FLOPs of one prefill, as printed.
        latency_ms: of one prefill.
        accuracy: the table's, in % of vanilla.
        plan: the method as the row labels it, a spec for `methods.registry.build`, at `tokens`.
        flops_follow: whether our count of `plan` is expected to give `tflops`.
        reading: a spec that does give it.
        speed_up: as printed; None if our copy has lost it.
    """

    method: Text
    tokens: Count
    tflops: Positive
    latency_ms: Positive
    accuracy: Percent
    plan: Text
    flops_follow: bool
    reading: Text | None = None
    speed_up: Positive | None = None
    note: Text = ""


class PrintedCost(_Entry):
    """A row of costs that another work prints beside the table's.

    Attributes:
        tokens, tflops, latency_ms, plan: as in `CostRow`.
        source: the work.
    """

    method: Text
    tokens: Count
    tflops: Positive
    latency_ms: Positive
    plan: Text
    source: Text
    note: Text = ""


class Efficiency(_Table):
    """Prefill cost on one backbone and device.

    Attributes:
        measures: what its milliseconds are of.
        protocol: how they were measured, and where that stands.
        convention: by which its FLOPs were counted, a name of `harness.costs.conventions`.
        beside: rows of another work under the same protocol.
        accuracy_source: the table of scores that `CostRow.accuracy` repeats.
        rows: the first is the unpruned model.
    """

    kind: Literal["efficiency"]
    backbone: Text
    device: Text
    accuracy_source: Text
    measures: Text = ""
    protocol: Text = ""
    convention: Text | None = None
    rows: Several[CostRow]
    beside: Several[PrintedCost] = ()

    @field_validator("rows")
    @classmethod
    def _begin_with_vanilla(cls, rows: tuple[CostRow, ...]) -> tuple[CostRow, ...]:
        if not rows or rows[0].method != "vanilla":
            raise ValueError("must begin with vanilla")
        return rows


class AblatedVariant(_Entry):
    """An ablated variant's average.

    Attributes:
        block: what is varied.
        average: in %.
        default: whether it is the method as in the other tables.
        average_follows: whether the average is expected to follow from `Ablation.from_table`.
    """

    block: Text
    variant: Text
    average: Percent
    default: bool = False
    average_follows: bool = True


class TableAtBudget(_Entry):
    """A table of scores, and the visual tokens of the rows that are meant."""

    table: Text
    tokens: Count


class Ablation(_Table):
    """Averages over `tasks` of variants of one method.

    Attributes:
        from_table: whose cells the default rows repeat.
    """

    kind: Literal["ablation"]
    backbone: Text
    method: Text
    tasks: Names
    from_table: TableAtBudget
    rows: Several[AblatedVariant]


class AuthorClaim(_Entry):
    """One statement about a method.

    Attributes:
        scores: by task, in % or points as printed.
        standing: `own` printed by the authors, `copied` from them by others, `rerun` measured by others with
            the authors' code.
        checked: by what the figures were confirmed, a second source or a recomputed average; "": by nothing.
        source: the work and the place in it.
        tokens: visual tokens kept; None where none is named.
        version: of the method's code.
        setting: what else was set.
        average: in %, over the authors' own benchmarks.
    """

    method: Text
    backbone: Text
    scores: Scores
    standing: Standing
    source: Text
    checked: Text = ""
    tokens: Count | None = None
    version: Text | None = None
    setting: Text = ""
    average: Percent | None = None


class TheoreticalCost(_Entry):
    """A prefill cost that others print.

    Attributes:
        plan: the method's spec.
        tokens: visual tokens kept; None for a plan without a budget.
        tera: 1e12 FLOPs or MAC, as the convention has it.
        convention: by which it follows, a name of `harness.costs.conventions`.
    """

    plan: Text
    backbone: Text
    tera: Positive
    convention: Text
    source: Text
    tokens: Count | None = None


class Claims(_Table):
    """What the methods' authors and others say elsewhere."""

    kind: Literal["claims"]
    rows: Several[AuthorClaim]
    theoretical: Several[TheoreticalCost] = ()


KINDS: dict[str, type[_Table]] = {
    "accuracy": Accuracy, "efficiency": Efficiency, "ablation": Ablation, "claims": Claims,
}  # fmt: skip

_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is no key of this kind of table",
    "string_type": "must be a text, not {input}",
    "string_too_short": "must be a text, not {input}",
    "int_type": "must be a whole number, not {input}",
    "bool_type": "must be true or false, not {input}",
    "literal_error": "must be one of {expected}, not {input}",
    "list_type": "must be a list, not {input}",
    "tuple_type": "must be a list, not {input}",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
}


def problem(error: ValidationError) -> str:
    """The first thing that does not fit, in one line: where it is and what it must be."""
    first = error.errors()[0]
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]).lstrip(".")
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    else:
        expected = str(first.get("ctx", {}).get("expected", "")).replace("'", "").replace(" or ", ", ")
        words = _WORDS.get(first["type"], first["msg"])
        if first["type"] == "literal_error" and "," not in expected:
            words = words.replace("one of ", "")
        message = words.format(input=short(first["input"]), expected=expected)
    text = f"{where}{message}" if message[:1] in ".[" else f"{where} {message}"
    return text.strip().lstrip(".")
