"""Published numbers: the tables of the paper and the methods' own claims, as printed, each with its source.

One YAML file a table, of one of four kinds: `accuracy` (scores and a printed average a row), `efficiency`
(FLOPs, latency), `ablation` (averages alone) and `claims` (what the methods' authors say elsewhere). Nothing
here is computed: `harness.check` recomputes what follows from what. A row's `average_follows` and
`flops_follow` say what that computation is expected to find, so that a slip of the pen in these files shows.

A number is as precise as it is written: 63.0 stands for 62.95 to 63.05, 1862 for 1861.5 to 1862.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.tasks.suites import BENCHMARKS
from methods.errors import UserError

FOLDER = Path(__file__).parent
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One row of a table. scores: by task, in % or points as printed. tokens: visual tokens kept, None where
    the table names a pruning_rate (%) alone. average: mean of score / vanilla's, in %, as printed.

    average_follows: whether `average` is expected to follow from the cells. reproduces: False if the released
    code is known not to give these figures (`note` says why), so that a run is not held against them.
    """

    method: str
    scores: Mapping[str, float]
    average: float | None
    tokens: int | None = None
    pruning_rate: float | None = None
    version: str | None = None
    adaptive: bool = False
    average_follows: bool = True
    reproduces: bool = True
    note: str = ""


@dataclass(frozen=True)
class Accuracy:
    """Rows of scores on one backbone; the first row is the unpruned model, which averages refer to."""

    name: str
    path: Path
    place: str
    backbone: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    visual_tokens: int | None = None

    @property
    def vanilla(self) -> Row:
        return self.rows[0]


@dataclass(frozen=True)
class CostRow:
    """tflops: 1e12 FLOPs of one prefill, as printed. plan: the method as the row labels it, a spec for
    `methods.registry.build`, at `tokens`; flops_follow: whether our count of it is expected to give `tflops`.
    reading: a spec that does give it. speed_up: printed, None if our copy has lost it. accuracy: the table's,
    in % of vanilla."""

    method: str
    tokens: int
    tflops: float
    latency_ms: float
    accuracy: float
    plan: str
    flops_follow: bool
    reading: str | None = None
    speed_up: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Efficiency:
    """Prefill cost on one backbone and device; the first row is the unpruned model."""

    name: str
    path: Path
    place: str
    backbone: str
    device: str
    accuracy_source: str
    rows: tuple[CostRow, ...]


@dataclass(frozen=True)
class Variant:
    """An ablated variant's average (%). default: it is the method as in the other tables; average_follows:
    whether the average is expected to follow from the table named in `Ablation.from_table`."""

    block: str
    variant: str
    average: float
    default: bool = False
    average_follows: bool = True


@dataclass(frozen=True)
class Ablation:
    """Averages over `tasks`; from_table: (table, visual tokens) whose cells the default rows repeat."""

    name: str
    path: Path
    place: str
    backbone: str
    method: str
    tasks: tuple[str, ...]
    from_table: tuple[str, int]
    rows: tuple[Variant, ...]


@dataclass(frozen=True)
class Claim:
    """One statement about a method. standing: `authors` printed by them, `quoted` from them by others,
    `rerun` measured by others with the authors' code."""

    method: str
    backbone: str
    scores: Mapping[str, float]
    standing: str
    source: str
    tokens: int | None = None
    version: str | None = None
    setting: str = ""
    average: float | None = None


@dataclass(frozen=True)
class Theoretical:
    """tera_macs: 1e12 MAC of the LLM's layers on visual tokens alone, without head, for `plan`."""

    plan: str
    backbone: str
    tera_macs: float
    source: str


@dataclass(frozen=True)
class Claims:
    name: str
    path: Path
    rows: tuple[Claim, ...]
    theoretical: tuple[Theoretical, ...] = ()


@dataclass(frozen=True)
class Registry:
    """All published numbers, tables by file name."""

    accuracy: Mapping[str, Accuracy]
    efficiency: Mapping[str, Efficiency]
    ablation: Mapping[str, Ablation]
    claims: Mapping[str, Claims] = field(default_factory=dict)

    def path_of(self, name: str) -> Path | None:
        """The file of a table."""
        kinds = (self.accuracy, self.efficiency, self.ablation, self.claims)
        return next((tables[name].path for tables in kinds if name in tables), None)


def half_unit(value: float) -> float:
    """Half of the last printed digit: 63.0 -> 0.05, 1862 -> 0.5."""
    return 0.5 * 10.0 ** -len(repr(value).partition(".")[2])


def load(folder: Path = FOLDER) -> Registry:
    """Read and check every table below `folder`.

    Raises UserError, one line that names the file and the key, for anything that does not fit the schema.
    """
    return _registry(sorted(folder.glob("*.yaml")), f"there is no *.yaml in {folder}")


