"""Build lmms-eval task objects that read local parquet files (the only module that imports
`lmms_eval.tasks`).

Prompts, `process_results` and aggregation stay upstream's; we override where the rows come from, GQA's image
lookup (upstream maps a decoded image into every question with 8 processes) and MMBench-CN's aggregation
(there is no static one in 0.7.3, and the shipped one posts every unparsed answer to GPT).
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from harness.errors import UserError
from harness.quiet import import_lmms_eval, silenced
from harness.slices import take
from harness.tasks import Benchmark


class Documents:
    """The rows of one benchmark's split: a slice, the images' identities, and a digest of the files."""

    def __init__(self, benchmark: Benchmark, root: Path, split: str, limit: int | None = None):
        self.benchmark = benchmark
        self.paths = {role: Path(root) / path.format(split=split) for role, path in benchmark.files.items()}
        for path in self.paths.values():
            if not path.is_file():
                raise UserError(
                    f"no data for {benchmark.name}: {path} is missing; "
                    "pass the right --data folder, or leave --data out to draw the shipped Pocket-8 set"
                )
        whole = _read(self.paths["rows"])
        light = whole.remove_columns([c for c in whole.column_names if c == "image"])
        keys = [benchmark.group_key(row, number) for number, row in enumerate(light)]
        strata = light[benchmark.stratum] if benchmark.stratum else [0] * len(keys)
        self.total = len(keys)
        #: row number in the file of each document: answers are journalled under it, whatever the slice
        self.numbers = take(keys, strata, limit, salt=benchmark.name)
        self.groups = [keys[n] for n in self.numbers]
        self.rows = whole.select(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the parquet files' bytes, first 16 hex digits."""
        total = hashlib.sha256()
        for role in sorted(self.paths):
            total.update(role.encode())
            total.update(self.paths[role].read_bytes())
        return total.hexdigest()[:16]

    @functools.cached_property
    def image_ids(self) -> list[str]:
        """One identity a document, equal for equal images (GQA: its imageId; else a digest of the stored
        bytes).
        """
        if "images" in self.paths:
            return [str(i) for i in self.rows["imageId"]]
        return [hashlib.sha256(r["bytes"]).hexdigest()[:16] for r in self._stored()]

    @property
    def image_names(self) -> list[str]:
        """The name each document's image has in the file (GQA: its imageId)."""
        if "images" in self.paths:
            return self.image_ids
        return [str(r["path"]) for r in self._stored()]

    def _stored(self) -> list[dict]:
        """The images as they are stored: {"bytes", "path"}."""
        import datasets

        return self.rows.cast_column("image", datasets.Image(decode=False))["image"]


def _read(path: Path):
    """A datasets.Dataset over the file's rows, in memory, without the datasets cache. UserError if
    unreadable.
    """
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is no readable parquet file ({error}); delete it and run again") from error
    rows = datasets.Dataset(table)
    if "image" in rows.column_names and not isinstance(rows.features["image"], datasets.Image):
        rows = rows.cast_column("image", datasets.Image())
    return rows


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
    if "images" in documents.paths:
        config["doc_to_visual"] = _gqa_visual(documents.paths["images"])
    if benchmark.name == "mmbench_cn":
        config["metric_list"][0]["aggregation"] = _mmbench_cn_static
    with silenced():
        return LocalTask(config=config, model_name="harness")


def _gqa_visual(path: Path):
    """Upstream's signature: doc -> [RGB image]. A function, since TaskConfig deep-copies its values."""

    @functools.lru_cache(maxsize=1)
    def table():
        images = _read(path)
        return images, {key: i for i, key in enumerate(images["id"])}

    def gqa_doc_to_visual(doc):
        images, row = table()
        if doc["imageId"] not in row:
            raise UserError(f"{path} has no image {doc['imageId']}, which a question asks for")
        return [images[row[doc["imageId"]]]["image"].convert("RGB")]

    return gqa_doc_to_visual


def _mmbench_cn_static(results, args):
    from lmms_eval.tasks.mmbench.cn_utils import mmbench_evaluator

    return mmbench_evaluator.eval_result(results, eval_method="static")[0] * 100
