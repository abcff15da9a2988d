"""Any retriever of the family in transformers: loading, and hidden states of images and texts.

Shape letters: B images, N tokens per image, M query tokens, H hidden."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
from PIL import Image
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from samer.config import InputError, ReduceConfig
from samer.data.pictures import load_image
from samer.data.records import ImageRecord
from samer.reducers.calibration import with_statistics
from samer.reducers.running import Reduced
from samer.retrievers import Family, find_family
from samer.retrievers.attention import NoSignals, check_signals, column_sums, signal_layers, window_of
from samer.retrievers.base import Encoder, image_seeds, projector_of
from samer.retrievers.checks import check_model
from samer.retrievers.family import STATES, RefusedPicture
from samer.retrievers.identity import ModelIdentity, check_files, fingerprint, model_folder, processor_hash
from samer.retrievers.reduction import reduced_inputs
from samer.runtime.files import FileTrouble, is_dir, is_file, read_json
from samer.runtime.hub import NAME_A_MODEL, is_hub_id, model_name, refused_file
from samer.tokens import ImageLayout

COMPILED = "compiled"  # in what `origin` says of a model that torch has compiled


class Retriever(Encoder):
    """A frozen retriever: images and texts to hidden states, those to unit tokens through a projector.

    Hidden states are what the projection layer is given while the whole model runs, whatever lies before it; they are
    seen by hooks in the model, so one thread at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        name: str,
        *,
        revision: str = "main",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Takes a model of a family in `samer.retrievers.FAMILIES` and its processor.

        Args:
            model: of transformers; frozen, and left in `dtype`.
            processor: of the same checkpoint.
            name: of the checkpoint.
            revision: of the checkpoint.
            dtype: to compute hidden states in; None: as the model is.

        Raises:
            InputError: a model of no family, or a processor of another checkpoint.
        """
        config = {"architectures": [type(model).__name__], "model_type": model.config.model_type}
        self.family: Family = find_family(config)(model, processor)
        self.processor = processor
        layer = model.get_submodule(self.family.projection)
        base = projector_of(layer)  # its stored values, so that its hash does not depend on dtype
        # The layer goes along: a forward pass casts what the layer is given to the dtype of its weights. Buffers stay:
        # rotary frequencies in bfloat16 would turn the thousandth token by up to two radians too much or too little.
        dtype = dtype or model.dtype
        for weight in model.parameters():
            weight.data = weight.data.to(dtype)
        self.model = model.eval().requires_grad_(False)
        self._layer = layer
        super().__init__(
            name, base, grid=self.family.grid, image_token_id=self.family.image_token_id, device=model.device
        )
        self.revision = revision
        self.projection_layer = self.family.projection
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
        revision: str = "main",
        pictures: bool = True,
    ) -> Retriever:
        """Loads a retriever in transformers format, e.g. `vidore/colpali-v1.3-hf`, or a folder.

        Args:
            name: on the hub, or a folder, whose real path becomes the retriever's name.
            dtype: to compute hidden states in.
            device: to compute on.
            local_files_only: don't ask the hub.
            revision: of the model on the hub: a branch, tag or commit.
            pictures: False: it is for texts alone, and is not tried on pictures (`checks.check_model`).

        Raises:
            InputError: not found, of no known family, weights that the checkpoint does not hold, or a model that does
                not tell two pictures apart (`checks.check_model`).
        """
        if not sys.stderr.isatty():
            disable_progress_bar()  # its bar would fill a log file
        name = model_name(name)
        where = {"local_files_only": local_files_only, "revision": revision}
        folder, offline = model_folder(name, revision), local_files_only or HF_HUB_OFFLINE
        if folder:
            check_files(folder, whole=offline or is_dir(name))
        try:
            here = folder and is_file(folder / "config.json")
            found = read_json(folder / "config.json") if here else PretrainedConfig.get_config_dict(name, **where)[0]
            family = find_family(found)
            model, report = family.model_class().from_pretrained(
                name,
                # float32 from the start: halves cast up would keep Gemma's embedding scale rounded
                dtype=torch.float32 if dtype == torch.float32 else "auto",
                attn_implementation="sdpa",  # else a config could name a kernel to fetch from the hub
                use_safetensors=True,  # never a pickle
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come out in the report, and are refused by name below
                **where,
            )
            processor = family.load_processor(name, **where)
        except Exception as error:  # many types, bare ones from tokenizers
            if found := refused_file(error):
                raise found from None
            reason = " ".join(str(error).split())[:240]
            if not folder and offline and is_hub_id(name):
                reason = f"not in {HF_HUB_CACHE}; HF_HUB_OFFLINE or model.local_files_only forbids to ask the hub"
            if not folder:
                reason = f"no such folder here, and not to be had from the hub: {reason}"
            raise InputError(f"model {name!r} can't be loaded ({reason}); {NAME_A_MODEL}") from None
        lost = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
        if lost:
            raise InputError(
                f"model {name!r} lacks {len(lost)} weights or has them in another size, first {lost[0]}; "
                "they would be random. "
                "Use a checkpoint made for this transformers version"
            )
        retriever = cls(model.to(device), processor, name, revision=revision, dtype=dtype)
        check_model(retriever, pictures)
        return retriever

    @property
    def tower(self) -> nn.Module:
        """The vision tower, where it can be reduced.

        Raises:
            InputError: a family where it can't.
        """
        if self.family.vision_tower is None:
            raise InputError(
                f"the vision tower of a {self.family.architecture} can't be reduced; that of ColPaliForRetrieval and "
                "that of a tower retriever can"
            )
        return self.family.vision_tower

    @torch.no_grad()
    def see(self, records: Sequence[ImageRecord]) -> Tensor:
        """What the vision tower gives for pictures, patch tokens alone, (B, P, W)."""
        return self.family.see(self.record_inputs(records))

    def use_reduction(self, settings: ReduceConfig) -> None:
        """Has the vision tower run on fewer tokens from now on; it is tried on two small pictures.

        Raises:
            InputError: a family whose tower can't be reduced, settings that do not fit it, or statistics of another.
        """
        settings = with_statistics(settings, self.tower)
        Reduced(self.tower, settings)
        self.reduction = settings
        check_model(self)

    def compile(self) -> None:
        """Has torch compile the towers, when they are first used; hidden states then differ in their last bits.

        What is made of them says so in `origin`, so that it is not mixed with what the model gives as it is.

        Raises:
            InputError: its tower is reduced, whose layers change from call to call; no compiler.
        """
        compilers = os.environ.get("CXX"), "g++", "clang++", "cl"
        if self.device.type == "cpu" and not any(name and shutil.which(name) for name in compilers):
            raise InputError("--compile needs a C++ compiler on a CPU; install g++, or leave it out")
        if self.reduction.method != "none":
            raise InputError(f"{self.name}: its vision tower is reduced, and can't be compiled; leave one of both out")
        for module in self.family.compiled:
            module.compile()
        self.origin = {**self.origin, "computed_in": f"{self.origin['computed_in']} {COMPILED}"}

    @cached_property
    def identity(self) -> ModelIdentity:
        """What the tokens depend on; the files are hashed when somebody asks, if they are on this machine."""
        known = identify(self.name, self.revision) or ModelIdentity()
        return ModelIdentity(self.family.architecture, known.weights, known.processor, self.base_projector.hash)

    @property
    def notes(self) -> list[str]:
        """As `Family.notes`."""
        return self.family.notes

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """Width and height that pictures are scaled to, for `load_image`; None: that depends on the picture."""
        return self.family.picture_size

    @property
    def processing(self) -> dict[str, str]:
        """As `Family.processing`."""
        return self.family.processing

    def picture(self, record: ImageRecord) -> Image.Image | None:
        """The image, decoded no larger than the processor asks for."""
        return load_image(record.image_path, self.picture_size)

    def record_inputs(
        self, records: Sequence[ImageRecord], pictures: Sequence[Image.Image] | None = None
    ) -> dict[str, Tensor]:
        """Loads and prepares a batch of images, everything the model needs."""
        try:
            inputs = self.image_inputs(pictures or [self.picture(record) for record in records])
        except RefusedPicture as error:
            raise InputError(f"{records[error.number].image_path}: it {error.reason}") from None
        return {**inputs, "seeds": image_seeds(records)}

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Everything the model needs of a batch of RGB images."""
        return self.family.image_inputs(images)

    def query_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Everything the model needs of a batch of queries, and `offsets`."""
        if isinstance(texts, str):
            raise InputError("query_inputs takes a list of texts; a single text would be read letter by letter")
        return self.family.query_inputs(texts)

    @torch.no_grad()
    def reduced(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Encoder.reduced`."""
        if self.reduction.method == "none" or STATES in inputs:
            return inputs
        return reduced_inputs(self.family, self.reduction, inputs)

    def image_layout(self, inputs: dict[str, Tensor]) -> ImageLayout:
        """As `Encoder.image_layout`; the family knows the grids, a reducer what is left of them."""
        if "source" in inputs:
            return ImageLayout(*(inputs[name] for name in ("coords", "patches", "grid", "source")))
        try:
            return self.family.layout(inputs)
        except InputError as error:
            raise InputError(f"{self.name}: {error}; processor and model do not belong together") from None

    @torch.no_grad()
    def hidden_states(self, inputs: dict[str, Tensor]) -> Tensor:
        """Last hidden states, what the projection is applied to (METHOD section 1).

        Args:
            inputs: from `image_inputs` or `query_inputs`, forwarded whole (`token_type_ids` keeps attention full).

        Returns:
            (B, N, H) in the model's dtype, without gradient; 0 at padding.

        Raises:
            InputError: a non-finite value at a valid position.
        """
        with _given_to(self._layer, self.family.backbone) as seen:
            self.model(**self.family.model_inputs(inputs))
        (hidden,) = seen
        # padding may hold anything (a fully masked row is NaN); valid positions may not
        hidden = torch.where(inputs["attention_mask"].to(hidden.device).bool()[..., None], hidden, 0)
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
        config, modules = self.family.attentions
        count = len(modules)
        check_signals(needs, count, windowed=count < getattr(config, "num_hidden_layers", count))
        windows = {name: window for name in needs if (window := window_of(name))}
        layers = signal_layers(count)
        hidden, sums = self._columns(inputs, {*layers, *(k for _, own in windows.values() for k in own)})
        *middle, last = (sums[layer] for layer in layers)
        signals = {
            "middle_mean": torch.stack([columns.mean(1) for columns in middle]).mean(0),
            "middle_max": torch.stack([columns.amax(1) for columns in middle]).mean(0),
            "last": last.mean(1),
        }
        for name, (heads, own) in windows.items():
            parts = [sums[layer].mean(1) if heads == "mean" else sums[layer].amax(1) for layer in own]
            signals[name] = torch.stack(parts).mean(0)
        return hidden, {name: signals[name] for name in needs}

    def layer_attention(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states (B, N, H), and what patches receive from patches in each layer, (L, B, N), mean of heads."""
        count = len(self.family.attentions[1])
        hidden, sums = self._columns(inputs, set(range(count)))
        return hidden, torch.stack([sums[layer].mean(1) for layer in range(count)])

    def _columns(self, inputs: dict[str, Tensor], layers: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden states, and column sums (B, heads, N) by layer."""
        lacking = [name for name in self.family.required if name not in inputs]
        if lacking:
            raise InputError(f"attention signals need all that the processor returns, {lacking[0]} too")
        if STATES in inputs and self.family.vision_tower is self.family.backbone:
            raise NoSignals(f"{self.name}: a reduced vision tower has no attention between patches; leave reduce out")
        patches = self.image_layout(inputs).patches.to(self.device)
        config, attentions = self.family.attentions
        with column_sums(config, attentions, sorted(layers), self.family.attended(patches)) as sums:
            hidden = self.hidden_states(inputs)
        return hidden, {layer: columns[..., -patches.shape[1] :] for layer, columns in sums.items()}


def identify(name: str, revision: str = "main") -> ModelIdentity | None:
    """A model's identity by its files alone, without its projection; None: they are not on this machine.

    Raises:
        InputError: its files are damaged, or it is of no known family.
    """
    folder = model_folder(name, revision)
    if folder is None or not is_file(folder / "config.json"):
        return None
    try:
        family = find_family(read_json(folder / "config.json"))
    except FileTrouble:
        raise
    except InputError as error:
        raise InputError(f"model {name!r}: {error}") from None
    found = fingerprint(folder)
    weights = family.weights_hash(folder, found.weights)
    return ModelIdentity(family.architecture, weights, processor_hash(found.processor, family.settings))


@contextmanager
def _given_to(layer: nn.Module, backbone: nn.Module):
    """Within the block, a list of what `layer` is given, call by call.

    Meanwhile `backbone` is not asked for the hidden states of all its layers, which transformers' retrieval classes do
    ask for and drop: at 32 images of 1,030 tokens those of ColPali's 18 layers take 2.4 GB in bfloat16.
    """
    seen: list[Tensor] = []

    def note(_, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])

    def spare(_, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        return (arguments, {**keywords, "output_hidden_states": False}) if "output_hidden_states" in keywords else None

    hooks = layer.register_forward_pre_hook(note), backbone.register_forward_pre_hook(spare, with_kwargs=True)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
