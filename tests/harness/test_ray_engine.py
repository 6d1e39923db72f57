"""Cells on a local Ray cluster of two workers: the local engine's records, also when a worker is killed."""

import functools
import importlib.util
import os
import signal
import subprocess
import sys

import pytest
import short_run

from harness.cli import app
from harness.store.journal import Journal

psutil = pytest.importorskip("psutil")
if importlib.util.find_spec("ray") is None:  # not imported here: the engine sets its variables before
    pytest.skip("Ray is not installed (pip install '.[cluster]')", allow_module_level=True)

from harness.run import ray_cluster  # noqa: E402


@pytest.fixture(scope="module")
def cluster():
    """A local cluster, as --engine ray starts it; --address auto finds it."""
    ray = ray_cluster._connect(None, 2)
    yield ray
    ray.shutdown()
    for name in (ray_cluster.TOKEN, ray_cluster.MODE):
        os.environ.pop(name, None)


@pytest.fixture(scope="module")
def command(tiny_checkpoint, tiny_data):
    return functools.partial(short_run.arguments, tiny_checkpoint, tiny_data)


@pytest.fixture(scope="module")
def local(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("local")
    assert app.run_all(command(out)) == 0
    return out


def worker_processes() -> list[int]:
    """The cluster's processes that are at work on a cell."""
    found = psutil.Process().children(recursive=True)
    return [p.pid for p in found if p.is_running() and "_Worker.answer" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_the_records_are_those_of_the_local_engine_though_a_worker_is_killed(
    cluster, command, local, tmp_path, monkeypatch, capsys
):
    real, killed = Journal.append, []

    def append(journal, answers):
        real(journal, answers)
        if answers and not killed:
            killed.append(worker_processes()[0])
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(Journal, "append", append)
    assert app.run_all(command(tmp_path, "--engine", "ray", "--address", "auto", "--workers", "2")) == 0
    said = capsys.readouterr().err
    assert killed and said.count("lost a worker in ") == 1 and "try 1 of 3" in said
    short_run.assert_same(tmp_path, local)
    # the local engine finds the cells done
    assert app.run_all(command(tmp_path)) == 0
    assert "6 finished earlier" in capsys.readouterr().out


def test_a_local_cluster_takes_no_orders_from_strangers(cluster):
    """Its sockets listen on the loopback address, and a call needs the run's token."""
    me = psutil.Process()
    processes = [me, *me.children(recursive=True)]
    listening = [
        c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 3, "the cluster's own sockets are seen"
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}
    address = cluster.get_runtime_context().gcs_address
    call = f"""
from ray._raylet import GcsClient
try:
    print("served", len(GcsClient(address={address!r}).get_all_node_info(timeout=20)))
except Exception as error:
    print(type(error).__name__)
"""

    def asked(**own: str) -> str:
        bare = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
        bare["HOME"] = "/nonexistent"  # a token may lie there
        command = [sys.executable, "-c", call]
        return subprocess.run(command, env=bare | own, capture_output=True, text=True).stdout.strip()

    right = os.environ[ray_cluster.TOKEN]
    assert asked() == "AuthenticationError"
    assert asked(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * len(right)) == "AuthenticationError"
    assert asked(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=right) == "served 1"


def test_what_a_worker_refuses_is_bad_input(cluster, command, tmp_path, capsys):
    base = ["--engine", "ray", "--address", "auto"]
    assert app.run_all(command(tmp_path, *base, "--workers", "4000")) == 2
    assert "--workers 4000: the Ray cluster has" in capsys.readouterr().err
    assert app.run_all(command(tmp_path, *base, "--device", "cuda")) == 2
    assert "the Ray cluster has no GPU" in capsys.readouterr().err
    assert app.run_all(command(tmp_path, *base, "--backbone", str(tmp_path / "nothing"))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "unknown backbone" in error
    assert not list(tmp_path.rglob("*.json"))


def test_the_engine_is_local_where_several_processes_are_launched(command, tmp_path, monkeypatch, capsys):
    from harness.run import processes, runner
    from methods.errors import UserError

    config = short_run.config(command(tmp_path, "--engine", "ray"))
    with pytest.raises(UserError, match="run it without accelerate launch"):
        runner._start(config, processes.Processes(0, 2), None)
