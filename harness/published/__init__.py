"""Published numbers: the tables of the paper and the methods' own claims, as printed, each with its source.

One YAML file per table, of one of four kinds (`harness.published.schema`): `accuracy` (scores and a printed
average per row), `efficiency` (FLOPs, latency), `ablation` (averages alone) and `claims` (what the methods'
authors say elsewhere). Nothing here is computed: `harness.check` recomputes what follows from what. A row's
`average_follows` and `flops_follow` say what that computation is expected to find, so that a slip of the pen
in these files shows.

A number is as precise as it is written: 63.0 stands for 62.95 to 63.05, 1862 for 1861.5 to 1862.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from harness.published.arithmetic import half_unit
from harness.published.schema import KINDS, Ablation, Accuracy, Claims, Efficiency, ScoreRow, problem
from methods.errors import UserError

FOLDER = Path(__file__).parent


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


def _registry(paths: Sequence[Path], nothing: str) -> Registry:
    found: dict[str, dict] = {kind: {} for kind in KINDS}
    for path in paths:
        body = _parse(path)
        if not isinstance(body, dict):
            raise UserError(f"{path.name}: the file must be a mapping of keys to values")
        kind = body.get("kind")
        if kind not in KINDS:
            raise UserError(f"{path.name}: kind must be one of {', '.join(KINDS)}, not {kind!r}")
        try:
            table = KINDS[kind].model_validate(body)
        except ValidationError as error:
            raise UserError(f"{path.name}: {problem(error)}") from error
        table._path = path
        found[kind][path.stem] = table
    if not any(found.values()):
        raise UserError(f"no published tables: {nothing}")
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
        name, tokens = table.from_table.table, table.from_table.tokens
        if name not in registry.accuracy:
            raise UserError(f"{table.path.name}: from_table.table {name} is no accuracy table")
        source = registry.accuracy[name]
        row_of(source, table.method, tokens, table.path.name)
        missing = [t for t in table.tasks if t not in source.tasks]
        if missing:
            raise UserError(f"{table.path.name}: tasks {', '.join(missing)} are not in {name}")


def row_of(table: Accuracy, method: str, tokens: int, asked_by: str) -> ScoreRow:
    """The row of a method at so many tokens. UserError if there is none."""
    for row in table.rows:
        if (row.method, row.tokens) == (method, tokens):
            return row
    raise UserError(f"{asked_by}: {table.path.name} has no row of {method} at {tokens} tokens")


def row_for(table: Accuracy, spec: str, budget: float | None) -> ScoreRow | None:
    """The table's row for a method at a budget: only one at its default settings has one."""
    for row in table.rows:
        if row.method != spec:
            continue
        if spec == "vanilla" or (row.tokens is not None and row.tokens == budget):
            return row
        fraction = isinstance(budget, float) and row.pruning_rate is not None
        if fraction and abs(100 * (1 - budget) - row.pruning_rate) < half_unit(row.pruning_rate):
            return row
    return None