def load_with(own: Path, folder: Path = FOLDER) -> Registry:
    """The tables of `folder`, and that of the user's file `own`, which replaces one of its name.

    Raises UserError as `load` does.
    """
    if not own.is_file():
        raise UserError(f"--published {own}: there is no such file")
    shipped = [path for path in sorted(folder.glob("*.yaml")) if path.stem != own.stem]
    return _registry([*shipped, own], "")


def _registry(paths: Sequence[Path], problem: str) -> Registry:
    found: dict[str, dict] = {kind: {} for kind in _KINDS}
    for path in paths:
        body = _Entry(_parse(path), path.name, "")
        kind = body.take("kind", str, among=_KINDS)
        if body.take("schema_version", int) != SCHEMA_VERSION:
            body.refuse("schema_version", f"must be {SCHEMA_VERSION}")
        source = body.entry("source")
        place = source.take("place", str)
        source.take("work", str)
        source.close()
        found[kind][path.stem] = _KINDS[kind](body, path, place)
        body.close()
    if not any(found.values()):
        raise UserError(f"no published tables: {problem}")
    registry = Registry(**found)
    _check_references(registry)
    return registry


def _parse(path: Path) -> object:
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where PyYAML was built with it
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} is no YAML: {' '.join(str(error).split())}") from error


class _Entry:
    """A mapping of the file whose keys are taken one by one; what is left at the end is an error."""

    def __init__(self, body: object, file: str, where: str):
        self.file, self.where = file, where
        if not isinstance(body, dict):
            raise UserError(f"{file}: {where or 'the file'} must be a mapping of keys to values")
        self._left = dict(body)

    def refuse(self, key: str, problem: str) -> None:
        raise UserError(f"{self.file}: {self.where}{key} {problem}")

    def take(self, key: str, kind: type, default: object = ..., among: Sequence | Mapping | None = None):
        """The value of `key`. float takes integers too and keeps them, since they tell the precision."""
        if key not in self._left:
            if default is ...:
                self.refuse(key, "is missing")
            return default
        value = self._left.pop(key)
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool) or value == "":
            self.refuse(key, f"must be {_NAMES[kind]}, not {value!r}")
        if kind is float and not -1e9 < value < 1e9:
            self.refuse(key, f"must be a finite number, not {value!r}")
        if among is not None and value not in among:
            self.refuse(key, f"must be one of {', '.join(among)}, not {value!r}")
        return value

    def entry(self, key: str) -> _Entry:
        return _Entry(self.take(key, dict), self.file, f"{self.where}{key}.")

    def entries(self, key: str, default: object = ...) -> list[_Entry]:
        values = self.take(key, list, default)
        return [_Entry(v, self.file, f"{self.where}{key}[{i}].") for i, v in enumerate(values)]

    def names(self, key: str) -> tuple[str, ...]:
        names = self.take(key, list)
        if not names or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
            self.refuse(key, "must be a list of different names")
        return tuple(names)

    def percent(self, key: str, default: object = ...) -> float | None:
        value = self.take(key, float, default)
        if value is not None and value is not ... and not 0 <= value <= 100:
            self.refuse(key, f"must lie between 0 and 100, not {value!r}")
        return value

    def positive(self, key: str, kind: type = float, default: object = ...):
        value = self.take(key, kind, default)
        if value is not None and not value > 0:
            self.refuse(key, f"must be positive, not {value!r}")
        return value

    def score(self, task: str, value: object) -> float:
        """A printed score. In %, it must be written with a decimal: a 63 for 63.0 would tell less."""
        benchmark = BENCHMARKS.get(task)
        part = BENCHMARKS.get(task.partition("_")[0])  # mme_perception is a part of MME, in points as well
        points = benchmark or part
        if points and points.unit == "points":
            fits = type(value) in (int, float) and 0 <= value <= points.maximum
            wanted = f"points up to {points.maximum}"
        else:
            top = 100 if task in BENCHMARKS else 1e4
            fits = type(value) is float and 0 <= value <= top
            wanted = f"a number with a decimal, at most {top:g}"
        if not fits:
            self.refuse(f"scores.{task}", f"must be {wanted}, not {value!r}")
        return value

    def close(self) -> None:
        if self._left:
            self.refuse(next(iter(self._left)), "is no key of this kind of table")


_NAMES = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
    dict: "a mapping",
}  # fmt: skip


