"""What every retriever is: an encoder of images and queries into unit tokens, and the projection in it.

Shape letters: B images, N tokens per image, Q queries, M query tokens, H hidden, D embedding."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from samer.config import InputError, ReduceConfig
from samer.coords import grid_layout
from samer.data.records import ImageRecord
from samer.data.stamps import Stamps
from samer.retrievers.identity import ModelIdentity
from samer.tokens import ImageLayout, QueryTokens, VisualTokens

NO_OFFSET = -1


@dataclass(frozen=True)
class Projector:
    """Weights of a projection: weight (D, H), bias (D,) or None, float32 on the CPU."""

    weight: Tensor
    bias: Tensor | None

    @property
    def hash(self) -> str:
        """SHA-256 over its tensors; names the projector in an index."""
        digest = hashlib.sha256()
        for tensor in self.tensors().values():
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """As a file holds them: `weight` and, where there is one, `bias`."""
        bias = {} if self.bias is None else {"bias": self.bias.contiguous()}
        return {"weight": self.weight.contiguous(), **bias}


def projector_of(layer: nn.Linear) -> Projector:
    """A layer's weights as float32 copies on the CPU."""
    weight, bias = (None if t is None else t.detach().float().cpu().clone() for t in (layer.weight, layer.bias))
    return Projector(weight, bias)


