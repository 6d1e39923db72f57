"""The parquet files: columns of the hub's data sets, whole MME pairs and MMBench rotations, one draw."""

import io
from collections import Counter

import pyarrow.parquet as parquet
import pytest
from PIL import Image

from backbones import families
from harness.drawings.scenes import render
from harness.pocket import data
from harness.pocket.data import build, documents
from harness.tasks.lmms import Documents
from harness.tasks.lmms import build as build_task
from harness.tasks.sources import flat
from harness.tasks.suites import BENCHMARKS

COLUMNS = {
    "gqa/eval_instructions": (
        "answer entailed equivalent fullAnswer groups id imageId isBalanced question semanticStr types"
    ),
    "gqa/eval_images": "id image",
    "mmbench_en/eval": "A B C D L2-category answer category comment hint image index question source split",
    "mme/eval": "answer category image question question_id",
    "pope/eval": "answer category id image image_source question question_id",
    "scienceqa/eval": (
        "answer category choices grade hint image lecture question skill solution subject task topic"
    ),
    "vqav2/eval": (
        "answer_type answers image image_id multiple_choice_answer question question_id question_type"
    ),
    "textvqa/eval": (
        "answers flickr_300k_url flickr_original_url image image_classes image_height image_id "
        "image_width ocr_tokens question question_id question_tokens set_name"
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "questions", lambda version: dict.fromkeys(documents.tasks(), 8))
        return build.build(tmp_path_factory.mktemp("pocket8"), progress=False)


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "questions", lambda version: {"pope": 8, "textvqa": 8})
        return build.build(tmp_path_factory.mktemp("varied"), progress=False, varied=True)


def test_varied_images_have_their_scenes_sizes(varied):
    rows = parquet.read_table(varied / "textvqa/eval.parquet").to_pylist()
    sizes = set()
    for row in rows:
        pixels = Image.open(io.BytesIO(row["image"]["bytes"]))
        scene = build.scene_of(row["image"]["path"])
        assert pixels.size == (scene.width, scene.height) == (row["image_width"], row["image_height"])
        assert list(pixels.convert("RGB").getdata()) == list(render(scene).getdata())
        sizes.add(pixels.size)
    assert len(sizes) == 8
    pope = BENCHMARKS["pope"]
    names = Documents(pope, flat(pope, varied, "eval")).image_names
    assert all(name.startswith("varied-pope-eval-") for name in names)


def test_backbones_that_take_any_size_get_varied_canvases(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "questions", lambda version: {"gqa": 4})
    monkeypatch.setenv("POCKET8_HOME", str(tmp_path))
    square = data.ensure(varied=families.of_type("llava").any_size)
    varied = data.ensure(varied=families.of_type("qwen2_5_vl").any_size)
    assert {square.name, varied.name} == {p.name for p in tmp_path.iterdir()} == {
        f"v{build.version_of(False)}", f"v{build.version_of(True)}-varied"
    }  # fmt: skip


@pytest.mark.parametrize("file", COLUMNS)
def test_schema(root, file):
    assert set(parquet.read_schema(root / f"{file}.parquet").names) == set(COLUMNS[file].split())


def test_mme_pairs_and_mmbench_rotations_are_whole(root):
    pairs = Counter(
        r["question_id"]
        for r in parquet.read_table(root / "mme/eval.parquet", columns=["question_id"]).to_pylist()
    )
    assert len(pairs) == 8 and set(pairs.values()) == {2}
    rows = parquet.read_table(root / "mmbench_en/eval.parquet", columns=["index", "D"]).to_pylist()
    rotations = Counter(r["index"] % 1_000_000 for r in rows)
    assert len(rotations) == 8 and set(rotations.values()) <= {2, 3, 4}


def test_gqa_images_are_all_there(root):
    questions = parquet.read_table(root / "gqa/eval_instructions.parquet").to_pylist()
    images = {r["id"] for r in parquet.read_table(root / "gqa/eval_images.parquet").to_pylist()}
    assert {q["imageId"] for q in questions} == images


def test_ensure_draws_once(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "questions", lambda version: {"gqa": 4})
    monkeypatch.setenv("POCKET8_HOME", str(tmp_path))
    first = build.ensure()
    stamp = (first / "gqa" / "eval_images.parquet").stat().st_mtime_ns
    assert build.ensure() == first and (first / "gqa" / "eval_images.parquet").stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == [f"v{build.version_of(False)}"]


@pytest.mark.parametrize("task", documents.tasks())
def test_training_prompt_and_target_are_lmms_evals(root, task):
    """The trainer words a row just as lmms-eval's task does, and lmms-eval counts the trained answer as
    right.
    """
    rows = Documents(BENCHMARKS[task], flat(BENCHMARKS[task], root, "eval"))
    upstream = build_task(rows)
    for doc in upstream.test_docs():
        assert upstream.doc_to_text(doc) == documents.prompt(task, doc)
        scores = upstream.process_results(doc, [documents.target(task, doc)])
        assert _credit(next(iter(scores.values())), doc) == 1.0


def _credit(score, doc) -> float:
    """MMBench's rows are scored together at the end: there, look at the answer itself."""
    if isinstance(score, dict):
        return score["score"] if "score" in score else float(score["prediction"] == doc["answer"])
    return score


@pytest.mark.parametrize("task", ["pope", "mmbench_cn", "gqa"])
def test_an_images_name_leads_to_its_scene(root, task):
    found = Documents(BENCHMARKS[task], flat(BENCHMARKS[task], root, "eval"))
    pixels = found.rows[3]["image"] if task != "gqa" else None
    scene = build.scene_of(found.image_names[3])
    if pixels is None:
        images = {r["id"]: r["image"]["bytes"] for r in _images(root)}
        pixels = Image.open(io.BytesIO(images[found.image_names[3]]))
    assert list(pixels.convert("RGB").getdata()) == list(render(scene).getdata())


def _images(root):
    return parquet.read_table(root / "gqa/eval_images.parquet").to_pylist()


def test_what_a_killed_drawing_left_is_removed(tmp_path, monkeypatch):
    """17 MB stayed in the cache for ever. What another process draws just now stays, and a user's folders."""
    monkeypatch.setattr(documents, "questions", lambda version: {"gqa": 4})
    monkeypatch.setenv("POCKET8_HOME", str(tmp_path))
    left, mine = tmp_path / ".drawing-ab_cdef1", tmp_path / ".drawing-by-hand"
    for folder in (left, mine):
        (folder / "gqa").mkdir(parents=True)
    with build._drawing(tmp_path) as busy:
        root = build.ensure()
        assert {p.name for p in tmp_path.iterdir()} == {root.name, busy.name, mine.name}
    left.mkdir()
    assert build.ensure() == root and not left.exists()
