"""ColPali of transformers: loading, and hidden states of images and texts.

Shape letters: B images, N tokens per image, M query tokens, H hidden."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    ColPaliForRetrieval,
    ColPaliProcessor,
    PretrainedConfig,
)
from transformers.masking_utils import sdpa_mask
from transformers.utils.logging import disable_progress_bar

from samer.config import InputError
from samer.data.pictures import load_image
from samer.data.records import ImageRecord
from samer.retrievers.attention import _COLUMNS, _columns_attention, check_signals, column_sums, signal_layers
from samer.retrievers.base import NO_OFFSET, Encoder, Projector, image_seeds

_BESIDE = ("seeds", "offsets")  # in the inputs for our own use; the model is not given them


class Retriever(Encoder):
    """A frozen ColPali: images and texts to hidden states, those to unit tokens through a projector."""

    def __init__(self, model: ColPaliForRetrieval, processor: ColPaliProcessor, name: str) -> None:
        self.processor = processor
        self.model = model.eval().requires_grad_(False)
        layer, vision = model.embedding_proj_layer, model.config.vlm_config.vision_config
        side = vision.image_size // vision.patch_size
        super().__init__(
            name,
            Projector(*(t.detach().float().cpu().clone() for t in (layer.weight, layer.bias))),
            grid=(side, side),
            image_token_id=model.config.vlm_config.image_token_id,
            device=model.device,
        )
        self.origin = {"computed_in": str(model.dtype).removeprefix("torch."), "stored_in": "nothing"}
        ours, theirs = self.image_token_id, processor.image_token_id
        if ours != theirs:
            raise InputError(
                f"{name}: the model's image token is {ours}, the processor's {theirs}; "
                "they belong to different checkpoints"
            )

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        local_files_only: bool = False,
    ) -> Retriever:
        """Loads a ColPali in transformers format, e.g. `vidore/colpali-v1.3-hf`, or a folder.

        Raises:
            InputError: not found, another architecture, or weights that the checkpoint does not hold.
        """
        if not sys.stderr.isatty():
            disable_progress_bar()  # its bar would fill a log file
        try:
            kind = PretrainedConfig.get_config_dict(name, local_files_only=local_files_only)[0].get("model_type")
            if kind != "colpali":  # transformers would build a random model of the default size, gigabytes, first
                raise ValueError(f"its config.json is of model type {kind!r}, not 'colpali'")
            model, report = ColPaliForRetrieval.from_pretrained(
                name,
                # float32 from the start: halves cast up would keep Gemma's embedding scale rounded
                dtype=torch.float32 if dtype == torch.float32 else "auto",
                attn_implementation="sdpa",  # else a config could name a kernel to fetch from the hub
                use_safetensors=True,  # never a pickle
                local_files_only=local_files_only,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come out in the report, and are refused by name below
            )
            processor = ColPaliProcessor.from_pretrained(name, local_files_only=local_files_only)
        except Exception as error:  # many types, bare ones from tokenizers
            reason = " ".join(str(error).split())[:240]
            raise InputError(
                f"model {name!r} can't be loaded ({reason}); name a ColPali in transformers format, such as "
                "vidore/colpali-v1.3-hf, or a folder that holds one"
            ) from None
        lost = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
        if lost:
            raise InputError(
                f"model {name!r} lacks {len(lost)} weights or has them in another size, first {lost[0]}; "
                "they would be random. "
                "Use a checkpoint made for this transformers version"
            )
        model.vlm.to(dtype)  # the projection keeps its stored values, so its hash does not depend on dtype
        return cls(model.to(device), processor, name)

    def record_inputs(self, records: Sequence[ImageRecord]) -> dict[str, Tensor]:
        """Loads and prepares a batch of images, everything the model needs."""
        inputs = self.image_inputs([load_image(record.image_path) for record in records])
        return {**inputs, "seeds": image_seeds(records)}

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Everything the model needs of a batch of RGB images; labels, which retrieval has no use for, are left out."""
        inputs = self.processor(images=list(images))
        return {name: value for name, value in inputs.items() if name != "labels"}

    def query_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Everything the model needs of a batch of queries, and `offsets`."""
        if isinstance(texts, str):
            raise InputError("query_inputs takes a list of texts; a single text would be read letter by letter")
        marked = [text for text in texts if self.processor.image_token in text]
        if marked:
            raise InputError(f"query {marked[0][:80]!r} holds {self.processor.image_token}, which stands for an image")
        inputs = dict(self.processor(text=list(texts), return_offsets_mapping=True))
        # the processor writes <bos>, a prefix, the text, augmentation tokens
        before = len(self.processor.tokenizer.bos_token) + len(self.processor.query_prefix)
        lengths = torch.tensor([len(text) for text in texts])
        offsets = inputs.pop("offset_mapping") - before  # (B, M, 2)
        first, last = offsets.clamp(min=0).minimum(lengths[:, None, None]).unbind(-1)
        inputs["offsets"] = torch.where((first < last)[..., None], torch.stack([first, last], -1), NO_OFFSET)
        return inputs

    @torch.no_grad()
    def hidden_states(self, inputs: dict[str, Tensor]) -> Tensor:
        """Last hidden states, what the projection is applied to (METHOD section 1).

        Args:
            inputs: from `image_inputs` or `query_inputs`, forwarded whole (`token_type_ids` keeps attention full).

        Returns:
            (B, N, H) in the model's dtype, without gradient.

        Raises:
            InputError: a non-finite value at a valid position.
        """
        inputs = {name: value.to(self.device) for name, value in inputs.items() if name not in _BESIDE}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        hidden = self.model.vlm(**inputs, use_cache=False).last_hidden_state
        # padding may hold anything (a fully masked row is NaN); valid positions may not
        hidden = torch.where(inputs["attention_mask"].bool()[..., None], hidden, 0)
        if not torch.isfinite(hidden.sum()):
            rows = (~torch.isfinite(hidden.float().sum((1, 2)))).nonzero()
            if len(rows):
                raise InputError(
                    f"{self.name} gave NaN or infinite features for item {int(rows[0])} of a batch; "
                    "use bfloat16 or float32 instead of float16"
                )
        return hidden

    def image_states(self, inputs: dict[str, Tensor], needs: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Encoder.image_states`; attention is read layer by layer, an image at a time, and never kept."""
        if not needs:
            return self.hidden_states(inputs), {}
        check_signals(needs)
        if "token_type_ids" not in inputs:  # the model would turn causal without a mask that says so
            raise InputError("attention signals need all that the processor returns, token_type_ids too")
        patches = (inputs["input_ids"] == self.image_token_id).to(self.device)  # padding holds another id
        layers = self.model.vlm.language_model.layers
        with column_sums(self.model.vlm.language_model, signal_layers(len(layers)), patches) as sums:
            hidden = self.hidden_states(inputs)
        *middle, last = (sums[layer] for layer in signal_layers(len(layers)))
        signals = {
            "middle_mean": torch.stack([columns.mean(1) for columns in middle]).mean(0),
            "middle_max": torch.stack([columns.amax(1) for columns in middle]).mean(0),
            "last": last.mean(1),
        }
        return hidden, {name: signals[name] for name in needs}


AttentionInterface.register(_COLUMNS, _columns_attention)


AttentionMaskInterface.register(_COLUMNS, sdpa_mask)
