"""A late-interaction retriever of two pretrained towers: one for pictures, one for text, joined by what little is
trained.

Any vision model of transformers with patch tokens (DINOv2, ViT, DeiT, SigLIP, Swin) and any text encoder. The towers
are frozen; an adapter on each (transformer layers, or none) and one shared projection are trained on pairs of picture
and caption by scripts/align.py. A folder of such a retriever holds the adapters and the projection, a few MB, and names
the towers, which are loaded from where they are:

    config.json               `TowerConfig`, with the hashes of the towers' files
    model.safetensors         adapters and projection
    preprocessor_config.json  the vision tower's, at this retriever's picture size
    tokenizer.json, ...       the text tower's

Shape letters: B images or texts, N patches, M text tokens, W a tower's width, H hidden."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from samer.config import InputError
from samer.coords import grid_layout
from samer.retrievers.attention import NoSignals
from samer.retrievers.base import NO_OFFSET
from samer.retrievers.family import STATES, Family
from samer.retrievers.identity import content_hash
from samer.retrievers.pretrained import (
    MODEL_TYPE,
    WHERE,
    TowerConfig,
    folder_of,
    load_towers,
    read_tower_config,
    text_positions,
    tower_grid,
    tower_hash,
    tower_width,
    unusable,
)
from samer.runtime.files import atomic_path, write_json
from samer.tokens import ImageLayout

NO_TOKEN = -1  # a picture's tokens have no ids


class Adapter(nn.Module):
    """What is trained on a tower: (B, N, W) -> (B, N, H).

    Transformer layers with pre-normalisation between a projection (where W is not H) and a last normalisation; without
    layers the tower's output itself, padded with zeros to H.
    """

    def __init__(self, width: int, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.widen = nn.Linear(width, hidden) if layers and width != hidden else None
        self.missing = 0 if layers else hidden - width
        if self.missing < 0:
            raise InputError(f"without an adapter's layers hidden_size must hold the tower's width {width}")
        layer = {"d_model": hidden, "nhead": heads, "dim_feedforward": 4 * hidden, "dropout": 0.0}
        make = lambda: nn.TransformerEncoderLayer(**layer, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(make() for _ in range(layers))
        self.norm = nn.LayerNorm(hidden) if layers else None

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (B, N) bool, False at padding."""
        if self.missing:
            states = nn.functional.pad(states, (0, self.missing))
        if self.widen is not None:
            states = self.widen(states)
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=None if mask is None else ~mask)
        return states if self.norm is None else self.norm(states)


