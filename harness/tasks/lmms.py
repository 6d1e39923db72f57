"""Build lmms-eval task objects that read local parquet files (the only module that imports
`lmms_eval.tasks`).

Prompts, `process_results` and aggregation stay upstream's; we override where the rows come from, the lookup
of images that stand in a table of their own (upstream maps a decoded image into every question of GQA with 8
processes), and what a benchmark's `adapt` repairs.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from backbones import images
from harness.tasks.benchmark import IMAGE, Benchmark
from harness.tasks.environment import import_lmms_eval, silenced
from harness.tasks.evidence import hints_of
from harness.tasks.sampling import take
from harness.tasks.schemas import column_problems, row_problem
from harness.tasks.sources import BenchmarkFiles
from methods.errors import UserError
from methods.views import Hint

#: bytes of parquet files that are read into memory; more are mapped from a copy in the datasets cache
IN_MEMORY = 256 << 20
#: images that wait for being decoded when those of a slice are checked
DECODED_AHEAD = 64


@dataclass(frozen=True)
class Unaskable:
    """A question that cannot be asked.

    task: the benchmark's name. row: its number in the file. image: the image's name there. why: the reason.
    """

    task: str
    row: int
    image: str
    why: str

    def __str__(self) -> str:
        return f"{self.task} row {self.row}, image {self.image}: {self.why}"


class Documents:
    """The rows of one benchmark: a slice, the images' identities, and a digest of the files. Questions on
    images that cannot be decoded, and rows that lack a part, are left out, see `unaskable`. Raises UserError
    if a file is unreadable or lacks what the task reads, or no question can be asked.
    """

    def __init__(self, benchmark: Benchmark, source: BenchmarkFiles, limit: int | None = None):
        self.benchmark, self.source = benchmark, source
        whole = read(source.files["rows"])
        for role in source.files:
            _check(benchmark, role, source.files[role])
        light = self._light(whole)
        if benchmark.group_by is None:
            keys = list(range(len(light)))  # without reading every row
        else:
            keys = [_or_none(benchmark.group_by, row) for row in light]
        strata = light[benchmark.stratum] if benchmark.stratum else [0] * len(keys)
        self.total = len(keys)
        #: row number in the file of each document: answers are journalled under it, whatever the slice
        parts = [_or_none(benchmark.part, row) for row in light] if benchmark.part else None
        self.numbers = take(keys, strata, limit, benchmark.name, parts)
        self.groups = [keys[n] for n in self.numbers]
        self.rows = whole.select(self.numbers)
        if benchmark.group_size:
            _check_groups(benchmark, source, self.groups)
        #: questions of the slice that cannot be asked; the others are
        self.unaskable: list[Unaskable] = []
        #: one identity a document, equal for equal images (GQA: its imageId; else a digest of the bytes)
        self.image_ids: list[str] = []
        self._check_images()

    def __len__(self) -> int:
        return len(self.numbers)

    def _check_images(self) -> None:
        """Decode every distinct image of the slice, and leave out the questions on those that are none.

        A few images are in memory at a time, whatever the size of the files.
        """
        found: dict[str, Future] = {}
        ahead: deque[Future] = deque()
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside of Python's lock
            for key, stored in zip(self._identities(), self._stored()):
                if key not in found:
                    found[key] = pool.submit(images.problem, (stored or {}).get("bytes"))
                    ahead.append(found[key])
                if len(ahead) > DECODED_AHEAD:
                    ahead.popleft().result()
                self.image_ids.append(key)
        verdicts = [found[key].result() for key in self.image_ids]
        #: upright (width, height) of each document's image
        self._sizes = [size for _, size in verdicts]
        of_rows = [row_problem(self.benchmark, "rows", row) for row in self._light(self.rows)]
        self._leave_out([why or other for (why, _), other in zip(verdicts, of_rows)])

    @staticmethod
    def _light(rows):
        """The rows of a table without their images."""
        return rows.remove_columns([c for c in rows.column_names if c == "image"])

    def _identities(self) -> Iterator[str]:
        if "images" in self.source.files:
            yield from map(str, self.rows["imageId"])
        else:
            for stored in self._stored():
                yield hashlib.sha256((stored or {}).get("bytes") or b"").hexdigest()[:16]

    def leave_out_refused(self, refuses: Callable[[int, int], str]) -> None:
        """Leave out the questions on images of which `refuses` says, given their width and height, why they
        cannot be asked (see `backbones.backbone.Backbone.refuses`)."""
        known = {size: refuses(*size) for size in dict.fromkeys(self._sizes)}
        self._leave_out([known[size] for size in self._sizes])

    def leave_out(self, reasons: Mapping[int, str]) -> None:
        """Leave out the questions of these rows (by number in the file, with the reason), and those that are
        scored together with them."""
        self._leave_out([reasons.get(number, "") for number in self.numbers])

    def _leave_out(self, reasons: Sequence[str]) -> None:
        """Documents with a reason go, and those that are scored together with them. Raises UserError if none
        is left."""
        if not any(reasons):
            return
        names, because = self.image_names, {}
        for group, number, name, why in zip(self.groups, self.numbers, names, reasons):
            if why:
                because.setdefault(group, Unaskable(self.benchmark.name, number, name, why))
        for group, number, name, why in zip(self.groups, self.numbers, names, reasons):
            if group in because:
                first = because[group]
                why = why or f"it is scored together with row {first.row}, which cannot be asked"
                self.unaskable.append(Unaskable(self.benchmark.name, number, name, why))
        stay = [i for i, group in enumerate(self.groups) if group not in because]
        if not stay:
            raise UserError(
                f"{self.benchmark.name}: no question can be asked; {self.unaskable[0]} "
                f"({_named(self.source.files['rows'])})"
            )
        self.numbers, self.groups, self._sizes, self.image_ids = (
            [own[i] for i in stay] for own in (self.numbers, self.groups, self._sizes, self.image_ids)
        )
        self.rows = self.rows.select(stay)

    @property
    def decoded(self):
        """`rows` with images as the models see them (`backbones.images.upright`)."""
        if "image" not in self.rows.column_names:
            return self.rows
        import datasets

        def decode(batch: dict) -> dict:
            if "image" in batch:
                batch["image"] = [images.upright(stored["bytes"]) for stored in batch["image"]]
            return batch

        return self.rows.cast_column("image", datasets.Image(decode=False)).with_transform(decode)

    @property
    def hints(self) -> list[Hint]:
        """The answer key of each document; [] for data without evidence."""
        return hints_of(self.rows)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each document's image."""
        return list(self._sizes)

    @functools.cached_property
    def digest(self) -> str:
        """Of the files, see `BenchmarkFiles.digest`."""
        return self.source.digest()

    @property
    def questions(self) -> dict[int, dict]:
        """By row number: "document", the columns that the task reads but the image; "image", its identity;
        "group", the key of the documents that are scored together."""
        kinds = self.benchmark.columns["rows"]
        names = [c for c in self.rows.column_names if kinds.get(c, IMAGE) != IMAGE]
        rows = self.rows.select_columns(names)
        return {
            number: {"document": dict(row), "image": image, "group": group}
            for number, row, image, group in zip(self.numbers, rows, self.image_ids, self.groups)
        }

    @property
    def image_names(self) -> list[str]:
        """The name each document's image has in the file (GQA: its imageId)."""
        if "images" in self.source.files:
            return self.image_ids
        return [str((stored or {}).get("path")) for stored in self._stored()]

    def _stored(self) -> Iterator[dict]:
        """The images as they are stored, one after the other: {"bytes", "path"}; bytes None where there is
        none."""
        import datasets

        if "images" in self.source.files:
            table = _images(tuple(self.source.files["images"]))
            return ({"bytes": table[i], "path": str(i)} for i in self.rows["imageId"])
        return iter(self.rows.cast_column("image", datasets.Image(decode=False))["image"])


