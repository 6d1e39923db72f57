"""Full digests of large files: each byte counts, each file is read once, nothing wrong is remembered."""

import hashlib
import json
import os

import pytest

from backbones import digests
from backbones.backbone import weights_digest


@pytest.fixture(autouse=True)
def remembering(tmp_path, monkeypatch):
    """A cache of its own, for files of any size and age."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "REMEMBERED_FROM", 0)
    monkeypatch.setattr(digests, "_SETTLED_NS", -(10**18))


def aged(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9))
    return path


def test_two_checkpoints_that_differ_in_the_middle(tmp_path):
    """Above 512 MiB only the first and last MiB of each file were looked at. 600 MiB, sparse."""
    digest = []
    for middle in (b"a", b"b"):
        folder = tmp_path / middle.decode()
        folder.mkdir()
        with open(folder / "model.safetensors", "wb") as file:
            file.truncate(600 << 20)
            file.seek(300 << 20)
            file.write(middle)
        digest.append(weights_digest(folder))
    assert digest[0] != digest[1]


def test_a_file_is_read_once(tmp_path, monkeypatch):
    path = aged(tmp_path / "w", b"x" * 1000)
    first = digests.of_files([("w", path)])
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: pytest.fail("read again"), raising=False)
    monkeypatch.setattr(digests, "_read", lambda file: pytest.fail("read again"))
    assert digests.of_files([("w", path)]) == first != digests.of_files([("other name", path)])


def test_a_changed_file_is_read_again_though_size_and_time_are_the_old_ones(tmp_path):
    path = aged(tmp_path / "w", b"x" * 1000)
    first = digests.of_files([("w", path)])
    aged(path, b"y" * 1000)
    assert digests.of_files([("w", path)]) != first


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED_NS", 3_000_000_000)
    path = tmp_path / "w"
    path.write_bytes(b"x")
    digests.of_files([("w", path)])
    assert not digests.cache_file().exists()


def test_the_hubs_cache_names_its_files_by_their_digest(tmp_path):
    content = b"weights"
    name = hashlib.sha256(content).hexdigest()
    blob = aged(tmp_path / "blobs" / name, content)
    link = tmp_path / "snapshots" / "c0ffee" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    copy = aged(tmp_path / "copy", content)
    assert digests.of_files([("m", link)]) == digests.of_files([("m", copy)])
    assert str(blob) not in json.loads(digests.cache_file().read_text())
    other = aged(tmp_path / "blobs" / ("ab" * 20), content)  # a small file: git's digest, not ours
    short = link.with_name("config.json")
    short.symlink_to(other)
    assert digests.of_files([("m", short)]) == digests.of_files([("m", copy)])


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"PATH": 3}', '{"PATH": [1, 2, 3, 4, "x"]}', '{"PATH": [1, "0"]}']
)
def test_a_damaged_cache_is_forgotten(tmp_path, damage):
    path = aged(tmp_path / "w", b"x" * 1000)
    first = digests.of_files([("w", path)])
    digests.cache_file().write_text(damage.replace("PATH", str(path)))
    assert digests.of_files([("w", path)]) == first
    kept = json.loads(digests.cache_file().read_text())[str(path)][-1]
    assert kept == hashlib.sha256(b"x" * 1000).hexdigest()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    path = aged(tmp_path / "w", b"x" * 1000)
    assert digests.of_files([("w", path)]) == digests.of_files([("w", path)])


def test_files_that_are_gone_are_forgotten(tmp_path):
    gone, there = aged(tmp_path / "gone", b"1"), aged(tmp_path / "there", b"2")
    digests.of_files([("w", gone)])
    gone.unlink()
    digests.of_files([("w", there)])
    assert list(json.loads(digests.cache_file().read_text())) == [str(there)]
