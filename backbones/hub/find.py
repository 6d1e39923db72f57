"""Where a checkpoint lies on this machine: a shipped one, a local folder, or the Hugging Face cache."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from backbones import NAMED, families
from backbones.families.family import Family
from backbones.hub.known import short_names
from methods.errors import UserError

LOG = logging.getLogger(__name__)
#: what a checkpoint needs: no pickled weights, no code
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class FoundCheckpoint:
    """A complete checkpoint folder.

    Attributes:
        name: as it was asked for (a folder's own name).
        folder: where it is.
        repo: its hub id; None for a folder that does not come from the hub.
        revision: its commit; None likewise.
    """

    name: str
    folder: Path
    repo: str | None = None
    revision: str | None = None

    @property
    def family(self) -> Family:
        """By its config.json. Raises UserError if that cannot be read, or the family is not known."""
        return families.of_type(str(read_config(self.folder).get("model_type")))


def find(name: str, revision: str | None = None, download: bool = False) -> FoundCheckpoint:
    """The checkpoint on this machine.

    Args:
        name: of `backbones.NAMED` or `short_names()`, a folder with config.json, or a hub id.
        revision: branch, tag or commit of a hub checkpoint; None: the main one.
        download: whether the network may be asked for what is missing, after a warning in the log.

    Raises:
        UserError: it is not here; with the command that gets what is missing.
    """
    folder = NAMED.get(name, Path(name).expanduser())
    if name in NAMED or (folder / "config.json").is_file():
        return _local(name, folder, revision)
    if folder.is_dir():
        raise UserError(f"{name} is a folder without config.json, so no checkpoint")
    short = short_names()
    repo = short[name].checkpoint.repo if name in short else name
    if not _HUB_ID.fullmatch(repo):
        names = ", ".join([*NAMED, *short])
        raise UserError(
            f"unknown backbone {name!r}: neither a known name ({names}), nor a folder with config.json, nor "
            "a hub id (owner/name)"
        )
    folder = cached(repo, "model", revision)
    lacking = ["everything"] if folder is None else missing_files(folder)
    if lacking and download:
        folder = fetch(repo, "model", revision, PATTERNS)
        lacking = missing_files(folder)
    if lacking:
        where = "is not in the Hugging Face cache" if folder is None else f"lacks {', '.join(lacking)}"
        raise UserError(
            f"checkpoint {repo}{_at(revision)} {where}; get it with: "
            f"{command(repo, 'model', revision, PATTERNS)} (or add --download)"
        )
    return FoundCheckpoint(Path(name).name, folder, repo, folder.name)


def _local(name: str, folder: Path, revision: str | None) -> FoundCheckpoint:
    if name in NAMED and not (folder / "config.json").is_file():
        raise UserError(f"the checkpoint of {name} is missing from this installation; see backbones/pocket")
    lacking = missing_files(folder)
    if lacking:
        raise UserError(f"checkpoint folder {name} lacks {', '.join(lacking)}")
    repo, commit = origin(folder)
    if revision is not None and revision != commit:
        raise UserError(
            f"--revision {revision}: {name} is a local folder (commit {commit or 'unknown'}); give a hub id"
        )
    return FoundCheckpoint(Path(name).name, folder, repo, commit)


def cached(repo: str, kind: str, revision: str | None = None) -> Path | None:
    """The snapshot folder of a repository (kind: model or dataset) in the Hugging Face cache, named after its
    commit; None if there is none. Never asks the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, repo_type=kind, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no valid hub id") from error


def fetch(repo: str, kind: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Download what `patterns` name, after saying so; the snapshot folder. Raises UserError if the hub
    refuses or cannot be reached, or if offline mode is on."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"HF_HUB_OFFLINE is set, so {repo} cannot be downloaded; unset it, or get the files")
    LOG.warning(
        f"NETWORK: downloading {repo}{_at(revision)} ({', '.join(patterns)}) from {constants.ENDPOINT} into "
        f"{constants.HF_HUB_CACHE}"
    )
    try:
        return Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of several libraries, by what went wrong
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{repo} could not be downloaded ({type(error).__name__}: {first}); a gated repository needs "
            "`hf auth login` first"
        ) from error


def command(repo: str, kind: str, revision: str | None, patterns: tuple[str, ...]) -> str:
    """The shell command that downloads it into the cache."""
    parts = ["hf", "download", repo]
    parts += ["--repo-type", kind] if kind != "model" else []
    parts += ["--revision", revision] if revision else []
    return " ".join([*parts, *(f"--include '{pattern}'" for pattern in patterns)])


def origin(folder: Path) -> tuple[str | None, str | None]:
    """(hub id, commit) of a folder that is a cache's snapshot, or was made by `hf download --local-dir`
    (which notes the commit, but not the id); None for what is not known."""
    if folder.parent.name == "snapshots" and (match := re.fullmatch(r"models--(.+)", folder.parents[1].name)):
        return match[1].replace("--", "/", 1), folder.name
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    try:
        first = note.read_text(encoding="utf-8").splitlines()[0].strip()
    except (OSError, IndexError, UnicodeDecodeError):
        return None, None
    return None, first if re.fullmatch(r"[0-9a-f]{40}", first) else None


def missing_files(folder: Path) -> list[str]:
    """What a checkpoint folder lacks: config, safetensors (all shards that its index names), tokenizer,
    processor. Also the words that say so of weights in another format."""
    names = {p.name for p in folder.iterdir() if p.exists()}  # a snapshot's dangling link does not exist
    lacking = [n for n in ("config.json", "tokenizer_config.json") if n not in names]
    if not names & {"preprocessor_config.json", "processor_config.json"}:
        lacking.append("preprocessor_config.json")
    index = "model.safetensors.index.json"
    if index in names:
        shards = set(_json(folder / index).get("weight_map", {}).values())
        lacking += sorted(shards - names)
    elif not any(n.endswith(".safetensors") for n in names):
        lacking.append("model.safetensors (no safetensors file; other weight formats are not loaded)")
    return lacking


def read_config(folder: Path) -> dict:
    """config.json. Raises UserError if it cannot be read."""
    return _json(folder / "config.json")


def _json(path: Path) -> dict:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(body, dict):
        raise UserError(f"{path} is no JSON object, so no checkpoint's; restore it")
    return body


def _at(revision: str | None) -> str:
    return f" at {revision}" if revision else ""
