"""Images: one raster whatever the way in; what cannot be shown is named and counted, the rest is asked."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image, ImageFile

from backbones.images import BadImage, header_problem, problem, upright

RNG = np.random.default_rng(0)
SCENE = Image.fromarray(RNG.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((160, 120))


def saved(image, kind="PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(SCENE, "PNG", exif=exif)


def bomb() -> bytes:
    """The header of a PNG of 40,000 x 40,000 pixels."""
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + head
        + struct.pack(">I", zlib.crc32(head))
        + b"\x00\x00\x00\x00IDAT"
    )


def bad_crc() -> bytes:
    whole = bytearray(saved(SCENE))
    whole[len(whole) // 2] ^= 0xFF
    return bytes(whole)


BAD = {
    "truncated JPEG": (saved(SCENE, "JPEG", quality=95)[:-400], "truncated"),
    "truncated PNG": (saved(SCENE)[:-400], "cannot be decoded"),
    "a bad CRC": (bad_crc(), "cannot be decoded"),
    "text": (b"<html>404</html>", "not an image"),
    "a bomb": (bomb(), "too large"),
    "nothing": (b"", "there is no image"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_image_is_named(what, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval leaves it
    content, words = BAD[what]
    assert words in problem(content)[0]
    if content:
        with pytest.raises(BadImage, match=words):
            upright(content)


def test_a_header_tells_what_is_no_image_and_bombs():
    assert [bool(header_problem(BAD[what][0])) for what in ("text", "a bomb", "nothing")] == [True] * 3
    assert not header_problem(saved(SCENE))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_an_image_once(orientation, tmp_path):
    content = turned(orientation)
    with Image.open(io.BytesIO(content)) as image:
        from PIL import ImageOps

        wanted = np.asarray(ImageOps.exif_transpose(image))
    (tmp_path / "x.png").write_bytes(content)
    for given in (content, tmp_path / "x.png", str(tmp_path / "x.png"), Image.open(io.BytesIO(content))):
        once = upright(given)
        assert np.array_equal(np.asarray(once), wanted) and np.array_equal(np.asarray(upright(once)), wanted)
    assert problem(content) == ("", once.size)


def test_modes_become_8_bit_rgb():
    grey = (np.arange(0, 65536, 257, dtype=np.uint16)[:, None] * np.ones((1, 4), np.uint16)).astype(np.uint16)
    scaled = np.asarray(upright(saved(Image.fromarray(grey))))
    assert np.array_equal(scaled[:, 0], np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1))
    colours = np.asarray(SCENE)
    clear = SCENE.convert("RGBA")
    clear.putalpha(Image.new("L", SCENE.size, 7))
    assert np.array_equal(np.asarray(upright(saved(clear))), colours), "an alpha channel changes no colour"
    palette = SCENE.quantize(16)
    assert np.array_equal(
        np.asarray(upright(saved(palette, transparency=3))), np.asarray(palette.convert("RGB"))
    )
    cmyk = saved(SCENE.convert("CMYK"), "TIFF")
    assert np.abs(np.asarray(upright(cmyk)).astype(int) - colours).max() <= 2
    for mode in ("1", "L", "LA", "P", "I", "F", "RGBX", "YCbCr"):
        assert (
            upright(SCENE.convert("L").convert(mode) if mode != "YCbCr" else SCENE.convert(mode)).mode
            == "RGB"
        )


def test_lmms_eval_leaves_pillow_as_it_was():
    from harness.tasks.environment import import_lmms_eval

    ImageFile.LOAD_TRUNCATED_IMAGES = False
    import_lmms_eval()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_both_ways_give_the_same_raster(backbone, tmp_path, tiny_data):
    """backbone.inputs on a file, and a benchmark's document with the same file."""
    from harness.tasks.lmms import build

    grey = Image.fromarray(np.asarray(SCENE.convert("L")).astype(np.uint16) * 257)
    for content in (turned(6), saved(grey)):
        documents = pope_with(tiny_data, tmp_path / str(len(content)), {0: content})
        task = build(documents)
        image = task.dataset[task.config.test_split][0]["image"]
        ours = backbone.inputs([content], ["x"])["pixel_values"]
        assert (backbone.inputs([image], ["x"])["pixel_values"] == ours).all()


def with_images(source, target, changes: dict[int, bytes | None]):
    """A copy of a parquet file with other image bytes in some rows."""
    table = pyarrow.parquet.read_table(source)
    rows = table.to_pylist()
    for row, content in changes.items():
        rows[row]["image"] = {"bytes": content, "path": f"bad{row}.jpg"}
    target.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), target)


def pope_with(tiny_data, folder, changes):
    from harness.tasks.lmms import Documents
    from harness.tasks.sources import BenchmarkFiles
    from harness.tasks.suites import BENCHMARKS

    with_images(tiny_data / "pope/eval.parquet", folder / "pope.parquet", changes)
    files = {"rows": [folder / "pope.parquet"]}
    return Documents(BENCHMARKS["pope"], BenchmarkFiles(files=files, split="eval"))


def test_a_run_names_and_counts_what_cannot_be_asked_and_scores_the_rest(
    tiny_qwen_checkpoint, tiny_data, tmp_path, capsys
):
    from harness.cli import app

    data = shutil.copytree(tiny_data, tmp_path / "data")
    long = saved(Image.new("RGB", (2100, 10), "red"))
    changes = {0: BAD["truncated JPEG"][0], 3: b"no image", 4: bomb(), 7: None, 9: long}
    with_images(tiny_data / "pope/eval.parquet", data / "pope/eval.parquet", changes)
    with_images(tiny_data / "mme/eval.parquet", data / "mme/eval.parquet", {1: b"no image"})
    with_images(tiny_data / "gqa/eval_images.parquet", data / "gqa/eval_images.parquet", {2: b"no image"})
    out = tmp_path / "out"
    given = ["--backbone", tiny_qwen_checkpoint, "--data", data, "--tasks", "pope,mme,gqa", "--out", out]
    given += ["--methods", "uniform", "--budget", "4", "--latency-repeats", "1"]
    assert app.run_all([str(a) for a in given]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOT ASKED")]
    pope = [line for line in said if " pope " in line]
    assert len(pope) == 5 and "NOT ASKED pope row 3, image bad3.jpg: not an image of a known format" in pope
    assert any("row 9, image bad9.jpg: 2100 x 10 pixels: absolute aspect ratio" in line for line in pope)
    assert sum(" mme row " in line for line in said) == 2, "MME scores both questions on an image together"
    assert sum(" gqa row " in line for line in said) == 2
    caption = (out / "leaderboard.md").read_text()
    assert "Not asked, since they cannot be shown to the model: " in caption and "POPE 5" in caption
    records = [json.loads(p.read_text()) for p in out.rglob("*.json") if '"kind": "cell"' in p.read_text()]
    for record in records:
        n, lost = len(record["documents"]["row"]), len(record["data"]["unaskable"])
        assert (record["task"], n, lost) in {("pope", 7, 5), ("mme", 8, 2), ("gqa", 8, 2)}
    assert len(records) == 6


def test_nothing_to_ask_is_one_line(tiny_data, tmp_path):
    from methods.errors import UserError

    with pytest.raises(
        UserError, match=r"pope: no question can be asked; pope row 0, image bad0.jpg: not an im"
    ):
        pope_with(tiny_data, tmp_path, dict.fromkeys(range(12), b"no image"))
