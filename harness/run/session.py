"""What the cells of one run share: the loaded backbone, the resolved methods, the documents and the task
objects.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from harness.costs import match
from harness.costs.match import Match
from harness.run import identity
from harness.run.config import Cell, Method, RunConfig, build_pruner, make_cell, method_at
from harness.run.device import name_of
from harness.store import records
from harness.store.journal import Journal
from harness.tasks.sampling import sample
from methods.errors import UserError

LOG = logging.getLogger(__name__)


class Session:
    """Everything that is loaded once. Making one raises UserError for whatever is wrong with the
    configuration.

    left_out: one line each for the methods that cannot do a budget on this backbone, while others can.
    unavailable: one line each for the methods that lack something on this backbone (a checkpoint), in a run
    of all methods; naming such a method raises UserError. matches: with `--match flops`, the budgets of equal
    cost (`harness.costs.match.Match`), by (budget of the run, spec).
    """

    def __init__(self, config: RunConfig):
        from harness.tasks.environment import prepare_environment

        prepare_environment(offline=not config.load.download)
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.config = config
        #: by task and row, what `leave_out` was told
        self.refused: dict[str, dict[int, str]] = {}
        self._tasks: dict[str, object] = {}
        self._hints: dict[str, list] = {}
        if not config.suite.synthetic:
            self.documents  # noqa: B018  missing data and bad images show before a large model is read
        self.backbone = self._load()
        self.described = self.backbone.describe()
        self.methods = self._methods()
        self.matches: dict[tuple, Match] = {}
        if config.match == "flops":
            self._match()
        self.device_name = name_of(config.device)

    def _load(self):
        import backbones

        config = self.config
        return backbones.load(config.backbone, config.load, config.device, config.dtype)

    def pruner(self, method: Method):
        """A fresh pruner object of the method."""
        return build_pruner(method)

    def _methods(self) -> list[Method]:
        """Every method at every budget, vanilla (the reference of all ratios) first, each checked against the
        backbone. Raises UserError if nothing but vanilla is left.
        """
        from methods import registry

        specs, named = list(self.config.methods), True
        if specs == ["all"]:
            specs, named = list(registry.available(answer_key=self._has_evidence)), False
        specs = ["vanilla", *(s for s in specs if s != "vanilla")]
        tokens, layers = self.backbone.num_visual_tokens, self.backbone.num_layers
        methods: list[Method] = []
        self.left_out: list[str] = []
        self.unavailable: list[str] = []
        for budget in self.config.budgets:
            registry.build("vanilla", budget).check_budget(tokens)  # what no method can have is bad input
            for spec in specs:
                method = method_at(spec, budget, self.config.seed)
                try:
                    self.pruner(method).validate(tokens, layers)
                except UserError as error:
                    self.left_out.append(f"{method.spec} at {budget}: {error}")
                    refused = error
                    continue
                try:
                    method = self._with_resources(method)
                except UserError as error:
                    if named:
                        raise
                    self.unavailable.append(f"{method.spec} at {budget}: {error}")
                    continue
                if method not in methods:
                    methods.append(method)
        if self.left_out and len(methods) == 1:
            raise refused
        return methods

    def _with_resources(self, method: Method) -> Method:
        """With what it depends on beside its settings. Raises UserError if it lacks something here."""
        pruner = self.pruner(method)
        if pruner.answer_key and not self._has_evidence:
            raise UserError(
                f"{method.name} knows the answer key, and this data has none (Pocket-8 has one from "
                "version 2 on)"
            )
        self.backbone.family.check_signals(pruner)
        needed = pruner.resources(self.backbone.model)
        return replace(method, parameters={**method.parameters, **needed})

    def _match(self) -> None:
        """Find the budgets of equal cost, and add the methods at them that the run has not yet."""
        from harness.run import probes

        counter = probes.shape_counter(self.backbone, self.probes())
        tokens, layers = self.backbone.num_visual_tokens, self.backbone.num_layers
        for method in [m for m in self.methods if m.budget is not None]:
            found = match.find(counter, method.spec, method.budget)
            if found.budget is not None:
                try:
                    own = method_at(method.spec, found.budget, self.config.seed)
                    self.pruner(own).validate(tokens, layers)
                    own = self._with_resources(own)
                except UserError as error:
                    found = replace(found, budget=None, reason=str(error))
                else:
                    self.methods += [own] if own not in self.methods else []
            self.matches[method.budget, method.spec] = found

    @functools.cached_property
    def _has_evidence(self) -> bool:
        """Whether every benchmark's rows carry their answer key."""
        import pyarrow.parquet

        from harness.tasks.evidence import COLUMNS

        paths = [path for source in self.sources for path in source.files["rows"]]
        return all(set(COLUMNS) <= set(pyarrow.parquet.read_schema(path).names) for path in paths)

    def header(self) -> dict:
        """The part of every record that says where it comes from."""
        config = self.config
        return {
            "schema_version": records.SCHEMA_VERSION,
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "git_commit": records.git_commit(),
            "packages": records.package_versions(),
            "backbone": {"name": config.backbone, **self.described},
            "device": {"kind": config.device.partition(":")[0], "name": self.device_name},
            "dtype": config.dtype,
            "seed": config.seed,
        }

    @functools.cached_property
    def sources(self) -> list:
        """The files of each benchmark, in table order (harness.tasks.sources.BenchmarkFiles)."""
        from harness.tasks.sources import locate

        config = self.config
        data = config.data
        if data is None and config.suite.synthetic:
            from harness.pocket.data import ensure

            data = ensure(varied=self.backbone.family.any_size)
        return [locate(config.suite, b, data, config.load.download) for b in config.benchmarks]

    @functools.cached_property
    def documents(self) -> list:
        """The slice of each benchmark, in table order (harness.tasks.lmms.Documents)."""
        from harness.tasks.lmms import Documents

        config = self.config
        return [Documents(b, s, config.limit_of(b)) for b, s in zip(config.benchmarks, self.sources)]

    @functools.cached_property
    def explored(self) -> list[tuple[str, int]]:
        """(task, row) of the questions that the page's explorer shows."""
        self._without_refused  # noqa: B018
        return sample({d.benchmark.name: d.numbers for d in self.documents}, self.config.explore)

    @property
    def unaskable(self) -> list:
        """Questions of the run's slices that cannot be asked (harness.tasks.lmms.Unaskable), left out of
        `documents`; first read when the backbone is loaded."""
        self._without_refused  # noqa: B018
        return [one for documents in self.documents for one in documents.unaskable]

    @functools.cached_property
    def _without_refused(self) -> None:
        for documents in self.documents:
            documents.leave_out_refused(self.backbone.refuses)

    def leave_out(self, documents, reasons: Mapping[int, str]) -> None:
        """Leave out questions of which it turned out that they cannot be asked, by row, and name them; what
        is known already changes nothing. The benchmark's cells are others from here on."""
        if not reasons.keys() & set(documents.numbers):
            return
        known = len(documents.unaskable)
        documents.leave_out(reasons)
        self.refused.setdefault(documents.benchmark.name, {}).update(reasons)
        for one in documents.unaskable[known:]:
            LOG.info(f"NOT ASKED {one}")
        for cache in (self._tasks, self._hints):
            cache.pop(documents.benchmark.name, None)
        self.__dict__.pop("cells", None)

    @functools.cached_property
    def cells(self) -> list[Cell]:
        self._without_refused  # noqa: B018
        answering = identity.answer_code(str(self.described["family"]))
        scoring = {d.benchmark.name: identity.scoring_code(d.benchmark) for d in self.documents}
        return [
            make_cell(self.config, self.described, d.benchmark, m, d, answering, scoring[d.benchmark.name])
            for d in self.documents
            for m in self.methods
        ]

    def task(self, documents):
        """The benchmark's lmms-eval task with its requests built; one per benchmark, shared by all cells."""
        from harness.tasks import lmms
        from harness.tasks.environment import silenced

        self._without_refused  # noqa: B018
        name = documents.benchmark.name
        if name not in self._tasks:
            task = lmms.build(documents)
            with silenced():
                task.build_all_requests()
            self._tasks[name] = task
        return self._tasks[name]

    def model(self, documents, pruner=None, journal: Journal | None = None, cell: str = ""):
        """lmms-eval's view of backbone and pruner over these documents."""
        from harness.tasks.pruned_model import PrunedModel

        task = self.task(documents)
        name = documents.benchmark.name
        if name not in self._hints:
            self._hints[name] = documents.hints
        hints = self._hints[name]
        model = PrunedModel(
            self.backbone,
            pruner,
            journal,
            identity={"cell": cell},
            batch_size=self.config.batch_size,
            max_new_tokens=self.config.token_cap,
            blind=self.config.blind,
            explored={row for name, row in self.explored if name == documents.benchmark.name},
            row_of=lambda task, doc_id: documents.numbers[doc_id],
            image_of=lambda task, doc_id: documents.image_ids[doc_id],
            hint_of=lambda task, doc_id: hints[doc_id] if hints else None,
        )
        model.task_dict[task.config.task] = task.dataset
        return model

    def entries(self, documents, cells: Sequence[Cell], out: Path, rank: int | None = None) -> list:
        """The cells' places in a sweep over `documents`, with their journals below `out`.

        rank: of the process, where several answer the cells together.
        """
        from harness.run.sweep import SweepEntry

        entries = []
        for cell in cells:
            journal = Journal(cell.journal_path(out), rank)
            entries.append(
                SweepEntry(cell, self.model(documents, build_pruner(cell.method), journal, cell.answers_key))
            )
        return entries

    def probes(self) -> list:
        """Every question of the run, as candidates for the efficiency measurements."""
        from harness.run.probes import Probe

        probes = []
        for documents in self.documents:
            model = self.model(documents)
            for request in self.task(documents).instances:
                q = model.question(request)
                inputs = functools.partial(model.inputs, [request])
                probes.append(Probe(documents.benchmark.name, q.row, q.text, q.image, inputs, q.hint))
        return probes
