"""Keep lmms-eval silent, offline and free of side effects on the host application.

What it does without this (lmms-eval 0.7.3): drops the host's loguru sinks on import, logs to stdout, shows
one progress bar per evaluation, prints MMBench tables, and reads OpenAI settings from the environment.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator

_OFFLINE = {
    "WANDB_MODE": "disabled",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
# MMBench's evaluator turns into a paid GPT call when these are set; our scoring is static.
_GPT = ("OPENAI_API_KEY", "OPENAI_API_URL", "AZURE_ENDPOINT", "AZURE_API_KEY", "MODEL_VERSION", "API_TYPE")
#: turns of a waiting OpenMP thread before it sleeps, some 0.1 ms. By default (300,000) threads spin for as
#: long as another process holds a core: eight times the time on a busy machine. Sleeping at once ("passive")
#: costs a quiet one a fifth
SPIN = "2000"
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def share_processor() -> None:
    """Have OpenMP's threads sleep soon when they wait, unless the user has said how they wait. To be called
    before torch is imported; processes that this one starts inherit it."""
    if not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPIN


def prepare_environment(offline: bool = True) -> None:
    """Set the switches that must be in the environment before datasets, transformers and lmms-eval are
    imported.
    """
    for key, value in _OFFLINE.items():
        os.environ.setdefault(key, value)
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    for key in _GPT:
        os.environ.pop(key, None)
    warnings.filterwarnings("ignore", message=".*pynvml package is deprecated.*")
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Swallow what lmms-eval prints and draws while it runs; exceptions pass through untouched."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def import_lmms_eval() -> None:
    """Import the evaluator (seconds, 1 GB) with its log sinks removed and its logging off."""
    from PIL import ImageFile

    prepare_environment()
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    with silenced():
        import lmms_eval.api.task  # noqa: F401  it lets Pillow take truncated files, for the whole process
        from loguru import logger

        logger.remove()
        logger.disable("lmms_eval")
    ImageFile.LOAD_TRUNCATED_IMAGES = tolerant
