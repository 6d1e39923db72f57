"""Shared fixtures: a tiny random checkpoint and small synthetic data, made once a session, all offline."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests/tiny.py, tests/synthetic.py

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# one core each where `pytest -n 2` runs two of them
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Folder of a random LLaVA checkpoint with 64 visual tokens and 6 layers."""
    from tiny import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-llava")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Folder of synthetic parquet files for the eight benchmarks."""
    from synthetic import write

    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def backbone(tiny_checkpoint):
    """The tiny checkpoint, loaded as the harness loads backbones."""
    import backbones

    return backbones.load(str(tiny_checkpoint))


@pytest.fixture(scope="session")
def tiny_qwen_checkpoint(tmp_path_factory) -> Path:
    """Folder of a random Qwen2.5-VL checkpoint; images of 4 to 48 visual tokens, 6 layers."""
    from tiny_qwen import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-qwen")


@pytest.fixture(scope="session")
def hub_checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Folders of random checkpoints as the hub has them (shards, a file for the image processor), by
    family."""
    from backbones.random_checkpoint import make

    root = tmp_path_factory.mktemp("hub")
    return {
        "llava": make("llava-1.5", root / "tiny-llava", hub_layout=True),
        "qwen2_5_vl": make("qwen2.5-vl", root / "tiny-qwen", hub_layout=True),
    }


@pytest.fixture(scope="session")
def mirror(tmp_path_factory) -> Path:
    """A mirror of the eight data sets in the hub's layout and schemas. Tests that change files copy it."""
    from harness.tasks import synthetic_mirror

    return synthetic_mirror.write(tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="session")
def qwen(tiny_qwen_checkpoint):
    """The tiny Qwen2.5-VL checkpoint, loaded as the harness loads backbones."""
    import backbones

    return backbones.load(str(tiny_qwen_checkpoint))


@pytest.fixture
def no_network(monkeypatch) -> None:
    """Whatever opens a connection fails."""

    def refuse(*arguments):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
