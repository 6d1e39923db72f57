"""The code that an answer, a score or a measurement depends on, as one digest per source file.

A digest is of the file's syntax tree without comments, docstrings and layout, so that tidying up re-uses what
was measured. Which files count follows from the import statements, those inside of functions included: they
are read, not run. What decides a thing that stands in the key itself does not count (`_IN_THE_KEY`).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

#: source file by its path from the package's parent -> digest of its syntax tree (or a package's version)
Code = Mapping[str, str]

#: modules whose outcome is part of a cell's key: rows, data, weights, prompts
_IN_THE_KEY = (
    "backbones.digests", "backbones.families.tiny", "backbones.hub.find", "backbones.hub.known",
    "backbones.hub.options",
    "harness.tasks.environment", "harness.tasks.schemas", "harness.tasks.sampling", "harness.tasks.sources",
    "harness.tasks.suites", "harness.tasks.synthetic_mirror",
)  # fmt: skip
#: a change of these is a change of prompts, which journals are keyed by, or of scores
_SCORING = (
    "harness.tasks.benchmark", "harness.tasks.benchmarks", "harness.tasks.bootstrap", "harness.tasks.scoring",
)  # fmt: skip
#: where an answer is made: from documents to model inputs, through the model and the method's hooks, to text
_ANSWERING = (
    "backbones.backbone", "backbones.engine.hooks", "backbones.hub.load", "harness.run.sweep",
    "harness.tasks.answering", "harness.tasks.lmms", "harness.tasks.pruned_model",
)  # fmt: skip
_MEASURING = ("harness.costs.latency", "harness.costs.macs", "harness.run.measure_costs")


def method_code(cls: type) -> Code:
    """Of a method's class: what it and its bases import within `methods`, and, for a method of another
    package, within that package.

    Beside such a package (or a single file) also count top-level modules that no other installed
    distribution owns, such as a helper in the same folder; those of other distributions count by version.
    """
    names = [base.__module__ for base in cls.__mro__ if base is not object]
    own = {_top(name) for name in names} - {"methods"}
    if own <= sys.stdlib_module_names:
        return _closure(names, ("methods",))[0]
    owners = metadata.packages_distributions()
    mine = {owner for top in own for owner in owners.get(top, ())}
    versions: dict[str, str] = {}

    def follow(name: str) -> bool:
        top = _top(name)
        if top in sys.stdlib_module_names or top in ("methods", "backbones", "harness"):
            return False
        foreign = [owner for owner in owners.get(top, ()) if owner not in mine]
        if foreign and top not in own:
            versions.update({owner: metadata.version(owner) for owner in foreign})
            return False
        return True

    files, outside = _closure([name for name in names if _top(name) != "methods"], follow)
    shared, _ = _closure([*names, *outside], ("methods",))
    of_ours, _ = _closure([name for name in outside if _top(name) in ("backbones", "harness")], _ours)
    return {**shared, **of_ours, **files, **versions}


def answer_code(family: str) -> Code:
    """Of everything but the method that turns a document into an answer by a model of the family."""
    from backbones import families

    own = type(families.of_type(family)).__module__
    others = {type(other).__module__ for other in families.known().values()} - {own}
    within = ("backbones", "methods", "harness.tasks", "harness.run.sweep", _top(own))
    files, _ = _closure(_ANSWERING, within, (*others, *_IN_THE_KEY, *_SCORING))
    own_files, _ = _closure([own], within, _IN_THE_KEY, skip="backbones.families")
    return files | own_files


def scoring_code(benchmark) -> Code:
    """Of what turns a benchmark's answers into its record's numbers (harness.tasks.benchmark.Benchmark)."""
    homes = [
        name
        for name, module in list(sys.modules.items())
        if name.startswith("harness.tasks.benchmarks.") and benchmark in getattr(module, "BENCHMARKS", ())
    ]
    within = ("harness.tasks", "harness.run.score_cell")
    stop = (*_IN_THE_KEY, "harness.tasks.answering", "harness.tasks.lmms", "harness.tasks.pruned_model")
    homes = homes or [benchmark.scoring.per_sample.__module__]
    return _closure(["harness.run.score_cell", *homes], within, stop)[0]


def cost_code(family: str) -> Code:
    """Of everything but the method that a measurement of FLOPs and latency depends on."""
    measuring, _ = _closure(_MEASURING, ("harness.costs", "harness.run.measure_costs", "harness.run.probes"))
    return {**answer_code(family), **measuring}


def changed(old: object, new: object) -> tuple[list[str], list[str]]:
    """(source files, other parts by their dotted names) that two identities of a cell differ in."""
    files, others = [], []
    for path in _differences(old, new):
        if path and "code" in path[:-1]:
            files.append(path[-1])
        else:
            others.append(".".join(path))
    return list(dict.fromkeys(files)), others


def _differences(old: object, new: object) -> list[tuple[str, ...]]:
    if old == new:
        return []
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return [()]
    return [(key, *rest) for key in sorted({*old, *new}) for rest in _differences(old.get(key), new.get(key))]


def _ours(name: str) -> bool:
    return _top(name) in ("backbones", "harness", "methods")


def _top(name: str) -> str:
    return name.partition(".")[0]


def _below(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def _closure(
    roots: Iterable[str],
    within: Sequence[str] | Callable[[str], bool],
    stop: Sequence[str] = (),
    skip: str | None = None,
) -> tuple[dict[str, str], set[str]]:
    """Files of the modules `roots` and of all that they import `within`, and the imported modules outside.

    stop: modules and packages that do not count. skip: one module, without what is below it.
    """
    follow = within if callable(within) else functools.partial(_below, places=within)
    queue, seen, outside = list(roots), set(), set()
    files: dict[str, str] = {}
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        if not follow(name):
            outside.add(name)
            continue
        path = _find(name)
        if path is None or name == skip or _below(name, stop):
            continue
        package = path.stem == "__init__"
        place = name.replace(".", "/") + ("/__init__" if package else "")
        digest, imports = _read(path, name if package else name.rpartition(".")[0])
        files[place + path.suffix] = digest
        queue += [".".join(parts[:i]) for parts in imports for i in range(1, len(parts) + 1)]
    return dict(sorted(files.items())), outside


def _find(name: str) -> Path | None:
    """The module's file; None if there is none (a namespace package, a name that is no module)."""
    top, *rest = name.split(".")
    loaded = sys.modules.get(top)
    if loaded is None:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        origin, folders = spec.origin, list(spec.submodule_search_locations or ())
    else:
        origin, folders = getattr(loaded, "__file__", None), list(getattr(loaded, "__path__", ()))
    if not rest:
        return Path(origin) if origin and Path(origin).is_file() else None
    for folder in folders:
        place = Path(folder, *rest)
        for candidate in (place / "__init__.py", place.with_name(place.name + ".py")):
            if candidate.is_file():
                return candidate
        for compiled in sorted(place.parent.glob(f"{place.name}.*.so")):
            return compiled
    return None


