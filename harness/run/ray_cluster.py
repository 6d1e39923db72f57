"""Compute cells on a Ray cluster (optional extra `[cluster]`): one cell per worker, one worker per GPU.

The machine that the command runs on keeps the only journals, scores, and writes every file; workers send
each batch's answers as soon as they have them. So nothing but the batch in flight is lost with a worker:
another one goes on from the journal. Workers need this package, the checkpoint and the data (under the same
paths), not --out.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from harness.run.config import Cell, Method, RunConfig
from harness.run.local import LocalEngine
from harness.run.session import Session
from methods.errors import UserError

LOG = logging.getLogger(__name__)
#: workers that are tried for a cell before it counts as failed
TRIES = 3
#: Ray's environment variables
TOKEN, MODE, LOOPBACK = "RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
#: bytes of shared memory that a local cluster takes: answers are small
OBJECT_STORE = 100 << 20


class RayEngine:
    """A `runner.CellEngine`. session: knows the cells; its backbone stays on the CPU, where nothing is
    computed.

    Making one connects to the cluster, or starts a local one, and waits for the first worker; `close` ends
    that. Raises UserError if it cannot be done.
    """

    def __init__(self, config: RunConfig):
        self._ray = _connect(config.address, config.workers)
        self._ours = config.address is None
        self._hired: dict[int, object] = {}
        try:
            resources = self._ray.cluster_resources()
            device = _device(config.device, int(resources.get("GPU", 0)))
            there = int(resources.get("GPU" if device == "cuda" else "CPU", 0))
            self.workers = config.workers or there
            if not 1 <= self.workers <= there:
                what = "GPUs" if device == "cuda" else "CPUs"
                raise UserError(
                    f"--workers {self.workers}: the Ray cluster has {there} {what}; one worker takes one"
                )
            self._config = replace(config, device=device)
            self.session = _Planning(self._config, self._name_of_device())
        except BaseException:
            self.close()
            raise

    def compute(self, todo: Sequence[Cell]) -> Iterator[dict]:
        """Answer the cells, one per worker at a time, and score them here; yields each record once it is on
        disk."""
        if not todo:
            return
        from tqdm import tqdm

        from harness.run import score_cell

        session = self.session
        jobs: queue.SimpleQueue = queue.SimpleQueue()
        done: queue.SimpleQueue = queue.SimpleQueue()
        for documents in session.documents:
            cells = [c for c in todo if c.benchmark is documents.benchmark]
            for entry in session.entries(documents, cells, session.config.out):
                jobs.put((entry, documents))
        for number in range(min(self.workers, len(todo))):
            threading.Thread(target=self._serve, args=(number, jobs, done), daemon=True).start()
        refused: dict[str, dict[int, str]] = {}
        with tqdm(total=len(todo), desc="cells", unit="cell", disable=None) as bar:
            for _ in todo:
                entry, documents, found, problem = done.get()
                if problem is not None:
                    raise problem
                if found:
                    refused.setdefault(documents.benchmark.name, {}).update(found)
                else:
                    yield score_cell.close(session, entry, session.task(documents), documents)
                bar.update()
        for documents in session.documents:
            session.leave_out(documents, refused.get(documents.benchmark.name, {}))

    def measure(self, methods: Sequence[Method]) -> list[dict]:
        """FLOPs and latency of the methods, by one worker alone."""
        for number in [n for n in self._hired if n]:
            self._dismiss(number)
        for _ in range(TRIES):
            try:
                return self._ray.get(self._worker(0).measure.remote(list(methods)))
            except self._ray.exceptions.RayActorError as error:
                self._dismiss(0)
                lost = error
        raise UserError(f"{TRIES} Ray workers were lost while they measured latency ({lost})")

    def close(self) -> None:
        """Let the workers go, and end the cluster if it was started for this run."""
        for number in list(self._hired):
            self._dismiss(number)
        if self._ours:
            self._ray.shutdown()
            for name in (TOKEN, MODE):  # they were this cluster's
                os.environ.pop(name, None)

    # ---- workers

    def _name_of_device(self) -> str:
        try:
            return self._ray.get(self._worker(0).device_name.remote())
        except self._ray.exceptions.RayActorError as error:
            reason = next((x for x in reversed(str(error).splitlines()) if x.strip()), "it was lost")
            raise UserError(f"no Ray worker could start: {reason}") from error

    def _worker(self, number: int):
        """The number-th worker, hired if need be."""
        if number not in self._hired:
            gpus = int(self._config.device == "cuda")
            hire = self._ray.remote(num_cpus=1, num_gpus=gpus)(_Worker)
            self._hired[number] = hire.remote(self._config)
        return self._hired[number]

    def _dismiss(self, number: int) -> None:
        self._ray.kill(self._hired.pop(number))

    def _serve(self, number: int, jobs: queue.SimpleQueue, done: queue.SimpleQueue) -> None:
        """Have the number-th worker do one job after the other."""
        while True:
            try:
                entry, documents = jobs.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((entry, documents, self._answer(number, entry), None))
            except BaseException as error:
                done.put((entry, documents, {}, error))
                return

    def _answer(self, number: int, entry) -> dict[int, str]:
        """Journal all answers to the entry's cell, or set its error; by row, why questions cannot be asked.
        Raises UserError as the worker does."""
        journal, report, errors = entry.model.journal, entry.report, self._ray.exceptions
        for attempt in range(1, TRIES + 1):
            try:
                call = self._worker(number).answer.options(num_returns="streaming")
                known = list(journal.answers.values())
                for reference in call.remote(entry.cell.key, known, self.session.refused):
                    answers, own, refused = self._ray.get(reference)
                    journal.append(answers)
                    report.computed += len(answers)
                report.add(replace(own, computed=0))
                return refused
            except errors.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise UserError(str(error.cause)) from error
                report.error = str(error)
                return {}
            except errors.RayError as error:
                self._dismiss(number)
                what = f"{entry.cell.name} (try {attempt} of {TRIES}): {type(error).__name__}"
                LOG.warning(f"lost a worker in {what}")
                lost = error
        report.error = f"{TRIES} Ray workers were lost over this cell, one after the other ({lost})"
        return {}


class _Planning(Session):
    """Knows the run's cells for a device that may not be on this machine."""

    def __init__(self, config: RunConfig, device_name: str):
        super().__init__(replace(config, device="cpu"))
        self.config, self.device_name = config, device_name


