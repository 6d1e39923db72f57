"""CDPruner: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs
(NeurIPS 2025, arXiv 2506.10967)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from methods import clip_text
from methods.base import ImageView, Pruner, Selection
from methods.errors import UserError
from methods.registry import register
from methods.together import by_size

#: sentences of the benchmarks that the authors do not count as part of the question
NOT_ASKED = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "Please answer yes or no.",
)
#: a gain that float32 cannot tell from none; the smallest recorded one of a pick is 3e-4
NO_GAIN = 1e-6


@register
@dataclass
class CDPruner(Pruner):
    """CDPruner: keep the b tokens that a determinantal point process finds most diverse and most relevant to
    the question, by greedy search.

    The kernel is r_i cos(i, j) r_j: cosines of projected patches, and the relevance r of each, which is
    **minus** its cosine with the question in CLIP's joint space, scaled to 0..1 over the image (the authors:
    this similarity of CLIP's is inverted). It needs CLIP's text tower, which LLaVA checkpoints lack. Pass the
    questions, `with pruner(model, questions=[...])`, unless the inputs are `Backbone.inputs`'; sentences that
    only say how to answer are left out as the authors do (NOT_ASKED).

    Attributes:
        clip: a folder with the CLIP model of the backbone's vision tower; None:
            openai/clip-vit-large-patch14-336 from the Hugging Face cache.

    Released code followed (Theia-4869/CDPruner 9541616): patches of the features' own layer behind the vision
    tower's last norm; a question of more than 77 tokens is cut into rows, and all but the last one pool a
    token that says little (CLIP's rule); raster order, values unchanged, positions renumbered. Deviations:
    relevance is scaled per image and its own question (theirs over the whole call: the same for one image);
    where nothing more can be gained (the kernel's rank is the width), the most relevant of the rest follow
    (theirs keeps fewer, silently); cosines in float32.

    Qwen2.5-VL, which has no CLIP (nothing is released for it; **ours**): relevance is plus the cosine of
    merged tokens with the mean word embedding of the text behind the image; positions are kept.
    """

    name: ClassVar[str] = "cdpruner"
    reads_question: ClassVar[bool] = True
    clip: str | None = None

    #: the text tower at hand; given by `take` it stays, whatever the model
    _tower: ClassVar[clip_text.TextTower | None] = None
    _given: ClassVar[bool] = False
    #: width of the vision tower that random weights were asked for, see `untrained`
    _untrained: ClassVar[int | None] = None

    def take(self, tower: clip_text.TextTower) -> None:
        """Use this text tower instead of one that is looked for."""
        self._tower, self._given = tower, True

    def untrained(self, width: int, text_width: int, tokens: int) -> None:
        """A text tower with random weights for a vision tower of that width (for costs)."""
        self._untrained = width

    def resources(self, model: torch.nn.Module) -> dict[str, object]:
        if not self.acts or not _has_clip(model):
            return {}
        if self._untrained is not None:
            return {"text_tower": "random"}
        return {"text_tower": self._find(model).digest}

    def prepare(self, model: torch.nn.Module) -> None:
        if self.acts and _has_clip(model):
            self._tower = self._find(model).to(next(model.parameters()).device)

    def _find(self, model: torch.nn.Module) -> clip_text.TextTower:
        if self._given:
            return self._tower
        if self._untrained is not None:
            return clip_text.untrained(self._untrained)
        return clip_text.load(clip_text.find(self.clip, model.config.vision_config, self.name))

    def select(self, image: ImageView) -> Selection:
        return self.select_all([image])[0]

    def select_all(self, images: Sequence[ImageView]) -> list[Selection]:
        return by_size(images, self._select)

    def _select(self, images: list[ImageView]) -> list[Selection]:
        features = torch.stack([image.features for image in images])
        tokens = images[0].project(features)
        if images[0].has_cls:
            relevance = self._relevance(images, features)
        else:
            asked = torch.stack([image.text_after.float().mean(0) for image in images])
            relevance = F.cosine_similarity(features.float(), asked[:, None], dim=-1)
        picked = greedy(tokens, scaled(relevance), self.count(tokens.shape[1]))
        return [Selection(kept, x[kept], projected=True) for kept, x in zip(picked.sort(1).values, tokens)]

    def _relevance(self, images: list[ImageView], features: Tensor) -> Tensor:
        """Minus the mean cosine of each patch with the rows of its question, float32 [B, N]."""
        if self._tower is None and self._untrained is not None:
            self._tower = clip_text.untrained(self._untrained)
        asked = [self._question(image) for image in images]
        distinct = list(dict.fromkeys(asked))
        of_each = dict(zip(distinct, self._tower.embed(distinct)))
        text = [of_each[question].mean(0) for question in asked]
        patches = F.normalize(self._tower.visual(images[0].final_norm(features).float()), dim=-1)
        return -(patches @ torch.stack(text)[..., None])[..., 0]

    def _question(self, image: ImageView) -> clip_text.Question:
        question = image.question
        if question is None and self._untrained is not None:
            return (0,) * clip_text.ROW
        if question is None:
            raise UserError(
                "cdpruner reads the question as text: pass it, `with pruner(model, questions=[...])`, or "
                "make the inputs with Backbone.inputs"
            )
        if isinstance(question, str):
            for sentence in NOT_ASKED:
                question = question.replace(sentence, "")
            return question.strip()
        return tuple(question)


def _has_clip(model: torch.nn.Module) -> bool:
    return model.config.vision_config.model_type == "clip_vision_model"


def scaled(relevance: Tensor) -> Tensor:
    """To 0..1 over each image, [B, N]; the least relevant token keeps a little (as released)."""
    low, high = relevance.aminmax(dim=1, keepdim=True)
    return (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)


def greedy(tokens: Tensor, relevance: Tensor, n: int) -> Tensor:
    """n tokens of each image in order of selection, int64 [B, n]: greedy maximisation of the determinant of
    the kernel r_i cos(i, j) r_j (Chen et al., 2018: incremental Cholesky).

    tokens: [B, N, D]. relevance: float32 [B, N].
    """
    scaled_unit = F.normalize(tokens.float(), dim=-1) * relevance[..., None]
    kernel = scaled_unit @ scaled_unit.mT
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    behind = relevance - relevance.amax() - 1  # below any gain, by relevance, where none is left
    rows = torch.arange(len(tokens), device=tokens.device)
    basis = kernel.new_empty(len(tokens), n, kernel.shape[1])
    picked = []
    for t in range(n):
        pick = torch.where(gain > NO_GAIN, gain, torch.minimum(behind, gain)).argmax(1)
        picked.append(pick)
        row, own = kernel[rows, pick], gain[rows, pick]
        if t:
            row = torch.baddbmm(row[:, None], basis[rows, :t, pick][:, None], basis[:, :t], alpha=-1)[:, 0]
        basis[:, t] = row = row * own.clamp(min=NO_GAIN).rsqrt()[:, None]
        gain.addcmul_(row, row, value=-1)
        gain[rows, pick] = -torch.inf
    return torch.stack(picked, 1)
