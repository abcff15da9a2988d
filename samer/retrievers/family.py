"""What differs between the retrievers of one family: where their projection is, and what their tokens stand for.

Shape letters: B images, N tokens per image, M query tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from samer.config import InputError
from samer.coords import grid_layout
from samer.retrievers.base import NO_OFFSET
from samer.tokens import ImageLayout

STATES = "vision_states"  # in the inputs where a reduced vision tower has run already: (B, P or fewer, W)
# in the inputs for our own use; a model is not given them
BESIDE = ("seeds", "offsets", STATES, "layer_tokens", "coords", "patches", "grid", "source")


class RefusedPicture(InputError):
    """A picture that the model can't be given.

    Attributes:
        number: of the picture in its batch.
        reason: what is wrong with it.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"picture {number} of the batch {reason}")
        self.number, self.reason = number, reason


class Family:
    """One architecture of transformers as a retriever: subclass it, and add it to `samer.retrievers.FAMILIES`.

    What is written here is what most have in common: tokens of a picture are those of `image_token_id`, and the grid of
    a picture has as many cells. One whose tokens stand elsewhere (tiles, a view of the whole) overrides `layout`.

    Attributes:
        architecture: name of its class in transformers, as config.json's `architectures` has it.
        processor_class: name of its processor's class there.
        model_type: as config.json has it.
        projection: dotted name of the layer from hidden states to embeddings.
        options: what a forward pass is told besides the inputs.
        required: inputs without which the attention would be another.
        settings: what is fixed beside the processor's files; "backend" names the picture pipeline.
        grid: rows and columns, where all images have the same; else None.
    """

    architecture: str = ""
    processor_class: str = ""
    model_type: str = ""
    projection: str = "embedding_proj_layer"
    options: Mapping[str, Any] = {"use_cache": False}
    required: Sequence[str] = ()
    settings: Mapping[str, Any] = {"backend": "pil"}
    grid: tuple[int, int] | None = None

    def __init__(self, model: nn.Module, processor: Any) -> None:
        """Keeps both; a subclass may read off what it needs."""
        self.model, self.processor = model, processor

    @classmethod
    def model_class(cls) -> Any:
        """The model's class, with transformers' `from_pretrained`."""
        import transformers  # takes seconds, and most of SaMer does without

        return getattr(transformers, cls.architecture)

    @classmethod
    def load_processor(cls, name: str, **where: Any) -> Any:
        """The processor of a checkpoint, with the picture pipeline that `settings` names.

        transformers would take torchvision's where that is installed, and the pixels would come out otherwise.

        Raises:
            ValueError: there is no such pipeline for it. OSError and others: of transformers.
        """
        import transformers

        processor = getattr(transformers, cls.processor_class).from_pretrained(name, **where)
        backend = cls.settings["backend"]
        pictures = transformers.AutoImageProcessor.from_pretrained(name, backend=backend, **where)
        if pictures.backend != backend:
            raise ValueError(f"there is no {backend} picture pipeline for it")
        processor.image_processor = pictures
        return processor

    @classmethod
    def weights_hash(cls, folder: Path, files: str) -> str:
        """Hash of what tokens depend on in a model's files but its processor: `files`, that of the files themselves."""
        return files

    @property
    def image_token_id(self) -> int:
        """What stands at an image's patches in `input_ids`, by the model's config."""
        return self.model.config.vlm_config.image_token_id

    @property
    def backbone(self) -> nn.Module:
        """What runs before the projection."""
        return self.model.vlm

    @property
    def vision_tower(self) -> nn.Module | None:
        """What sees the pictures, where a reducer can work in it; None: not in this family."""
        return None

    def see(self, inputs: dict[str, Tensor]) -> Tensor:
        """The vision tower's patch tokens of pictures, (B, P, W), or what a reducer leaves of them."""
        raise NotImplementedError

    @property
    def language_model(self) -> nn.Module:
        """What follows the vision tower."""
        return self.backbone.language_model

    @property
    def compiled(self) -> list[nn.Module]:
        """What torch compiles where that is asked for: where nearly all of the time goes."""
        return [each for each in (self.vision_tower, self.language_model) if each is not None]

    @property
    def attentions(self) -> tuple[Any, list[nn.Module]]:
        """What gives the attention signals: a config that says how attention is computed, and each layer's module."""
        model = self.language_model
        return model.config, [layer.self_attn for layer in model.layers]

    def whole_attention(self, config: Any, attentions: Sequence[nn.Module]) -> list[nn.Module]:
        """Those of a language model's layers that see the whole sequence, where others see a window of it.

        Args:
            config: of the language model; its `layer_types` name each layer's attention.
            attentions: each layer's module.
        """
        return [each for each, kind in zip(attentions, config.layer_types, strict=True) if kind == "full_attention"]

    def attended(self, patches: Tensor) -> Tensor:
        """Patches among the tokens that `attentions` see, of those among an image's N tokens, which are the last N."""
        return patches

    @property
    def notes(self) -> list[str]:
        """What is to be said once a long job is done, such as how many texts were cut."""
        return []

    @property
    def query_start(self) -> int:
        """How many characters the processor writes before a query's text."""
        return len(self.processor.query_prefix)

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """Width and height that the processor scales every picture to; None: that depends on the picture.

        Pictures are read no larger than that asks for (data.decoding).
        """
        pictures = getattr(self.processor, "image_processor", None)
        size = getattr(pictures, "size", None) or {}
        if not getattr(pictures, "do_resize", False) or not size.get("width") or not size.get("height"):
            return None
        return size["width"], size["height"]

    @property
    def processing(self) -> dict[str, str]:
        """What the processor does, for people to read: the picture pipeline, its sizes, prompts, the side of padding.

        Whether two are the same is told by the hash of its files and of `settings`, which covers all of it.
        """
        pictures, tokenizer = (getattr(self.processor, name, None) for name in ("image_processor", "tokenizer"))
        size = dict(getattr(pictures, "size", None) or {})
        found = {
            **self.settings,
            "picture_size": ", ".join(f"{key} {value}" for key, value in size.items() if value is not None),
            "padding_side": getattr(tokenizer, "padding_side", ""),
            **{name: getattr(self.processor, name, "") for name in ("visual_prompt_prefix", "query_prefix")},
        }
        return {name: str(value) for name, value in found.items() if value}

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """All that the processor returns for RGB images, but labels, which retrieval has no use for."""
        inputs = self.processor(images=list(images))
        return {name: value for name, value in inputs.items() if name != "labels"}

    def text_inputs(self, texts: list[str]) -> dict[str, Tensor]:
        """All that the processor returns for texts, and `offset_mapping` (B, M, 2), which counts from the prompt on."""
        return dict(self.processor(text=texts, return_offsets_mapping=True))

    def query_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """All that the processor returns for texts, and `offsets` (B, M, 2) as in `Encoder.query_inputs`.

        Raises:
            InputError: a text that holds the image token.
        """
        token = self.processor.image_token
        marked = [text for text in texts if token in text]
        if marked:
            raise InputError(f"query {marked[0][:80]!r} holds {token}, which stands for an image")
        inputs = self.text_inputs(list(texts))
        lengths = torch.tensor([len(text) for text in texts])
        offsets = inputs.pop("offset_mapping") - self.query_start  # (B, M, 2)
        first, last = offsets.clamp(min=0).minimum(lengths[:, None, None]).unbind(-1)
        inputs["offsets"] = torch.where((first < last)[..., None], torch.stack([first, last], -1), NO_OFFSET)
        return inputs

    def model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """What the model's forward pass is given, on its device: the processor's inputs, and `options`."""
        kept = {name: value.to(self.model.device) for name, value in inputs.items() if name not in BESIDE}
        return {**kept, **self.options}

    def grids(self, inputs: dict[str, Tensor]) -> Tensor:
        """Rows and columns of each image's patches, (B, 2) long; here the one grid of all."""
        ids = inputs["input_ids"]
        return torch.tensor(self.grid, device=ids.device).expand(len(ids), 2)

    def layout(self, inputs: dict[str, Tensor]) -> ImageLayout:
        """Where each token stands, on the device of `input_ids`.

        Raises:
            InputError: an image with another number of image tokens than its grid has cells.
        """
        return grid_layout(inputs["input_ids"] == self.image_token_id, self.grids(inputs))