class Projection(nn.Linear):
    """The shared projection: hidden states (..., H) to unit tokens (..., D), in float32 whatever autocast says."""

    def __init__(self, projector: Projector) -> None:
        """A copy of `projector`; its parameters train unless `requires_grad_(False)`."""
        super().__init__(*projector.weight.shape[::-1], bias=projector.bias is not None)
        self.load(projector)

    def load(self, projector: Projector) -> None:
        """Takes other weights of the same sizes."""
        with torch.no_grad():
            for name, tensor in projector.tensors().items():
                getattr(self, name).copy_(tensor)

    def projector(self) -> Projector:
        """The weights as float32 copies on the CPU."""
        return projector_of(self)

    def forward(self, hidden: Tensor) -> Tensor:
        """Projects and normalises (METHOD section 1)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.normalize(super().forward(hidden.float()), dim=-1)


class Encoder:
    """What turns images and texts into unit tokens: frozen hidden states, and a projection that can be replaced.

    A subclass says where the hidden states come from: `Retriever` from the backbone, `features.FeatureStore` from disk.
    It is no `nn.Module` on purpose: whatever holds it neither trains it nor saves it.

    Attributes:
        name: of the model, on the hub or a folder.
        revision: of the model on the hub; for information.
        origin: where hidden states come from, as an index records it: {"computed_in", "stored_in"}.
        base_projector: the model's own projection.
        projection: the one in use.
        projection_layer: dotted name of that layer in the model, as adapters name it.
        grid: rows and columns, where every image has the same; else None.
        picture_size: width and height that pictures are scaled to, where it is one for all; else None.
        processing: what the processor does, as `Family.processing` says; empty where it is not known.
        reduction: how the vision tower runs on fewer tokens, with all that it depends on.
    """

    projection_layer = "embedding_proj_layer"
    picture_size: tuple[int, int] | None = None
    processing: Mapping[str, str] = MappingProxyType({})
    reduction = ReduceConfig()

    def __init__(
        self,
        name: str,
        base: Projector,
        *,
        grid: tuple[int, int] | None = None,
        image_token_id: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """What all encoders have.

        Args:
            name: of the model, on the hub or a folder.
            base: the model's own projection.
            grid: rows and columns, if every image has the same; else a subclass overrides `image_layout`.
            image_token_id: what stands at an image's patches in `input_ids`.
            device: to compute on.
        """
        self.name = name
        self.revision = "main"
        self.origin: dict[str, str] = {}
        self.base_projector = base
        self.grid = grid
        self.image_token_id = image_token_id
        self.device = torch.device(device)
        self.projection = Projection(base).to(self.device).requires_grad_(False)
        self.use_projector(base)  # which refuses values that are not finite

    @property
    def identity(self) -> ModelIdentity:
        """What the tokens depend on, as far as it is known; here the untouched projection alone."""
        return ModelIdentity(architecture=type(self).__name__, base_projector=self.base_projector.hash)

    @property
    def notes(self) -> list[str]:
        """What is to be said once a long job is done, such as how many texts were cut."""
        return []

    def compile(self) -> None:
        """Has torch compile the model; a refusal, as only an encoder that runs one can.

        Raises:
            InputError: says so.
        """
        raise InputError(f"{self.name}: hidden states come from a store, so there is no model to compile")

    def picture(self, record: ImageRecord) -> Image | None:
        """An image's picture, which `record_inputs` may be given; None: this encoder reads none. Several at a time.

        Raises:
            InputError: it can't be read.
        """
        return None

    def record_inputs(
        self, records: Sequence[ImageRecord], pictures: Sequence[Image] | None = None
    ) -> dict[str, Tensor]:
        """What `hidden_states` needs of a batch of images; has `attention_mask` (B, N) and `seeds` (B,).

        `pictures` are those of the records as `picture` gives them, where somebody has read them already.

        The mask is 0 at padding, and at prompt tokens where a family keeps patches alone.

        What `image_layout` needs is in it as well, in the base class `input_ids` (B, N).
        """
        raise NotImplementedError

    def query_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What `hidden_states` needs of a batch of queries; has `attention_mask` (B, M) and `offsets` (B, M, 2).

        Offsets are each token's first and last + 1 character in its text, -1 for tokens that are not of the text.
        """
        raise NotImplementedError

    def reduced(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of images after a reduced vision tower: with what is left, and `layer_tokens`; else as they are.

        Whoever asks for hidden states, layout and mask of images asks for this first: how many tokens an image has may
        depend on what the tower sees in it.
        """
        return inputs

    def hidden_states(self, inputs: dict[str, Tensor]) -> Tensor:
        """Last hidden states (B, N, H) without gradient, what the projection is applied to (METHOD section 1)."""
        raise NotImplementedError

    def image_states(self, inputs: dict[str, Tensor], needs: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states of images (B, N, H), and the attention signals named in `needs`, (B, N) float32 each.

        A signal is 0 at prompt tokens and padding.

        Raises:
            InputError: a signal that is not known, or not there.
        """
        if needs:
            raise InputError(f"{self.name}: no attention signal {needs[0]!r} can be had from this encoder")
        return self.hidden_states(inputs), {}

    @property
    def hidden_size(self) -> int:
        return self.base_projector.weight.shape[1]

    @property
    def embedding_dim(self) -> int:
        return self.base_projector.weight.shape[0]

    def use_projector(self, projector: Projector) -> None:
        """Replaces the projection; it computes in float32 on the model's device.

        Raises:
            InputError: sizes that differ from the base's, or non-finite values.
        """
        base = self.base_projector
        if projector.weight.shape != base.weight.shape or (projector.bias is None) != (base.bias is None):
            raise InputError(
                f"the projector is {tuple(projector.weight.shape)}, but {self.name} needs {tuple(base.weight.shape)}, "
                f"{'without' if base.bias is None else 'with'} bias; it belongs to another base model"
            )
        if not all(torch.isfinite(tensor).all() for tensor in projector.tensors().values()):
            raise InputError(f"the projector for {self.name} holds NaN or infinite values; take another checkpoint")
        self.projection.load(projector)

    def current_projector(self) -> Projector:
        """The projection in use, as float32 copies on the CPU."""
        return self.projection.projector()

    def project(self, hidden: Tensor) -> Tensor:
        """Unit tokens (..., D) in float32 of hidden states (..., H) (METHOD section 1)."""
        return self.projection(hidden)

    def check_records(self, records: Sequence[ImageRecord]) -> None:
        """Refuses records that this encoder can't give hidden states of, before any long work begins.

        Raises:
            InputError: names the first; an encoder that reads pictures finds out when it reads them.
        """

    def contents(self, records: Sequence[ImageRecord], stamps: Stamps) -> list[str | None]:
        """The content hash of each image that this encoder would encode now, None where it can't be known.

        Args:
            records: of the images.
            stamps: what is remembered of their files; takes up what had to be read.
        """
        found: list[str | None] = []
        for record in records:
            found.append(None)
            with suppress(InputError):  # who decodes the file says what is wrong with it
                found[-1] = stamps.content(record.image_id, record.image_path)
        return found

    def image_layout(self, inputs: dict[str, Tensor]) -> ImageLayout:
        """Where each token of a batch of images stands; image positions are found by token id.

        Args:
            inputs: from `record_inputs`.

        Returns:
            The layout, on the device of `input_ids`; here that of an encoder whose images all have one grid.

        Raises:
            InputError: an image with another number of image tokens than its grid has cells.
        """
        patches = inputs["input_ids"] == self.image_token_id
        grid = torch.tensor(self.grid, device=patches.device).expand(len(patches), 2)
        try:
            return grid_layout(patches, grid)
        except InputError as error:
            raise InputError(f"{self.name}: {error}; processor and model do not belong together") from None

    def encode_images(self, inputs: dict[str, Tensor], needs: Sequence[str] = ()) -> VisualTokens:
        """Images to unit tokens: every output is kept, patches and prompt (METHOD section 1).

        Args:
            inputs: from `record_inputs`.
            needs: names of attention signals to go with them.
        """
        inputs = self.reduced(inputs)
        hidden, attention = self.image_states(inputs, needs)
        layout = self.image_layout(inputs)
        coords, patches, grid, source, views = (
            value.to(self.device) for value in (layout.coords, layout.patches, layout.grid, layout.source, layout.views)
        )
        mask = inputs["attention_mask"].bool().to(self.device)
        seeds = inputs["seeds"].to(self.device) if "seeds" in inputs else None
        tokens = self.project(hidden)
        whole = bool(mask.all())
        shown = None if whole else mask
        counts = inputs.get("layer_tokens")
        return VisualTokens(tokens, coords, shown, patches, seeds, attention, grid, source, views, counts)

    def encode_queries(self, inputs: dict[str, Tensor]) -> QueryTokens:
        """Queries to unit tokens; prompt and augmentation tokens count, padding does not (METHOD section 4)."""
        mask = inputs["attention_mask"].bool().to(self.device)
        return QueryTokens(self.project(self.hidden_states(inputs)), mask, inputs.get("offsets"))


def image_seeds(records: Sequence[ImageRecord]) -> Tensor:
    """A number per image, (B,) long, that depends on its id alone."""
    digests = [hashlib.sha256(record.image_id.encode()).digest() for record in records]
    return torch.tensor([int.from_bytes(digest[:8], "little", signed=True) for digest in digests])