class TowerRetriever(nn.Module):
    """Towers, adapters and projection; what `Retriever` asks of a model of transformers, it does as well."""

    def __init__(self, config: TowerConfig, vision: nn.Module, text: nn.Module) -> None:
        """Takes loaded towers; adapters and projection are random until a checkpoint fills them."""
        super().__init__()
        self.config = config
        self.vision_tower, self.text_tower = vision, text
        widths = tower_width(vision), tower_width(text)
        self.vision_adapter = Adapter(widths[0], config.hidden_size, config.vision_layers, config.heads)
        self.text_adapter = Adapter(widths[1], config.hidden_size, config.text_layers, config.heads)
        self.projection = nn.Linear(config.hidden_size, config.embedding_dim)
        self.side, self.specials = tower_grid(vision, config.image_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.projection.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.projection.weight.device

    def own_state(self) -> dict[str, Tensor]:
        """Adapters and projection, as a folder holds them."""
        return {name: value for name, value in self.state_dict().items() if "_tower." not in name}

    def vision_states(self, pixel_values: Tensor) -> Tensor:
        """The vision tower's patch tokens (B, N, W), row by row; its special tokens are left out."""
        more = {}
        if "interpolate_pos_encoding" in inspect.signature(self.vision_tower.forward).parameters:
            more["interpolate_pos_encoding"] = True
        found = self.vision_tower(pixel_values=pixel_values.to(self.dtype), **more).last_hidden_state
        return found[:, self.specials :]

    def text_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The text tower's tokens (B, M, W)."""
        return self.text_tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        vision_states: Tensor | None = None,
    ) -> SimpleNamespace:
        """Tokens (B, N, D), not normalised, of pictures, of what their tower gave, or of texts."""
        if pixel_values is not None:
            hidden = self.vision_adapter(self.vision_states(pixel_values))
        elif vision_states is not None:
            whole = bool(attention_mask.all())
            hidden = self.vision_adapter(vision_states, None if whole else attention_mask.bool())
        else:
            states = self.text_states(input_ids, attention_mask)
            hidden = self.text_adapter(states, attention_mask.bool())
        return SimpleNamespace(embeddings=self.projection(hidden), last_hidden_state=hidden)

    @classmethod
    def from_pretrained(
        cls, name: str, *, revision: str = "main", local_files_only: bool = False, dtype: Any = None, **_: Any
    ) -> tuple[TowerRetriever, dict]:
        """Loads a folder, or a hub id of one, and the towers that it names.

        Returns:
            The model in float32 and transformers' loading report, without a missing key.

        Raises:
            InputError: a tower that is not there or has changed, or weights that are not those of the settings.
        """
        folder = folder_of(name, revision, local_files_only)
        config = read_tower_config(folder / "config.json")
        model = cls(config, *load_towers(config, local_files_only=local_files_only))
        model.load_own(folder / "model.safetensors")
        return model, {"missing_keys": [], "mismatched_keys": []}

    def load_own(self, file: Path) -> None:
        """Fills adapters and projection from a file.

        Raises:
            InputError: not readable, or of other sizes.
        """
        try:
            with safe_open(file, framework="pt") as handle:
                found = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: not a readable safetensors file ({str(error)[:120]})") from None
        wanted = {name: tuple(value.shape) for name, value in self.own_state().items()}
        wrong = [
            name
            for name in wanted.keys() | found.keys()
            if tuple(getattr(found.get(name), "shape", ())) != wanted.get(name)
        ]
        if wrong:
            raise InputError(
                f"{file}: {sorted(wrong)[0]} is missing or has another size than the towers and config.json say"
            )
        self.load_state_dict(found, strict=False)

    def start_from(self, name: str) -> None:
        """Takes adapters, projection and temperature over from another retriever of the same towers.

        Args:
            name: a folder, or a hub id.

        Raises:
            InputError: not there, of other towers, or of other sizes.
        """
        folder = folder_of(name)
        config = read_tower_config(folder / "config.json")
        for setting in ("hidden_size", "embedding_dim", "vision_layers", "text_layers", "heads"):
            own, other = getattr(self.config, setting), getattr(config, setting)
            if own != other:
                raise InputError(f"{name} has towers.{setting}={other}, now {own}; set it alike, or start without it")
        for kind in ("vision_hash", "text_hash"):
            own, other = getattr(self.config, kind), getattr(config, kind)
            if own and other and own != other:
                raise InputError(
                    f"{name} was aligned with another {kind.removesuffix('_hash')} tower; start without it"
                )
        self.load_own(folder / "model.safetensors")
        self.config = replace(self.config, temperature=config.temperature)

    def save(self, folder: str | Path, processor: TowerProcessor) -> None:
        """Writes a folder that `from_pretrained` reads, the config last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        processor.save(folder)
        with atomic_path(folder / "model.safetensors") as temporary:
            temporary.write_bytes(save({name: value.contiguous() for name, value in self.own_state().items()}))
        write_json(folder / "config.json", asdict(self.config))


class TowerProcessor:
    """Pictures and texts as the towers take them."""

    image_token_id = NO_TOKEN

    def __init__(self, pictures: Any, tokenizer: Any, image_size: int, max_text_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.image_processor = pictures
        self.image_size = image_size
        self.max_text_tokens = min(max_text_tokens, tokenizer.model_max_length)
        self.cut: set[str] = set()  # texts that were longer

    @classmethod
    def of_towers(cls, config: TowerConfig, **where: Any) -> TowerProcessor:
        """The towers' own, told to stretch pictures to `image_size` instead of cutting them."""
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

        try:
            pictures = AutoImageProcessor.from_pretrained(
                config.vision, revision=config.vision_revision, backend="pil", **where
            )
        except Exception as error:  # many types
            raise unusable("vision", config.vision, "has no picture processor", error) from None
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.text, revision=config.text_revision, **where)
            words = AutoConfig.from_pretrained(config.text, revision=config.text_revision, **where).get_text_config()
            if len(tokenizer) < words.vocab_size / 2:  # without its files transformers makes an empty one
                raise ValueError(f"{len(tokenizer):,} words, and the model knows {words.vocab_size:,}")
        except Exception as error:
            raise unusable("text", config.text, "has no tokenizer", error) from None
        for key in ("is_local", "local_files_only"):  # how it was found, not what it is
            tokenizer.init_kwargs.pop(key, None)
        pictures.size = {"height": config.image_size, "width": config.image_size}
        pictures.do_resize, pictures.do_center_crop = True, False
        return cls(pictures, tokenizer, config.image_size, config.max_text_tokens)

    @classmethod
    def of_folder(cls, name: str, config: TowerConfig, **where: Any) -> TowerProcessor:
        """A saved retriever's."""
        from transformers import AutoImageProcessor, PreTrainedTokenizerFast

        pictures = AutoImageProcessor.from_pretrained(name, backend="pil", **where)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, **where)  # Auto's would look for the model's config
        return cls(pictures, tokenizer, config.image_size, config.max_text_tokens)

    def save(self, folder: Path) -> None:
        """Writes what `of_folder` reads."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """`pixel_values` (B, 3, S, S) float32."""
        return dict(self.image_processor(list(images), return_tensors="pt"))

    def text_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (B, M) and `offset_mapping` (B, M, 2), cut at `max_text_tokens`."""
        inputs = dict(
            self.tokenizer(
                list(texts),
                padding=True,
                truncation=True,
                max_length=self.max_text_tokens,
                return_offsets_mapping=True,
                return_attention_mask=True,  # which SigLIP's leaves out
                return_tensors="pt",
            )
        )
        inputs.pop("token_type_ids", None)
        reached = inputs["offset_mapping"][..., 1].amax(1).tolist()
        self.cut |= {text for end, text in zip(reached, texts) if end < len(text.rstrip())}
        return inputs