class _Worker:
    """Answers cells in a process of the cluster."""

    def __init__(self, config: RunConfig):
        self._engine = LocalEngine(config)

    def device_name(self) -> str:
        return self._engine.session.device_name

    def measure(self, methods: list[Method]) -> list[dict]:
        return self._engine.measure(methods)

    def answer(self, key: str, known: list, left_out: dict) -> Iterator[tuple[list, object, dict]]:
        """The answers to the cell that are not `known`, batch by batch, each with the sweep.Report so far and
        why questions cannot be asked, by row. left_out: `Session.refused` where the command runs."""
        from harness.run.sweep import answered

        session, refused = self._engine.session, {}
        for documents in session.documents:
            session.leave_out(documents, left_out.get(documents.benchmark.name, {}))
        (cell,) = [c for c in session.cells if c.key == key] or [None]
        if cell is None:
            raise UserError(
                "a Ray worker does not know a cell of this run: all machines need the same packages, "
                "checkpoint and data"
            )
        documents = next(d for d in session.documents if d.benchmark.name == cell.benchmark.name)
        with tempfile.TemporaryDirectory() as scratch:
            (entry,) = session.entries(documents, [cell], Path(scratch))
            entry.model.journal.append(known)
            task, size = session.task(documents), session.config.batch_size
            clock = time.perf_counter
            for _, _, answers in answered(session.backbone, task, [entry], size, clock, refused=refused):
                yield answers, entry.report, refused
            yield [], entry.report, refused


def _connect(address: str | None, workers: int | None):
    """The ray module, connected to the cluster at `address`, or to a new local one with room for `workers`.

    Raises UserError if that cannot be done.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        _protect()
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--engine ray needs Ray: pip install 'visual-token-pruning-bench[cluster]'"
        ) from error
    quiet = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address is None:
            os.environ.setdefault("RAY_worker_niceness", "0")  # else 15: but workers are the run itself
            cpus = max(workers or 1, os.cpu_count() or 1)
            own = {"num_cpus": cpus, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
            ray.init(address="local", **own, **quiet)
            if os.environ.get(MODE) != "token":
                ray.shutdown()
                raise UserError(
                    "--engine ray: this version of Ray starts a cluster that anybody may use; "
                    "pip install 'visual-token-pruning-bench[cluster]'"
                )
        elif not ray.is_initialized():
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        where = f"--address {address}" if address else "--engine ray"
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"{where}: {reason}; start a cluster with: ray start --head") from error
    return ray


def _protect() -> None:
    """Have a local cluster, which is about to be started, take orders from this run alone.

    It listens on the loopback address instead of all (the variable's name is Ray's: by default it does so on
    macOS and Windows), and every call needs a token that is made here. Its processes inherit both.
    """
    os.environ.setdefault(LOOPBACK, "0")
    os.environ[TOKEN] = secrets.token_hex(32)
    os.environ.pop(MODE, None)  # unset: Ray turns authentication on for a new local cluster


def _device(asked: str, gpus: int) -> str:
    """cpu or cuda, for all workers."""
    if asked == "auto":
        return "cuda" if gpus else "cpu"
    if asked not in ("cpu", "cuda"):
        raise UserError(f"--device {asked}: with --engine ray give cpu, cuda or auto; Ray picks the GPU")
    if asked == "cuda" and not gpus:
        raise UserError("--device cuda: the Ray cluster has no GPU; use --device cpu")
    return asked
