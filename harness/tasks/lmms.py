"""Build lmms-eval task objects that read local parquet files (the only module that imports
`lmms_eval.tasks`).

Prompts, `process_results` and aggregation stay upstream's; we override where the rows come from, the lookup
of images that stand in a table of their own (upstream maps a decoded image into every question of GQA with 8
processes), and what a benchmark's `adapt` repairs.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from harness.tasks.benchmark import Benchmark
from harness.tasks.quiet import import_lmms_eval, silenced
from harness.tasks.schemas import column_problems
from harness.tasks.slices import take
from harness.tasks.sources import Source
from methods.errors import UserError

#: bytes of parquet files that are read into memory; more are mapped from a copy in the datasets cache
IN_MEMORY = 256 << 20


class Documents:
    """The rows of one benchmark: a slice, the images' identities, and a digest of the files. Raises UserError
    if a file is unreadable or lacks what the task reads.
    """

    def __init__(self, benchmark: Benchmark, source: Source, limit: int | None = None):
        self.benchmark, self.source = benchmark, source
        whole = read(source.files["rows"])
        for role in source.files:
            _check(benchmark, role, source.files[role])
        light = whole.remove_columns([c for c in whole.column_names if c == "image"])
        if benchmark.group_by is None:
            keys = list(range(len(light)))  # without reading every row
        else:
            keys = [benchmark.group_by(row) for row in light]
        strata = light[benchmark.stratum] if benchmark.stratum else [0] * len(keys)
        self.total = len(keys)
        #: row number in the file of each document: answers are journalled under it, whatever the slice
        self.numbers = take(keys, strata, limit, salt=benchmark.name)
        self.groups = [keys[n] for n in self.numbers]
        self.rows = whole.select(self.numbers)
        if benchmark.group_size:
            _check_groups(benchmark, source, self.groups)

    def __len__(self) -> int:
        return len(self.numbers)

    @functools.cached_property
    def digest(self) -> str:
        """Of the files, see `Source.digest`."""
        return self.source.digest()

    @functools.cached_property
    def image_ids(self) -> list[str]:
        """One identity a document, equal for equal images (GQA: its imageId; else a digest of the stored
        bytes).
        """
        if "images" in self.source.files:
            return [str(i) for i in self.rows["imageId"]]
        stored = self._stored()
        if lacking := [n for n, image in zip(self.numbers, stored) if not image or not image["bytes"]]:
            raise UserError(f"{self.benchmark.name}: row {lacking[0]} has no image; the data set is damaged")
        return [hashlib.sha256(image["bytes"]).hexdigest()[:16] for image in stored]

    @property
    def image_names(self) -> list[str]:
        """The name each document's image has in the file (GQA: its imageId)."""
        if "images" in self.source.files:
            return self.image_ids
        return [str(r["path"]) for r in self._stored()]

    def _stored(self) -> list[dict]:
        """The images as they are stored: {"bytes", "path"}."""
        import datasets

        return self.rows.cast_column("image", datasets.Image(decode=False))["image"]


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


def _check_groups(benchmark: Benchmark, source: Source, groups: Sequence) -> None:
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
            self.dataset = datasets.DatasetDict({split: documents.rows})
            light = documents.rows.remove_columns([c for c in documents.rows.column_names if c == "image"])
            self.dataset_no_image = datasets.DatasetDict({split: light})

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


def _gqa_visual(paths: Sequence[Path]):
    """Upstream's signature: doc -> [RGB image]. A function, since TaskConfig deep-copies its values."""

    @functools.lru_cache(maxsize=1)
    def table():
        images = read(paths)
        return images, {key: i for i, key in enumerate(images["id"])}

    def gqa_doc_to_visual(doc):
        images, row = table()
        if doc["imageId"] not in row:
            raise UserError(f"{_named(paths)} has no image {doc['imageId']}, which a question asks for")
        return [images[row[doc["imageId"]]]["image"].convert("RGB")]

    return gqa_doc_to_visual
