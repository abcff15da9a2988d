"""Towers, projections and head; a folder of them.

    config.json          settings, hashes of the towers' files, and what the weights need to be read
    model.safetensors    everything that was trained

The towers' own configs and tokenizer are read from where the settings say. Shape letters: B pictures or texts, N patch
tokens, M text tokens, W a tower's width, d embedding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from samer.config import InputError
from samer.data.records import ImageRecord
from samer.retrievers.base import Projector
from samer.retrievers.pretrained import TowerConfig, load_towers, text_positions, tower_grid, tower_hash, tower_width
from samer.retrievers.towers import TowerProcessor
from samer.runtime.files import atomic_path, read_json, write_json
from samer.runtime.shards import mapped, unreadable
from samer.seps.head import Head, Images, Texts
from samer.seps.inputs import LiveInputs, StoredInputs
from samer.seps.settings import HeadSettings, SepsConfig, SepsTowers
from samer.settings import build_dataclass

MODEL_TYPE = "samer_seps"
WHERE = ("vision", "text", "vision_revision", "text_revision", "image_size")  # of towers, as TowerConfig has them


class Seps(nn.Module):
    """Encodes pictures and texts, and scores their pairs by its head."""

    def __init__(
        self, config: SepsConfig, vision: nn.Module | None, text: nn.Module | None, stored: tuple[int, int] = (0, 0)
    ) -> None:
        """Takes both towers, or none and the number of tokens and the width that a store has.

        Raises:
            InputError: a tower that gives no patch tokens of that size.
        """
        super().__init__()
        self.config, self.specials = config, 0
        self.vision, self.text = vision, text
        tokens, widths = stored[0], (stored[1], stored[1])
        if vision is not None:
            side, self.specials = tower_grid(vision, config.towers.image_size)
            tokens, widths = side * side, (tower_width(vision), tower_width(text))
        size = config.towers.embed_size
        make = lambda width: nn.Identity() if width == size else nn.Linear(width, size)
        self.vision_projection, self.text_projection = make(widths[0]), make(widths[1])
        self.head = Head(config.seps, tokens, size)
        self.frozen = not config.train.tower_rate
        if vision is not None:
            for tower in (vision, text):
                tower.requires_grad_(not self.frozen)

    @property
    def device(self) -> torch.device:
        return next(self.head.parameters()).device

    def train(self, mode: bool = True) -> Seps:
        """As of any module; frozen towers stay as at evaluation."""
        super().train(mode)
        if self.frozen and self.vision is not None:
            self.vision.eval(), self.text.eval()
        return self

    def towers(self) -> list[nn.Parameter]:
        """The towers' parameters that train."""
        parts = [] if self.vision is None else [*self.vision.parameters(), *self.text.parameters()]
        return [parameter for parameter in parts if parameter.requires_grad]

    def trained(self) -> dict[str, nn.Parameter]:
        """All parameters that train."""
        return {name: each for name, each in self.named_parameters() if each.requires_grad}

    def encode_images(self, inputs: dict[str, Tensor]) -> Images:
        """Patch tokens of pictures, projected, and [CLS] where the tower has one."""
        with self._precision():
            if self.vision is None:
                states = self.vision_projection(inputs["hidden"].to(self.device))
            else:
                more = {}
                if "interpolate_pos_encoding" in inspect.signature(self.vision.forward).parameters:
                    more["interpolate_pos_encoding"] = True
                found = self.vision(pixel_values=inputs["pixel_values"].to(self.device), **more)
                states = self.vision_projection(found.last_hidden_state)
        states = states.float()
        return Images(states[:, self.specials :], states[:, 0] if self.specials else None)

    def encode_texts(self, inputs: dict[str, Tensor]) -> Texts:
        """All tokens of texts, projected; [CLS] and [SEP] are words like any other."""
        mask = inputs["attention_mask"].to(self.device)
        with self._precision():
            if self.text is None:
                states = inputs["hidden"].to(self.device)
            else:
                states = self.text(input_ids=inputs["input_ids"].to(self.device), attention_mask=mask).last_hidden_state
            states = self.text_projection(states)
        return Texts(states.float(), mask.bool())

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.bf16)


@torch.no_grad()
def _start(projection: nn.Module, base: Projector) -> None:
    """Starts a projection from the retriever's own, which joins both sides already."""
    if isinstance(projection, nn.Linear):
        projection.weight.copy_(base.weight)
        projection.bias.copy_(torch.zeros(len(base.weight)) if base.bias is None else base.bias)