def _read(path: Path, package: str) -> tuple[str, frozenset[tuple[str, ...]]]:
    """Digest and imports of a file; of one that cannot be parsed the digest of its bytes."""
    return _parsed(path.read_bytes(), package)


@functools.lru_cache(maxsize=None)  # noqa: UP033  by content: an edited file is read anew
def _parsed(source: bytes, package: str) -> tuple[str, frozenset[tuple[str, ...]]]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return hashlib.sha256(source).hexdigest()[:16], frozenset()
    total = hashlib.sha256()
    for part in _written(tree):
        total.update(part.encode())
    return total.hexdigest()[:16], frozenset(_imports(tree, package))


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _written(node: object) -> Iterable[str]:
    """The tree without docstrings and what is empty (Python's own `ast.dump` differs between versions)."""
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for field, value in ast.iter_fields(node):
            if (
                field == "body"
                and isinstance(node, _DOCUMENTED)
                and ast.get_docstring(node, False) is not None
            ):
                value = value[1:]
            if value is not None and value != []:
                yield f" {field}="
                yield from _written(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from _written(item)
            yield ","
        yield "]"
    else:
        yield f"{type(node).__name__}:{node!r}"


def _imports(node: ast.AST, package: str) -> Iterable[tuple[str, ...]]:
    """Dotted names that may be modules: `from a import b` gives a and a.b."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = _from(package, child.level, child.module or "")
            yield base
            yield from ((*base, alias.name) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _imports(other, package)
        else:
            if isinstance(child, ast.Call):
                yield from _by_name(child, package)
            yield from _imports(child, package)


def _by_name(call: ast.Call, package: str) -> Iterable[tuple[str, ...]]:
    """`importlib.import_module("a.b")`, where the name is written out."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    first = call.args[0] if call.args else None
    if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
        name = str(first.value)
        yield _from(package, len(name) - len(name.lstrip(".")), name.lstrip("."))


def _from(package: str, level: int, module: str) -> tuple[str, ...]:
    """Absolute name of `module`, given with so many dots in front, in a module of `package`."""
    above = package.split(".")
    return (*(above[: len(above) + 1 - level] if level else ()), *filter(None, module.split(".")))