def _or_none(function: Callable[[Mapping], Hashable], row: Mapping) -> Hashable:
    """What the function makes of a row; None of one that lacks what it reads, and will be left out."""
    try:
        return function(row)
    except (AttributeError, TypeError):
        return None


def read(paths: Sequence[Path]):
    """A datasets.Dataset over the files' rows: in memory, or, if they are large, mapped from the datasets
    cache. UserError if one is unreadable.
    """
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        if sum(path.stat().st_size for path in paths) > IN_MEMORY:
            files = [str(path) for path in paths]
            rows = datasets.load_dataset("parquet", data_files=files, split="train")
        else:
            tables = [pyarrow.parquet.read_table(path) for path in paths]
            rows = datasets.Dataset(pyarrow.concat_tables(tables))
    except (OSError, pyarrow.ArrowException, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(
            f"{_named(paths)} is no readable parquet file ({error}); delete it and run again"
        ) from error
    if "image" in rows.column_names and not isinstance(rows.features["image"], datasets.Image):
        rows = rows.cast_column("image", datasets.Image())
    return rows


def _named(paths: Sequence[Path]) -> str:
    return str(paths[0]) + (f" (of {len(paths)})" if len(paths) > 1 else "")


def _check(benchmark: Benchmark, role: str, paths: Sequence[Path]) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(paths[0])
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{paths[0]} is no readable parquet file ({error}); delete it and run again"
        ) from error
    if problems := column_problems(benchmark, role, schema):
        raise UserError(f"{_named(paths)} does not fit {benchmark.name}: {'; '.join(problems)}")


