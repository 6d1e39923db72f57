"""CLIP's side of text, which LLaVA checkpoints lack: weights from outside, found on this machine.

`TextTower` is what turns a question into an embedding beside those of image patches. It is looked for in a
folder that the user names or in the Hugging Face cache; nothing is downloaded.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.errors import UserError

#: the CLIP model that LLaVA-1.5's vision tower is from
REPO = "openai/clip-vit-large-patch14-336"
#: sizes of its text tower, for random weights
LARGE = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
#: token ids in a row of the text tower
ROW = 77

#: text, or its ids in the text tower's vocabulary, first and last token included
Question = str | Sequence[int]


class TextTower(nn.Module):
    """Text tower, text projection, and the projection of image patches into the same space; float32.

    Attributes:
        text: transformers' CLIPTextModelWithProjection.
        visual: [d] -> [e], without bias, behind the vision tower's last norm.
        tokenizer: of the text tower; None where questions come as ids.
        digest: of all weights, 16 hex digits.
    """

    def __init__(self, text: nn.Module, visual: nn.Linear, tokenizer=None):
        super().__init__()
        self.text, self.visual, self.tokenizer = text.eval().float(), visual.float(), tokenizer
        self.requires_grad_(False)

    @functools.cached_property
    def digest(self) -> str:
        total = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            total.update(f"{name}:{tuple(value.shape)};".encode())
            total.update(value.cpu().contiguous().numpy().tobytes())
        return total.hexdigest()[:16]

    def embed(self, questions: Sequence[Question]) -> list[Tensor]:
        """Unit embeddings of each question's rows, float32 [m, e]: a question of more than `ROW` tokens is
        cut into rows, each of which goes through the tower alone."""
        device = self.visual.weight.device
        rows = [self._rows(question) for question in questions]
        joined = torch.tensor([row for own in rows for row in own], device=device)
        embeds = F.normalize(self.text(input_ids=joined).text_embeds, dim=-1)
        return list(embeds.split([len(own) for own in rows]))

    def _rows(self, question: Question) -> list[list[int]]:
        """Rows of `ROW` ids; the last is filled up with 0, which no token before it sees."""
        ids = self.tokenizer(question)["input_ids"] if isinstance(question, str) else list(question)
        ids += [0] * (-len(ids) % ROW)
        return [ids[i : i + ROW] for i in range(0, len(ids), ROW)]


def find(folder: str | None, vision_config, method: str) -> Path:
    """The folder of the CLIP model whose vision tower has this configuration.

    folder: named by the user; None: the hub's cache is asked for `REPO`. Raises UserError, with the command
    that gets the model, if there is none, or if it belongs to another vision tower.
    """
    path = Path(folder) if folder is not None else _cached()
    if path is None and not _is_large(vision_config):
        raise UserError(
            f"{method} needs the text tower of the CLIP model that this backbone's vision tower is from, and "
            f"knows of {REPO} alone, which is another; if there is one, name its folder: {method}:clip=FOLDER"
        )
    if path is None:
        raise UserError(
            f"{method} needs the text tower of {REPO}, which is not in the Hugging Face cache as "
            f"safetensors: hf download {REPO} (or name a folder that has it: {method}:clip=FOLDER)"
        )
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise UserError(f"{method}: {path} holds no CLIP model: config.json and *.safetensors are needed")
    theirs = _config(path).vision_config
    for name in ("hidden_size", "num_hidden_layers", "patch_size", "image_size"):
        ours, other = getattr(vision_config, name), getattr(theirs, name)
        if ours != other:
            raise UserError(
                f"{method}: the CLIP model in {path} has another vision tower than this backbone "
                f"({name} {other}, here {ours}), so that its text tower says nothing about it"
            )
    return path


@functools.lru_cache(maxsize=1)
def load(path: Path) -> TextTower:
    """The text tower of a CLIP model's folder, on the CPU. Raises UserError if it has none."""
    from safetensors import SafetensorError, safe_open
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    config, found = _config(path), {}
    try:
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  no mapping
                    if name.startswith(("text_model.", "text_projection.", "visual_projection.")):
                        found[name] = tensors.get_tensor(name).float()
        visual = found.pop("visual_projection.weight")
        config.text_config.projection_dim = len(visual)
        with torch.device("meta"):
            text = CLIPTextModelWithProjection(config.text_config)
        text = text.to_empty(device="cpu")
        numbers = text.text_model.embeddings.position_ids
        numbers.copy_(torch.arange(numbers.shape[1])[None])
        text.load_state_dict({k: v for k, v in found.items() if not k.endswith("position_ids")}, strict=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"no CLIP text tower in {path}: {str(error).splitlines()[0]}") from error
    return TextTower(text, _linear(visual), tokenizer)


@functools.lru_cache(maxsize=1)
def untrained(width: int) -> TextTower:
    """Random weights of `REPO`'s sizes, for a vision tower of that width (for costs)."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPTextConfig(**LARGE)
        text = CLIPTextModelWithProjection(config)
        return TextTower(text, _linear(torch.randn(config.projection_dim, width)))


def _linear(weight: Tensor) -> nn.Linear:
    visual = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    visual.weight.data = weight
    return visual


def _cached() -> Path | None:
    """The newest snapshot of `REPO` in the hub's cache that has safetensors."""
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE) / f"models--{REPO.replace('/', '--')}" / "snapshots"
    files = [p for p in snapshots.glob("*/config.json") if any(p.parent.glob("*.safetensors"))]
    return max(files, key=lambda p: p.stat().st_mtime).parent if files else None


def _is_large(vision_config) -> bool:
    facts = (vision_config.hidden_size, vision_config.num_hidden_layers, vision_config.image_size)
    return facts == (1024, 24, 336)


def _config(path: Path):
    from transformers import CLIPConfig

    try:
        return CLIPConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"no CLIP model in {path}: {str(error).splitlines()[0]}") from error
