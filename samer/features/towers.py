"""A tower retriever whose towers' outputs come from a store: only its adapters and projection are computed.

Shape letters: B images or texts, N tokens, W a tower's width, H hidden."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from samer.config import InputError
from samer.data.records import ImageRecord
from samer.data.stamps import Stamps
from samer.features.read import FeatureStore
from samer.retrievers.attention import check_signals
from samer.retrievers.base import Projector, projector_of
from samer.retrievers.hf import Retriever
from samer.retrievers.towers import TowerProcessor, TowerRetriever, without_adapters
from samer.tokens import ImageLayout


def check_whole(store: FeatureStore) -> None:
    """Refuses outputs of a reduced tower where adapters are to be trained or computed on them.

    Raises:
        InputError: names the store.
    """
    if store.reduction.method != "none":
        raise InputError(
            f"{store.folder}: outputs of a tower reduced by {store.reduction.method}; adapters take those of the whole "
            "tower, so compute them in another folder without reduce"
        )


class StoredTowers(Retriever):
    """A `Retriever` of two towers that reads what they give from the feature store of the same without adapters.

    Its hidden states are those of the retriever itself but for what the store's dtype rounds.
    """

    def __init__(self, model: TowerRetriever, processor: TowerProcessor, name: str, store: FeatureStore) -> None:
        """Takes a model and the store of `without_adapters` of its config.

        Args:
            model: on the store's device.
            processor: of the model.
            name: of the model.
            store: of the towers' outputs.
        """
        super().__init__(model.to(store.device), processor, name)
        self.store = store
        stored = store.manifest.dtype
        self.origin = {**self.origin, "computed_in": f"{self.origin['computed_in']} from {stored} towers"}

    @classmethod
    def open(cls, retriever: Retriever, folder: str | Path) -> StoredTowers:
        """Opens a store for a loaded tower retriever.

        Raises:
            InputError: another kind of retriever, or a store of other towers.
        """
        if not isinstance(retriever.model, TowerRetriever):
            raise InputError(f"{retriever.name}: no tower retriever; --towers is for one made by scripts/align.py")
        if retriever.model.dtype != torch.float32:
            raise InputError(f"{retriever.name}: loaded in {retriever.model.dtype}; adapters compute in float32")
        with TemporaryDirectory() as bare:
            without_adapters(retriever.model.config, Path(bare))
            store = FeatureStore(folder, bare, retriever.device)
        check_whole(store)
        if retriever.reduction.method != "none":
            raise InputError(f"{folder}: its towers have run already, so reduce can't make them see less; leave it out")
        found = cls(retriever.model, retriever.processor, retriever.name, store)
        found.revision = retriever.revision
        return found

    def __getstate__(self) -> dict:
        raise TypeError("stays in its process")

    def trained_projector(self) -> Projector:
        """The model's projection as it is now."""
        return projector_of(self.model.projection)

    def check_records(self, records: Sequence[ImageRecord]) -> None:
        self.store.check_records(records)

    def contents(self, records: Sequence[ImageRecord], stamps: Stamps) -> list[str | None]:
        return self.store.contents(records, stamps)

    def compile(self) -> None:
        raise InputError(f"{self.name}: its towers have run already, so there is nothing to compile")

    def picture(self, record: ImageRecord) -> None:
        """None: no picture is looked at."""

    def record_inputs(self, records: Sequence[ImageRecord], pictures: None = None) -> dict[str, Tensor]:
        return self.store.record_inputs(records)

    def query_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self.store.query_inputs(texts)

    def image_layout(self, inputs: dict[str, Tensor]) -> ImageLayout:
        return self.store.image_layout(inputs)

    @cached_property
    def _widths(self) -> tuple[int, int]:
        return self.model.vision_adapter.width, self.model.text_adapter.width

    def tower_states(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the tower gave for what `record_inputs` or `query_inputs` read, (B, N, W) float32."""
        width = self._widths["coords" not in inputs]
        return self.store.hidden_states(inputs).float()[..., :width]

    @torch.no_grad()
    def hidden_states(self, inputs: dict[str, Tensor]) -> Tensor:
        """The adapters' outputs (B, N, H); 0 at padding."""
        states, mask = self.tower_states(inputs), inputs["attention_mask"].bool().to(self.device)
        if "coords" in inputs:
            hidden = self.model.vision_adapter(states)
        else:
            hidden = self.model.text_adapter(states, mask)
        return torch.where(mask[..., None], hidden, 0)

    def image_states(self, inputs: dict[str, Tensor], needs: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        check_signals(needs)
        _, signals = self.store.image_states(inputs, needs)
        return self.hidden_states(inputs), signals
