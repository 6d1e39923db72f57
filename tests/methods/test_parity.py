"""The methods against recordings of their authors' released code, through the public path, alone and in
batches of 4 with prompts of different length; and the parity command itself, on folders that are wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.parity import compare, drawn
from methods.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def recorded():
    return compare._load(GOLDEN)


def only(vectors, labels):
    """The labels' recordings, without those of other decodings, which are left out."""
    return {k: v for k, v in vectors.items() if k.split(".")[1] in labels and not k.startswith("greedy_")}


@pytest.mark.parametrize("label", ["vanilla", "192", "128", "64", "64k3", "64avg"])
def test_fastv(recorded, label):
    rows = list(
        compare.check(*recorded, "fastv", only(load_file(GOLDEN / "fastv/vectors.safetensors"), [label]))
    )
    assert [(r.label, r.sample, r.agrees) for r in rows] == [(label, i, True) for i in range(4)]
    assert all(r.alone.difference is not None for r in rows)


@pytest.mark.parametrize("label", ["192", "128", "64"])
def test_visionzip(recorded, label):
    rows = list(
        compare.check(
            *recorded, "visionzip", only(load_file(GOLDEN / "visionzip/vectors.safetensors"), [label])
        )
    )
    assert [(r.label, r.sample, r.agrees) for r in rows] == [(label, i, True) for i in range(4)]


@pytest.mark.parametrize("label", ["default", "192", "128", "64"])
def test_pdrop(recorded, label):
    rows = list(
        compare.check(*recorded, "pdrop", only(load_file(GOLDEN / "pdrop/vectors.safetensors"), [label]))
    )
    assert [(r.label, r.sample, r.agrees) for r in rows] == [(label, i, True) for i in range(4)]
    assert all(r.alone.difference is not None for r in rows)


@pytest.mark.parametrize("label", ["192", "128", "nonoise.64"])
def test_sparsevlm(recorded, label):
    prefix, _, budget = label.rpartition(".")
    pattern = rf"{prefix}\.?(greedy|logits|kept)\.{budget}\..+"
    vectors = load_file(GOLDEN / "sparsevlm/vectors.safetensors")
    vectors = {key: tensor for key, tensor in vectors.items() if re.fullmatch(pattern, key)}
    rows = list(compare.check(*recorded, "sparsevlm", vectors))
    assert [(r.label, r.sample, r.agrees) for r in rows] == [(label, i, True) for i in range(4)]
    assert all(r.alone.difference is not None for r in rows)


@pytest.mark.parametrize(
    "key, changed",
    [
        # clusters of one cut in another order; a survivor that is another one; another number of stages
        ("kept.64.0.layer2", lambda kept: torch.cat([kept[:-2], kept[-1:], kept[-2:-1]])),
        ("kept.64.0.layer6", lambda kept: torch.cat([kept[:1] + 1, kept[1:]])),
        ("kept.64.0.layer15", None),
    ],
)
def test_stages_and_made_tokens_are_compared(recorded, key, changed):
    model, inputs = recorded
    vectors = load_file(GOLDEN / "sparsevlm/vectors.safetensors")
    vectors = {k: v for k, v in vectors.items() if re.fullmatch(r"nonoise\.(greedy|kept)\.64\.0.*", k)}
    key = f"nonoise.{key}"
    if changed:
        vectors[key] = changed(vectors[key])
    else:
        del vectors[key]
    (row,) = compare.check(model, inputs, "sparsevlm", vectors)
    assert row.alone.tokens and not row.alone.kept and not row.agrees


def test_recordings_that_are_left_out(recorded):
    model, _ = recorded
    vectors = load_file(GOLDEN / "sparsevlm/vectors.safetensors")
    other_releases = {f"{v}.greedy.64.0": vectors["greedy.64.0"] for v in ("v10", "v2")}
    lines = list(compare.check(model, {}, "sparsevlm", other_releases))
    assert [(line.label, line.why.split(",")[0]) for line in lines] == [
        ("v10.64", "release 1.0"), ("v2.64", "release 2.0"),
    ]  # fmt: skip
    random_and_twin = {k: v for k, v in vectors.items() if re.match(r"(nonoise\.)?greedy\.64\.", k)}
    assert "greedy.64.0" in random_and_twin
    rows = compare.check(model, {}, "sparsevlm", random_and_twin)
    line = next(rows)
    assert line.label == "64" and "random draw of the released code; see nonoise.64" in str(line)
    with pytest.raises(UserError, match=r"recordings of nonoise\.64 "):  # the first label that it runs
        next(rows)
    (line,) = compare.check(model, {}, "fastv", {"greedy_dyn.128.0": vectors["greedy.64.0"]})
    assert line.label == "greedy_dyn.128" and "another decoding" in line.why