def _accuracy(body: _Entry, path: Path, place: str) -> Accuracy:
    tasks = body.names("tasks")
    rows = []
    for r in body.entries("rows"):
        values = r.take("scores", list)
        if len(values) != len(tasks):
            r.refuse("scores", f"has {len(values)} values for {len(tasks)} tasks")
        row = Row(
            method=r.take("method", str),
            scores={t: r.score(t, v) for t, v in zip(tasks, values)},
            average=r.take("average", float),
            tokens=r.positive("tokens", int, None),
            pruning_rate=r.percent("pruning_rate", None),
            version=r.take("version", str, None),
            adaptive=r.take("adaptive", bool, False),
            average_follows=r.take("average_follows", bool, True),
            reproduces=r.take("reproduces", bool, True),
            note=r.take("note", str, ""),
        )
        if (row.method == "vanilla") != (not rows):
            r.refuse("method", "must be vanilla in the first row, and nowhere else")
        same = [(o.method, o.tokens, o.pruning_rate, o.version) for o in rows]
        if (row.method, row.tokens, row.pruning_rate, row.version) in same:
            r.refuse("method", f"{row.method} stands twice in one block")
        if rows and row.tokens is None and row.pruning_rate is None:
            r.refuse("tokens", "or pruning_rate must say how much was pruned")
        if not row.reproduces and not row.note:
            r.refuse("note", "must say why the row does not reproduce")
        rows.append(row)
        r.close()
    if not rows:
        body.refuse("rows", "must not be empty")
    tokens = body.positive("visual_tokens", int, None)
    return Accuracy(path.stem, path, place, body.take("backbone", str), tasks, tuple(rows), tokens)


def _efficiency(body: _Entry, path: Path, place: str) -> Efficiency:
    rows = []
    for r in body.entries("rows"):
        rows.append(
            CostRow(
                method=r.take("method", str),
                tokens=r.positive("tokens", int),
                tflops=r.positive("tflops"),
                latency_ms=r.positive("latency_ms"),
                accuracy=r.percent("accuracy"),
                plan=r.take("plan", str),
                flops_follow=r.take("flops_follow", bool),
                reading=r.take("reading", str, None),
                speed_up=r.positive("speed_up", float, None),
                note=r.take("note", str, ""),
            )
        )
        r.close()
    if not rows or rows[0].method != "vanilla":
        body.refuse("rows", "must begin with vanilla")
    return Efficiency(
        path.stem, path, place, body.take("backbone", str), body.take("device", str),
        body.take("accuracy_source", str), tuple(rows),
    )  # fmt: skip


def _ablation(body: _Entry, path: Path, place: str) -> Ablation:
    origin = body.entry("from_table")
    source = origin.take("table", str), origin.positive("tokens", int)
    origin.close()
    rows = []
    for r in body.entries("rows"):
        rows.append(
            Variant(
                r.take("block", str), r.take("variant", str), r.percent("average"),
                r.take("default", bool, False), r.take("average_follows", bool, True),
            )
        )  # fmt: skip
        r.close()
    return Ablation(
        path.stem, path, place, body.take("backbone", str), body.take("method", str), body.names("tasks"),
        source, tuple(rows),
    )  # fmt: skip


def _claims(body: _Entry, path: Path, place: str) -> Claims:
    rows, theoretical = [], []
    for r in body.entries("rows"):
        scores = r.take("scores", dict)
        rows.append(
            Claim(
                method=r.take("method", str),
                backbone=r.take("backbone", str),
                scores={str(t): r.score(str(t), v) for t, v in scores.items()},
                standing=r.take("standing", str, among=("authors", "quoted", "rerun")),
                source=r.take("source", str),
                tokens=r.positive("tokens", int, None),
                version=r.take("version", str, None),
                setting=r.take("setting", str, ""),
                average=r.percent("average", None),
            )
        )
        r.close()
    for r in body.entries("theoretical", []):
        theoretical.append(
            Theoretical(
                r.take("plan", str), r.take("backbone", str), r.positive("tera_macs"), r.take("source", str)
            )
        )
        r.close()
    return Claims(path.stem, path, tuple(rows), tuple(theoretical))


_KINDS = {"accuracy": _accuracy, "efficiency": _efficiency, "ablation": _ablation, "claims": _claims}


def _check_references(registry: Registry) -> None:
    """UserError if a table refers to one that is not there, or to a row that it lacks."""
    for table in registry.efficiency.values():
        if table.accuracy_source not in registry.accuracy:
            raise UserError(
                f"{table.path.name}: accuracy_source {table.accuracy_source} is no accuracy table"
            )
        for row in table.rows:
            row_of(registry.accuracy[table.accuracy_source], row.method, row.tokens, table.path.name)
    for table in registry.ablation.values():
        name, tokens = table.from_table
        if name not in registry.accuracy:
            raise UserError(f"{table.path.name}: from_table.table {name} is no accuracy table")
        source = registry.accuracy[name]
        row_of(source, table.method, tokens, table.path.name)
        missing = [t for t in table.tasks if t not in source.tasks]
        if missing:
            raise UserError(f"{table.path.name}: tasks {', '.join(missing)} are not in {name}")


def row_of(table: Accuracy, method: str, tokens: int, asked_by: str) -> Row:
    """The row of a method at so many tokens. UserError if there is none."""
    for row in table.rows:
        if (row.method, row.tokens) == (method, tokens):
            return row
    raise UserError(f"{asked_by}: {table.path.name} has no row of {method} at {tokens} tokens")
