"""Where a benchmark's parquet files are: a folder laid out by this program, a local mirror of the hub's
repositories, or the Hugging Face cache. Never asks the network unless it is told to download.

A mirror is what `hf download --repo-type dataset ORG/NAME --local-dir DIR/ORG/NAME` leaves, for each data
set.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from backbones import digests
from harness.tasks.benchmark import Benchmark
from methods.errors import UserError

#: lmms-eval 0.7.3 reads the first, earlier releases the second; a mirror may also hold the folders alone
ORGANISATIONS = ("lmms-lab-encoder", "lmms-lab")


@dataclass(frozen=True)
class BenchmarkFiles:
    """One benchmark's files. files: by role ("rows", and GQA's "images"). origin: what a record says of where
    they come from: repository and commit, None where not known; no path."""

    files: Mapping[str, tuple[Path, ...]]
    split: str
    origin: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for paths in self.files.values() for path in paths)

    def digest(self) -> str:
        """16 hex digits over roles and all bytes of the files."""
        return digests.of_files((role, path) for role in sorted(self.files) for path in self.files[role])


def flat(benchmark: Benchmark, root: Path, split: str) -> BenchmarkFiles:
    """A folder with one parquet file a role, as `Benchmark.files` names them. Raises UserError if one is
    missing."""
    files = {role: Path(root) / path.format(split=split) for role, path in benchmark.files.items()}
    for path in files.values():
        if not path.is_file():
            hint = ""
            if any(_mirrored(benchmark, Path(root))):
                hint = f" (it looks like a mirror of the hub: use --tasks paper:{benchmark.name})"
            raise UserError(
                f"no data for {benchmark.name}: {path} is missing{hint}; "
                "pass the right --data folder, or leave --data out to draw the shipped Pocket-8 set"
            )
    return BenchmarkFiles({role: (path,) for role, path in files.items()}, split)


def hub(
    benchmark: Benchmark,
    mirror: Path | None = None,
    download: bool = False,
) -> BenchmarkFiles:
    """The benchmark's own data, from the folder `mirror` or else from the Hugging Face cache.

    Raises UserError, with the command that gets what is missing.
    """
    from backbones.hub.find import cached, fetch

    names = [f"{organisation}/{benchmark.repository}" for organisation in ORGANISATIONS]
    if mirror is not None:
        folders = list(_mirrored(benchmark, mirror))
        if not folders:
            raise UserError(
                f"no data for {benchmark.name}: {mirror} has no folder {names[0]}; get it with: "
                f"{_command(benchmark)} --local-dir {mirror / names[0]}"
            )
        (repo, folder), commit = folders[0], None
    else:
        found = ((name, cached(name, "dataset")) for name in names)
        repo, folder = next(((n, f) for n, f in found if f is not None), (names[0], None))
        if download and (folder is None or _lacks(benchmark, folder)):
            repo, folder = names[0], fetch(names[0], "dataset", None, patterns(benchmark))
        if folder is None:
            raise UserError(
                f"no data for {benchmark.name}: {names[0]} is not in the Hugging Face cache; get it with: "
                f"{_command(benchmark)} (or add --download, or name a mirror with --data)"
            )
        commit = folder.name
    try:
        files = {role: _parquet(folder, c, benchmark.upstream_split) for role, c in benchmark.configs.items()}
    except UserError as error:
        to = f" --local-dir {folder}" if mirror is not None else ""
        raise UserError(
            f"no data for {benchmark.name}: {error}; get it with: {_command(benchmark)}{to}"
        ) from error
    return BenchmarkFiles(files, benchmark.upstream_split, {"repository": repo, "revision": commit})


def _mirrored(benchmark: Benchmark, root: Path) -> Iterable[tuple[str | None, Path]]:
    """(repository, folder) of each place below `root` where the data set may lie."""
    for organisation in ORGANISATIONS:
        name = f"{organisation}/{benchmark.repository}"
        if (root / name).is_dir():
            yield name, root / name
    if (root / benchmark.repository).is_dir():
        yield None, root / benchmark.repository


def _lacks(benchmark: Benchmark, folder: Path) -> bool:
    try:
        for config in benchmark.configs.values():
            _parquet(folder, config, benchmark.upstream_split)
    except UserError:
        return True
    return False


def patterns(benchmark: Benchmark) -> tuple[str, ...]:
    """Files of the repository that the benchmark needs (others hold training and test splits)."""
    folders = ("data" if config == "default" else config for config in benchmark.configs.values())
    return ("README.md", *(f"{folder}/{benchmark.upstream_split}-*" for folder in folders))


def _command(benchmark: Benchmark) -> str:
    from backbones.hub.find import command

    return command(f"{ORGANISATIONS[0]}/{benchmark.repository}", "dataset", None, patterns(benchmark))


def _parquet(folder: Path, config: str, split: str) -> tuple[Path, ...]:
    """The files of one configuration's split: as the README's `configs` block says, else where the hub's
    converter puts them. Raises UserError if there are none, or if shards are missing."""
    places = _declared(folder, config, split) or [
        f"{'data' if config == 'default' else config}/{split}-*.parquet",
        f"{split}-*.parquet" if config == "default" else f"data/{config}/{split}-*.parquet",
    ]
    for place in places:
        files = tuple(sorted(p for p in folder.glob(place) if p.is_file() and p.suffix == ".parquet"))
        if files:
            break
    else:
        raise UserError(f"{folder} has no {places[0]}")
    shards = [re.search(r"-(\d+)-of-(\d+)", path.name) for path in files]
    if all(shards):
        have = {int(match[1]) for match in shards}
        lacking = [i for i in range(int(shards[0][2])) if i not in have]
        if lacking:
            raise UserError(f"{folder} has {len(files)} of {shards[0][2]} files {places[0]}")
    return files


def _declared(folder: Path, config: str, split: str) -> list[str]:
    """Glob patterns that the data set's card gives for the split."""
    card = folder / "README.md"
    if not card.is_file():
        return []
    import yaml

    parts = card.read_text(encoding="utf-8").split("---")
    try:
        body = yaml.safe_load(parts[1]) if len(parts) > 2 else {}
    except yaml.YAMLError:
        return []
    found: list[str] = []
    for entry in (body or {}).get("configs") or []:
        if entry.get("config_name", "default") != config or not isinstance(entry.get("data_files"), list):
            continue
        for files in entry["data_files"]:
            if files.get("split") == split:
                path = files.get("path") or []
                found += [path] if isinstance(path, str) else path
    return found


def locate(
    suite,
    benchmark: Benchmark,
    data: Path | None,
    download: bool = False,
) -> BenchmarkFiles:
    """The benchmark's files in a suite (`harness.tasks.suites`). data: the folder that holds them; None: the
    hub's cache."""
    if suite.split is None:
        return hub(benchmark, data, download)
    return flat(benchmark, data, suite.split)