@pytest.fixture
def folder(tmp_path):
    """A recording folder with one input and one label."""
    shutil.copytree(GOLDEN / "model", tmp_path / "model")
    inputs = drawn.read(GOLDEN / "inputs.safetensors")
    save_file({k: v for k, v in inputs.items() if k.endswith(".3")}, tmp_path / "inputs.safetensors")
    (tmp_path / "fastv").mkdir()
    vectors = load_file(GOLDEN / "fastv/vectors.safetensors")
    save_file(
        {k: v for k, v in vectors.items() if k.endswith(".64.3")}, tmp_path / "fastv/vectors.safetensors"
    )
    return tmp_path


def change(folder, **changes):
    path = folder / "fastv/vectors.safetensors"
    vectors = load_file(path)
    for kind, new in changes.items():
        vectors[f"{kind}.64.3"] = new(vectors[f"{kind}.64.3"])
    save_file(vectors, path)


def test_another_folder(folder, capsys):
    assert compare.main(folder) == 0
    out = capsys.readouterr().out
    assert "1 rows, all agree; " in out
    assert re.search(r"^fastv +64 +3 .* left out: a single input$", out, re.M)  # nothing to batch it with
    assert re.search(r"^pdrop +left out: no recordings of it here$", out, re.M)
    assert not re.search(r"^fastv +left out", out, re.M)
    vectors = load_file(folder / "fastv/vectors.safetensors")
    save_file(
        {k.replace(".64.", ".64k3."): v for k, v in vectors.items()}, folder / "fastv/vectors.safetensors"
    )
    compare.main(folder)
    assert re.search(
        r"^fastv +default settings +left out: recorded are k=3 alone$", capsys.readouterr().out, re.M
    )


def test_what_is_left_out_is_no_failure(folder, capsys):
    path = folder / "fastv/vectors.safetensors"
    vectors = load_file(path)
    save_file({**vectors, "greedy.128sys36.3": vectors["greedy.64.3"].clone()}, path)
    assert compare.main(folder, ["fastv"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^fastv +128sys36 +left out: the scripts' off-by-one start of the image$", out, re.M)
    assert out.endswith("1 rows, all agree; left out: 3, see above\n")
    save_file({"greedy.128sys36.3": vectors["greedy.64.3"].clone()}, path)
    with pytest.raises(UserError, match="no recordings"):
        compare.main(folder, ["fastv"])


@pytest.mark.parametrize(
    "kind, new",
    [
        ("kept", lambda x: x.flip(0)),
        ("greedy", lambda x: torch.cat([x[:-1], (x[-1:] + 1) % 512])),
        ("logits", lambda x: x + 2e-4),
    ],
)
def test_a_difference_is_seen(folder, capsys, kind, new):
    change(folder, **{kind: new})
    assert compare.main(folder, ["fastv"]) == 1
    assert "DISAGREES" in capsys.readouterr().out


def test_unknown_labels_and_methods_disagree(folder, capsys):
    vectors = load_file(folder / "fastv/vectors.safetensors")
    save_file(
        {k.replace(".64.", ".64x."): v for k, v in vectors.items()}, folder / "fastv/vectors.safetensors"
    )
    shutil.copytree(folder / "fastv", folder / "newmethod")
    assert compare.main(folder) == 1
    out = capsys.readouterr().out
    assert "64x: unknown label" in out and "newmethod      no method of this name" in out


def test_folders_that_are_wrong(folder, tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        compare.main(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no recordings of pdrop .* there are: fastv"):
        compare.main(folder, ["pdrop"])
    (folder / "fastv/vectors.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read"):
        compare.main(folder)
    (folder / "inputs.safetensors").unlink()
    with pytest.raises(UserError, match=r"inputs.safetensors"):
        compare.main(folder)
    (folder / "model/llama.drawn.json").unlink()
    with pytest.raises(UserError, match="no recorded model"):
        compare.main(folder)
