"""Where the data come from: mirror, cache, flat folder; what is damaged is named."""

import shutil
from pathlib import Path

import huggingface_hub
import pyarrow.parquet
import pytest

from harness.tasks import lmms
from harness.tasks.environment import silenced
from harness.tasks.lmms import Documents, build
from harness.tasks.sources import flat, hub
from harness.tasks.suites import BENCHMARKS
from methods.errors import UserError

POPE = BENCHMARKS["pope"]


@pytest.fixture
def copy(mirror, tmp_path) -> Path:
    return shutil.copytree(mirror, tmp_path / "copy")


def rewrite(folder: Path, change) -> None:
    """Pass the rows of every parquet file of a folder through `change` (a pyarrow table to a table)."""
    for path in sorted(folder.glob("*.parquet")):
        pyarrow.parquet.write_table(change(pyarrow.parquet.read_table(path)), path)


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_every_benchmark_reads_its_mirror(name, mirror):
    documents = Documents(BENCHMARKS[name], hub(BENCHMARKS[name], mirror))
    assert len(documents.source.files["rows"]) == 2, "two shards"
    assert documents.total == len(documents) == len(documents.image_ids) > 3
    assert documents.source.split == BENCHMARKS[name].upstream_split
    assert documents.source.origin["repository"] == f"lmms-lab-encoder/{BENCHMARKS[name].repository}"
    assert len(documents.digest) == 16


@pytest.mark.parametrize("place", ["lmms-lab/POPE", "POPE"])
def test_older_and_plainer_mirrors(copy, place):
    (copy / place).parent.mkdir(exist_ok=True)
    (copy / "lmms-lab-encoder" / "POPE").rename(copy / place)
    assert len(Documents(POPE, hub(POPE, copy))) == 6


def test_the_card_says_where_the_files_are(copy):
    folder = copy / "lmms-lab-encoder" / "POPE"
    (folder / "data").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"has no data/test.*hf download lmms-lab-encoder/POPE"):
        hub(POPE, copy)
    card = folder / "README.md"
    card.write_text(card.read_text().replace("path: data/", "path: elsewhere/"))
    assert len(Documents(POPE, hub(POPE, copy))) == 6


def test_the_cache_is_read_offline(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"not in the Hugging Face cache; get it with: hf download"):
        hub(POPE)
    place = tmp_path / "cache" / "datasets--lmms-lab--POPE"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("c0ffee")
    shutil.copytree(copy / "lmms-lab-encoder" / "POPE", place / "snapshots" / "c0ffee")
    found = hub(POPE)
    assert dict(found.origin) == {"repository": "lmms-lab/POPE", "revision": "c0ffee"}
    assert found.digest() == hub(POPE, copy).digest()


def test_missing_shards_are_counted(copy):
    (copy / "lmms-lab-encoder/POPE/data/test-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"1 of 00002 files.*--local-dir"):
        hub(POPE, copy)


def test_wrong_columns_are_named(copy):
    folder = copy / "lmms-lab-encoder/POPE/data"
    rewrite(folder, lambda t: t.rename_columns(["topic" if c == "category" else c for c in t.column_names]))
    with pytest.raises(UserError, match=r"column category \(text\) is missing"):
        Documents(POPE, hub(POPE, copy))
    assert len(Documents(BENCHMARKS["mme"], hub(BENCHMARKS["mme"], copy))) == 6


def test_a_broken_pair_of_mme_is_found_before_the_run(copy):
    rewrite(copy / "lmms-lab-encoder/MME/data", lambda t: t.slice(1))
    with pytest.raises(UserError, match="images of MME do not have 2 questions"):
        Documents(BENCHMARKS["mme"], hub(BENCHMARKS["mme"], copy))


def test_a_mirror_where_a_flat_folder_is_wanted(mirror):
    with pytest.raises(UserError, match="use --tasks paper:pope"):
        flat(POPE, mirror, "eval")


def test_large_files_are_mapped(mirror, tmp_path, monkeypatch):
    import datasets

    whole = Documents(POPE, hub(POPE, mirror))
    assert whole.digest  # computed once
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(lmms, "IN_MEMORY", 0)
    mapped = Documents(POPE, hub(POPE, mirror))
    assert mapped.rows.cache_files and not whole.rows.cache_files
    assert mapped.image_ids == whole.image_ids and mapped.rows["question"][:] == whole.rows["question"][:]
    assert mapped.digest == hub(POPE, mirror).digest() == whole.digest


def prompts(name: str, mirror: Path) -> list[str]:
    task = build(Documents(BENCHMARKS[name], hub(BENCHMARKS[name], mirror)))
    with silenced():
        task.build_all_requests()
    return [request.args[0] for request in task.instances]


def test_prompts_of_odd_rows(mirror):
    """No "nan" of a missing hint or option, English or Chinese; OCR tokens where there are any."""
    for name in ("mmbench_en", "mmbench_cn"):
        found = prompts(name, mirror)
        assert not any("nan" in text for text in found)
        assert sum(text.startswith("Look at the box.") for text in found) == 6
        assert ["D. " in text for text in found] == [True] * 4 + [False] * 5
    plain, read = prompts("textvqa", mirror), prompts("textvqa_ocr", mirror)
    assert not any("OCR" in text for text in plain)
    lines = [text.splitlines()[1] for text in read]
    assert lines[:3] == ["Reference OCR token: ", "Reference OCR token: ", "Reference OCR token: RED, 0"]
    assert all(text.splitlines()[0] == other.splitlines()[0] for text, other in zip(plain, read))