def _check_groups(benchmark: Benchmark, source: BenchmarkFiles, groups: Sequence) -> None:
    """MME scores an image by both of its questions; upstream would only notice at the very end."""
    odd = [key for key, n in Counter(groups).items() if n != benchmark.group_size]
    if odd:
        raise UserError(
            f"{_named(source.files['rows'])}: {len(odd)} images of {benchmark.title} do not have "
            f"{benchmark.group_size} questions ({odd[0]})"
        )


def build(documents: Documents):
    """The upstream chat task over `documents`, as a lmms_eval ConfigurableMessagesTask."""
    import_lmms_eval()
    import datasets
    import lmms_eval.tasks
    from lmms_eval.api.task import ConfigurableMessagesTask
    from lmms_eval.utils import load_yaml_config

    benchmark = documents.benchmark

    class LocalTask(ConfigurableMessagesTask):
        """Upstream's `download` retries for seconds and copies the data into a cache; we have the rows."""

        def download(self, dataset_kwargs=None):
            split = self.config.test_split
            self.dataset = datasets.DatasetDict({split: documents.decoded})
            self.dataset_no_image = datasets.DatasetDict({split: documents._light(documents.rows)})

    with silenced():
        config = load_yaml_config(str(Path(lmms_eval.tasks.__file__).parent / benchmark.yaml), mode="full")
    for key, value in benchmark.overrides.items():
        config[key] = {**(config.get(key) or {}), **value} if isinstance(value, dict) else value
    # The task's own name stays upstream's in lmms-eval's results; ours is the key everywhere else.
    config.update(task=benchmark.name, process_docs=None, dataset_kwargs=None, dataset_path=None)
    config["metric_list"] = [m for m in config["metric_list"] if m["metric"] != "submission"]
    if "images" in documents.source.files:
        config["doc_to_visual"] = _gqa_visual(documents.source.files["images"])
    benchmark.adapt(config)
    with silenced():
        return LocalTask(config=config, model_name="harness")


@functools.lru_cache(maxsize=2)
def _images(paths: tuple[Path, ...]) -> ImageTable:
    return ImageTable(paths)


class ImageTable:
    """Bytes by identity of a table of images; None for one that is not there."""

    def __init__(self, paths: Sequence[Path]):
        import datasets

        rows = read(paths)
        self._rows = rows.cast_column("image", datasets.Image(decode=False))
        self._places = {key: i for i, key in enumerate(rows["id"])}

    def __getitem__(self, key: object) -> bytes | None:
        return self._rows[self._places[key]]["image"]["bytes"] if key in self._places else None


def _gqa_visual(paths: Sequence[Path]):
    """Upstream's signature: doc -> [RGB image]. A function, since TaskConfig deep-copies its values."""

    def gqa_doc_to_visual(doc):
        return [images.upright(_images(tuple(paths))[doc["imageId"]])]

    return gqa_doc_to_visual
