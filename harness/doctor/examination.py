"""The order of the checks, what is printed, and the exit code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from harness.doctor.findings import MISSING, OK, Diagnosis, from_error
from methods.errors import UserError


@dataclass
class Examination:
    """One call of the command. online: ask the hub, too. model: load the model. estimate: of the time, at
    `price` for an hour of GPU time (in any currency) if that is given."""

    online: bool = False
    model: bool = True
    estimate: bool = True
    price: float | None = None
    missing: int = 0

    def tell(self, finding: Diagnosis) -> None:
        """Print it, and count it if it keeps the run from starting."""
        print(finding)
        self.missing += finding.level == MISSING

    def find(self, name: str, revision: str | None, download: bool):
        """The checkpoint (backbones.hub.find.FoundCheckpoint); None if it is not there."""
        from backbones.hub.find import find

        checkpoint = None
        try:
            checkpoint = find(name, revision, download)
            self.tell(_found(checkpoint))
        except UserError as error:
            self.tell(from_error("checkpoint", error))
        return checkpoint

    def run(self, config, checkpoint) -> int:
        """Print the findings as they come. Returns 0 if the run could start, else 1. config: RunConfig."""
        from backbones.hub.known import short_names
        from harness.doctor import data, estimate, machine, model, online

        for finding in machine.packages(config):
            self.tell(finding)
        short = short_names().get(config.backbone)
        known = short.checkpoint if short else None
        if checkpoint is not None:
            text_config = _text_config(checkpoint.folder)
            parameters = count_parameters(checkpoint.folder)
        else:
            text_config, parameters = None, known.parameters if known else 0
        if parameters:
            for finding in machine.memory(parameters, config, text_config):
                self.tell(finding)
        to_download = known.weight_bytes if known and checkpoint is None else 0
        for finding in machine.disk(config.out, to_download):
            self.tell(finding)
        tables = []
        family = checkpoint.family if checkpoint else short.family if short else None
        for found in data.check(config, family):
            if isinstance(found, Diagnosis):
                self.tell(found)
            else:
                tables.append(found)
        if self.online:
            for finding in online.check(_repositories(config, checkpoint, known)):
                self.tell(finding)
        seconds: list[float] = []
        if not self.missing and self.model:
            for finding in model.check(config, seconds):
                self.tell(finding)
        elif self.model:
            print("note     model: not loaded, since something is missing")
        if self.estimate:
            for finding in estimate.check(
                config, tables, checkpoint.folder if checkpoint else None, self.price, seconds
            ):
                self.tell(finding)
        print(f"\n{self.missing} missing: the run cannot start" if self.missing else "\nThe run can start.")
        return 1 if self.missing else 0


def _repositories(config, checkpoint, known) -> list:
    """What the hub is asked about (online.Wanted)."""
    from backbones.hub.find import PATTERNS
    from harness.tasks.sources import ORGANISATIONS, patterns

    wanted = {}
    if checkpoint is None or checkpoint.repo:
        repo = checkpoint.repo if checkpoint else known.repo if known else config.backbone
        wanted[repo] = (repo, "model", config.load.revision, PATTERNS)
    for b in config.benchmarks if config.suite.split is None else ():
        repo = f"{ORGANISATIONS[0]}/{b.repository}"
        before = wanted[repo][3] if repo in wanted else ()
        wanted[repo] = (repo, "dataset", None, tuple(dict.fromkeys([*before, *patterns(b)])))
    return list(wanted.values())


def _found(checkpoint) -> Diagnosis:
    from backbones.hub.integrity import check_headers

    tensors = check_headers(checkpoint.name, checkpoint.folder)
    where = checkpoint.repo or "folder"
    commit = f", revision {checkpoint.revision}" if checkpoint.revision else ""
    return Diagnosis(
        OK,
        "checkpoint",
        f"{where}{commit} at {checkpoint.folder}: "
        f"every tensor of the model is in the files ({tensors}, by names and shapes)",
    )


def _text_config(folder: Path) -> dict | None:
    """The language model's settings, defaults filled in; None if transformers does not know the family."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().to_dict()
    except (OSError, ValueError, KeyError):
        return None


def count_parameters(folder: Path) -> int:
    """Numbers in the checkpoint's safetensors files, by their headers alone."""
    from safetensors import safe_open

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total
