"""Does the training of a learned method fit into a GPU's memory? Computed from shapes, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harness.costs.shape_counter import TEXT_TOKENS
from harness.doctor.findings import MISSING, NOTE, OK, Diagnosis
from methods import learned
from methods.errors import UserError

#: tokens of an answer that is reckoned with: a caption's
ANSWER_TOKENS = 64
#: questions at once that are told of
BATCHES = (1, 8, 32)
GB = 1e9


def check(method: str, backbone: str, budget: int | float, dtype: str, memory: float) -> Iterator[Diagnosis]:
    """What training needs, and whether that fits.

    Args:
        method: name of a learned one.
        backbone: as for a run; a name whose shape is known, or a folder with config.json.
        budget: mean K wanted; below 1 a share of an image's tokens.
        dtype: of the frozen model's weights.
        memory: of the GPU, in GB (1e9 bytes).

    Raises:
        UserError: the backbone's shape is not known.
    """
    import torch

    from backbones import families, shapes
    from methods.stepprune.training import memory as needs
    from methods.stepprune.training.options import TrainOptions

    shape = shapes.named_like(backbone) or _of_folder(backbone)
    tokens = budget if budget >= 1 else budget * shape.visual_tokens
    options = TrainOptions(out=Path(), **learned.settled(method, {"target_tokens": tokens}))
    model = shape.model().to(getattr(torch, dtype)).requires_grad_(False)
    sizes = needs.Sizes(shape.visual_tokens, TEXT_TOKENS + ANSWER_TOKENS, ANSWER_TOKENS)
    need = needs.need(model, families.adapter_for(model), options, sizes)
    what = f"training {method} on {shape.name}"
    yield Diagnosis(
        NOTE,
        what,
        f"{sizes.visual} visual tokens, {sizes.text} of text; frozen weights {need.frozen / GB:.1f} GB in "
        f"{dtype}, {need.trained / needs.TRAINED / 1e6:.0f} M trained parameters with gradients and AdamW's "
        f"moments {need.trained / GB:.1f} GB",
    )
    for samples in BATCHES:
        kept, again = (need.total(samples, checkpointing) / GB for checkpointing in (False, True))
        text = f"{kept:.1f} GB, with --checkpointing {again:.1f} GB"
        yield Diagnosis(NOTE, f"--batch-size {samples}", text)
    kept, again = (need.most(memory * GB, checkpointing) for checkpointing in (False, True))
    if again:
        text = f"--batch-size {kept} fits" if kept else "not one question fits without --checkpointing"
        yield Diagnosis(OK, f"{memory:g} GB", f"{text}; with --checkpointing {again}")
        return
    fix = "" if dtype != "float32" else "--dtype bfloat16"
    yield Diagnosis(MISSING, f"{memory:g} GB", "not one question fits, even with --checkpointing", fix)


def _of_folder(backbone: str):
    from backbones import shapes

    config = Path(backbone) / "config.json"
    if not config.is_file():
        raise UserError(
            f"{backbone}: no shape of that name is known; known: {', '.join(shapes.available())}; or give a "
            "checkpoint's folder"
        )
    return shapes.from_config_file(config)