class Towers(Family):
    """A tower retriever as one of the family: every token of a picture is a patch, the grid is square."""

    architecture = "TowerRetriever"
    processor_class = "TowerProcessor"
    model_type = MODEL_TYPE
    projection = "projection"
    options: Mapping[str, Any] = {}

    def __init__(self, model: TowerRetriever, processor: TowerProcessor) -> None:
        super().__init__(model, processor)
        self.grid = (model.side, model.side)

    @classmethod
    def model_class(cls) -> Any:
        return TowerRetriever

    @classmethod
    def load_processor(cls, name: str, **where: Any) -> TowerProcessor:
        folder = folder_of(name, where.get("revision", "main"), where.get("local_files_only", False))
        return TowerProcessor.of_folder(str(folder), read_tower_config(folder / "config.json"))

    @classmethod
    def weights_hash(cls, folder: Path, files: str) -> str:
        """Of the towers' hashes and the trained weights: where the towers lie does not matter."""
        config = asdict(read_tower_config(folder / "config.json"))
        for name in WHERE:
            del config[name]
        own = content_hash(folder / "model.safetensors") if files else ""
        return own and hashlib.sha256(json.dumps([config, own], sort_keys=True).encode()).hexdigest()

    @property
    def image_token_id(self) -> int:
        return NO_TOKEN

    @property
    def backbone(self) -> nn.Module:
        return self.model.vision_tower

    @property
    def attentions(self) -> tuple[Any, list[nn.Module]]:
        """The vision tower's.

        Raises:
            NoSignals: one that attends within windows.
        """
        tower = self.model.vision_tower
        found = [module for module in tower.modules() if hasattr(module, "is_causal")]
        if not found or hasattr(tower.config, "window_size"):
            raise NoSignals(f"{type(tower).__name__} has no attention over the whole picture; such signals need it")
        return tower.config, found

    def attended(self, patches: Tensor) -> Tensor:
        return nn.functional.pad(patches, (self.model.specials, 0))

    @property
    def notes(self) -> list[str]:
        cut = sorted(self.processor.cut)
        if not cut:
            return []
        most = self.processor.max_text_tokens
        return [f"note: {len(cut):,} texts are longer than {most} tokens and cut there ({cut[0][:60]!r} ...)"]

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """As `Family.image_inputs`; a mask of ones stands for the patches.

        Raises:
            InputError: a picture that has less than a pixel per patch.
        """
        for number, image in enumerate(images):
            if min(image.size) < self.model.side:
                raise InputError(
                    f"picture {number} of the batch is {image.width} x {image.height} pixels, which are stretched to "
                    f"{self.model.side} x {self.model.side} patches; it is too small"
                )
        inputs = self.processor.image_inputs(images)
        return {**inputs, "attention_mask": torch.ones(len(images), self.model.side**2, dtype=torch.long)}

    def query_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        inputs = self.processor.text_inputs(texts)
        first, last = inputs.pop("offset_mapping").unbind(-1)
        inputs["offsets"] = torch.where((first < last)[..., None], torch.stack([first, last], -1), NO_OFFSET)
        return inputs

    @property
    def compiled(self) -> list[nn.Module]:
        """Both towers."""
        return [self.model.vision_tower, self.model.text_tower]

    @property
    def vision_tower(self) -> nn.Module:
        return self.model.vision_tower

    def see(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model.vision_states(inputs["pixel_values"].to(self.model.device))

    def model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        names = ("pixel_values",) if "pixel_values" in inputs else ("input_ids", "attention_mask")
        if STATES in inputs:
            names = (STATES, "attention_mask")
        return {name: inputs[name].to(self.model.device) for name in names}

    def layout(self, inputs: dict[str, Tensor]) -> ImageLayout:
        patches = inputs["attention_mask"].bool()
        return grid_layout(patches, torch.tensor(self.grid, device=patches.device).expand(len(patches), 2))


def without_adapters(config: TowerConfig, folder: Path) -> None:
    """Writes the retriever of the same towers that gives what they give, for a store of their outputs.

    What does not concern the towers is as it is by default, and the projection takes the first components: alike for
    whatever adapters follow.
    """
    where = {name: getattr(config, name) for name in WHERE}
    same = {name: getattr(config, name) for name in ("image_size", "max_text_tokens")}
    towers = load_towers(config)
    hashes = {f"{kind}_hash": tower_hash(where[kind], where[f"{kind}_revision"]) for kind in ("vision", "text")}
    bare = TowerConfig(
        **where, **same, **hashes, hidden_size=max(map(tower_width, towers)), heads=1, vision_layers=0, text_layers=0
    )
    bare = replace(bare, max_text_tokens=min(bare.max_text_tokens, text_positions(towers[1])))
    model = TowerRetriever(bare, *towers)
    with torch.no_grad():
        model.projection.weight.copy_(torch.eye(*model.projection.weight.shape))
        model.projection.bias.zero_()
    model.save(folder, TowerProcessor.of_towers(bare))
