"""What the hub says of the repositories that a run needs. Asks the network: only with `--online`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

from harness.doctor.findings import MISSING, OK, Diagnosis

LOG = logging.getLogger(__name__)
#: (repository, kind, revision, patterns of the files that are needed)
Wanted = tuple[str, str, "str | None", "tuple[str, ...]"]


def check(wanted: Sequence[Wanted]) -> Iterator[Diagnosis]:
    """One finding a repository: reachable, its commit, the bytes that the needed files have."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        yield Diagnosis(MISSING, "hub", "HF_HUB_OFFLINE is set, so --online can ask nothing", "unset it")
        return
    LOG.warning(
        f"NETWORK: asking {constants.ENDPOINT} about {len(wanted)} repositories (nothing is downloaded)"
    )
    api = HfApi()
    for repo, kind, revision, patterns in wanted:
        ask = api.model_info if kind == "model" else api.dataset_info
        try:
            info = ask(repo, revision=revision, files_metadata=True)
        except Exception as error:  # of several libraries, by what went wrong
            text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            fix = "check the connection; if it is gated: hf auth login"
            yield Diagnosis(MISSING, f"hub {repo}", text, fix)
            continue
        files = [f for f in info.siblings or [] if any(fnmatch(f.rfilename, p) for p in patterns)]
        size = sum(f.size or 0 for f in files)
        if not files:
            yield Diagnosis(MISSING, f"hub {repo}", f"at {info.sha} it has no files {', '.join(patterns)}")
            continue
        gated = " (gated: hf auth login)" if getattr(info, "gated", False) else ""
        text = f"reachable{gated}, commit {info.sha}, {len(files)} files, {size / 1e9:.1f} GB"
        yield Diagnosis(OK, f"hub {repo}", text)