def make_model(
    config: SepsConfig, device: torch.device, records: Sequence[ImageRecord]
) -> tuple[Seps, LiveInputs | StoredInputs]:
    """A model whose towers are those of the settings, with a new head, and what feeds it.

    On the features of a retriever whose projection has the asked width, both projections start from that one (ours).

    Args:
        config: the settings.
        device: to compute on.
        records: of which a stored one tells the number of tokens.

    Raises:
        InputError: towers or features that can't be used.
    """
    if config.data.features:
        inputs = StoredInputs(config.data.features, device)
        tokens = inputs.pictures(records[:1])["hidden"].shape[1]
        model = Seps(replace(config, train=replace(config.train, tower_rate=0.0)), None, None, (tokens, inputs.width))
        base = inputs.store.base_projector
        if tuple(base.weight.shape) == (config.towers.embed_size, inputs.width):
            for projection in (model.vision_projection, model.text_projection):
                _start(projection, base)
        return model.to(device), inputs
    where = TowerConfig(**{name: getattr(config.towers, name) for name in WHERE})
    vision, text = load_towers(where)
    tokenizer = TowerProcessor.of_towers(where).tokenizer
    workers = LiveInputs(
        tokenizer, config.towers.image_size, text_positions(text), config.train.augment, config.data.workers
    )
    return Seps(config, vision, text).to(device), workers


def made_of(model: Seps, inputs: LiveInputs | StoredInputs) -> dict[str, str]:
    """Hashes of what the model stands on: of the towers' files, or of the model that a store is of."""
    if isinstance(inputs, StoredInputs):
        return {"stored": inputs.weights}
    towers = model.config.towers
    return {kind: tower_hash(getattr(towers, kind), getattr(towers, f"{kind}_revision")) for kind in ("vision", "text")}


def save_model(folder: Path, model: Seps, inputs: LiveInputs | StoredInputs) -> None:
    """Writes a folder that `load_model` reads, the config last; towers that did not train are left out."""
    frozen = ("vision.", "text.") if model.frozen else ()
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        temporary.write_bytes(save({name: value for name, value in state.items() if not name.startswith(frozen)}))
    config = model.config
    facts = {"made_of": made_of(model, inputs), "frozen": model.frozen, "bf16": config.train.bf16}
    content = {"model_type": MODEL_TYPE, "towers": asdict(config.towers), "seps": asdict(config.seps), **facts}
    write_json(folder / "config.json", content)


def load_model(
    folder: str | Path, config: SepsConfig, device: torch.device, records: Sequence[ImageRecord]
) -> tuple[Seps, LiveInputs | StoredInputs]:
    """A trained model, and what feeds it.

    Args:
        folder: of it.
        config: whose data settings count.
        device, records: as of `make_model`.

    Raises:
        InputError: no model, of other towers or features, or damaged.
    """
    path = Path(folder) / "config.json"
    content = read_json(path)
    if content.get("model_type") != MODEL_TYPE:
        raise InputError(f"{path}: no SEPS model; name a folder that scripts/seps_train.py wrote")
    if stored := "stored" in content["made_of"]:
        if not config.data.features:
            raise InputError(f"{folder}: was trained on stored features; give a store of the same as data.features")
    elif config.data.features:
        raise InputError(f"{folder}: has towers of its own; leave data.features out")
    train = replace(config.train, tower_rate=0.0 if content["frozen"] else 1.0, bf16=content["bf16"])
    towers = build_dataclass(SepsTowers, content["towers"], str(path))
    config = replace(config, towers=towers, seps=build_dataclass(HeadSettings, content["seps"], str(path)), train=train)
    model, inputs = make_model(config, device, records)
    for kind, made in content["made_of"].items():
        now = made_of(model, inputs)[kind]
        if (stored or content["frozen"]) and made and now and made != now:
            raise InputError(f"{folder}: was trained on other files of {kind} than those that are there; restore them")
    _fill(model, Path(folder) / "model.safetensors")
    return model.eval(), inputs


def _fill(model: Seps, path: Path) -> None:
    try:
        with mapped(path) as handle:
            found = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(path, error, "train it again") from None
    try:
        lacking, unknown = model.load_state_dict(found, strict=False)
    except RuntimeError as error:  # sizes
        raise InputError(f"{path}: {' '.join(str(error).split())[:200]}; config.json is of another model") from None
    lacking = [name for name in lacking if not (model.frozen and name.startswith(("vision.", "text.")))]
    if lacking or unknown:
        raise InputError(f"{path}: lacks {lacking[:3]} and has {unknown[:3]} besides; config.json is of another model")
