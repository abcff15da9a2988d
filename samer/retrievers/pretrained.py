"""Pretrained towers of transformers: how a retriever of two names them, loads them, and what they are like."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from samer.config import InputError
from samer.retrievers.identity import fingerprint, model_folder
from samer.runtime.files import is_dir, read_json
from samer.runtime.hub import hub_folder
from samer.settings import build_dataclass

MODEL_TYPE = "samer_towers"
NO_BOUND = 1_000_000
WHERE = ("vision", "text", "vision_revision", "text_revision")  # of a config: where the towers are


@dataclass(frozen=True)
class TowerConfig:
    """What a tower retriever is made of.

    Attributes:
        vision, text: the towers, on the hub or folders.
        vision_revision, text_revision: on the hub.
        vision_hash, text_hash: of config.json and the weights of each; "" is not known.
        image_size: pixels per side that pictures are stretched to, whatever their shape, so that boxes stay shares.
        hidden_size: H, what the projection is applied to.
        embedding_dim: D.
        vision_layers, text_layers: of the adapters; 0: the tower's own output.
        heads: of the adapters' attention.
        temperature: that similarities were divided by in training.
        max_text_tokens: longer texts are cut.
    """

    vision: str = "facebook/dinov2-small"
    text: str = "sentence-transformers/all-MiniLM-L6-v2"
    vision_revision: str = "main"
    text_revision: str = "main"
    vision_hash: str = ""
    text_hash: str = ""
    image_size: int = 224
    hidden_size: int = 384
    embedding_dim: int = 128
    vision_layers: int = 1
    text_layers: int = 1
    heads: int = 6
    temperature: float = 0.05
    max_text_tokens: int = 64
    architectures: tuple[str, ...] = ("TowerRetriever",)
    model_type: str = MODEL_TYPE

    def __post_init__(self) -> None:
        for name in ("image_size", "hidden_size", "embedding_dim", "heads", "max_text_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"towers.{name} must be at least 1; it is {getattr(self, name)}")
        for name in ("vision_layers", "text_layers"):
            if getattr(self, name) < 0:
                raise InputError(f"towers.{name} must be at least 0; it is {getattr(self, name)}")
        if self.hidden_size % self.heads:
            raise InputError(f"towers.hidden_size {self.hidden_size} is no multiple of towers.heads {self.heads}")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"towers.temperature must be a number above 0; it is {self.temperature}")


def read_tower_config(file: Path) -> TowerConfig:
    """The settings of a folder.

    Raises:
        InputError: not readable, or not those of a tower retriever.
    """
    return build_dataclass(TowerConfig, read_json(file), str(file))


def load_towers(config: TowerConfig, *, local_files_only: bool = False) -> tuple[nn.Module, nn.Module]:
    """Both towers, frozen, in float32.

    Raises:
        InputError: one can't be loaded, or its files are not those that the retriever was aligned with.
    """
    from transformers import AutoModel

    towers = []
    for kind in ("vision", "text"):
        name, revision = getattr(config, kind), getattr(config, f"{kind}_revision")
        try:
            found, report = AutoModel.from_pretrained(
                name,
                revision=revision,
                local_files_only=local_files_only,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # many types
            raise unusable(kind, name, "can't be loaded", error) from None
        wanted, now = getattr(config, f"{kind}_hash"), tower_hash(name, revision)  # of what was just loaded
        if wanted and now and wanted != now:
            raise InputError(
                f"{kind} tower {name}: its files are not those that this retriever was aligned with; restore them"
            )
        tower = getattr(found, f"{kind}_model", found)  # of a model of both, such as SigLIP
        if kind == "text" and getattr(tower.config, "is_encoder_decoder", False):
            tower = tower.get_encoder()
        lost = [key for key in report["missing_keys"] if "pooler" not in key]
        if lost:
            raise InputError(f"{kind} tower {name!r} lacks {len(lost)} weights, first {lost[0]}; they would be random")
        towers.append(tower.eval().requires_grad_(False))
    return towers[0], towers[1]


def text_positions(text: nn.Module) -> int:
    """The longest text that a tower has positions for; a large number where it has no bound."""
    most = getattr(text.config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return NO_BOUND
    # RoBERTa's count on from its padding's id
    offset = (text.config.pad_token_id or 0) + 1 if "roberta" in text.config.model_type else 0
    return most - offset


def tower_hash(name: str, revision: str = "main") -> str:
    """Hash of a tower's config and weights; "" where they are not on this machine."""
    folder = model_folder(name, revision)
    return fingerprint(folder).weights if folder else ""


def folder_of(name: str, revision: str = "main", local_files_only: bool = False) -> Path:
    """The folder itself, or that of a hub id, whose files are fetched."""
    if is_dir(name):
        return Path(name)
    return hub_folder(name, ["*.json", "*.safetensors"], revision=revision, local_files_only=local_files_only)


def unusable(kind: str, name: str, what: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:240]
    return InputError(f"{kind} tower {name!r} {what} ({reason}); name a folder that holds one, or a hub id")


def tower_width(tower: nn.Module) -> int:
    """Width of a tower's last hidden states."""
    config = tower.config
    width = getattr(config, "hidden_size", None) or getattr(config, "dim", None)
    if not isinstance(width, int):
        raise InputError(f"{type(tower).__name__} has no hidden_size; it can't be a tower")
    return width


@torch.no_grad()
def tower_grid(vision: nn.Module, image_size: int) -> tuple[int, int]:
    """Patches per side, and how many special tokens come before them, by trying.

    Raises:
        InputError: no model of patch tokens, or one that does not take this size.
    """
    more = {}
    if "interpolate_pos_encoding" in inspect.signature(vision.forward).parameters:
        more["interpolate_pos_encoding"] = True
    try:
        states = vision(pixel_values=torch.zeros(1, 3, image_size, image_size), **more).last_hidden_state
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0][:160]
        raise InputError(f"the vision tower does not take pictures of {image_size} pixels ({reason})") from None
    if states.ndim != 3:
        raise InputError("the vision tower gives no sequence of patch tokens")
    count, patch = states.shape[1], getattr(vision.config, "patch_size", 0)
    side = image_size // patch if isinstance(patch, int) and patch else count
    if side * side > count:  # a pyramid, such as Swin: fewer tokens than patches, and no special ones
        side = math.isqrt(count)
        if side * side != count:
            raise InputError(f"the vision tower gives {count} tokens of {image_size} pixels, which are no square")
    return side, count - side * side
