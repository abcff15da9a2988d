"""What open indexes share: models, what these have read, and room on a GPU."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from samer.index.read import Index
from samer.index.settings import encoder_of
from samer.index.uploads import Uploads
from samer.retrievers.base import Encoder, Projector
from samer.search.latest import Latest
from samer.tokens import QueryTokens


class Models:
    """The models that indexes need, each loaded once, and the hidden states of the latest texts.

    What precedes the projection is the same for all indexes of a model, so a text that is asked of another index is
    projected anew but not encoded anew. One thread at a time.
    """

    def __init__(
        self,
        device: torch.device | str,
        name: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        uploads: Uploads | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            device: to encode and to search on.
            name: where the model is, if not where an index says.
            dtype: that the backbone computes in; None: as `open_encoder` chooses.
            uploads: the indexes' shards on the device; None: as many as fit.
        """
        self.device, self.name, self.dtype = torch.device(device), name, dtype
        self.uploads = Uploads() if uploads is None else uploads
        self._encoders: dict[tuple[str, str], Encoder] = {}  # by name and revision
        self._states = Latest(32)  # 1,000 letters of ColPali take 8 MB, a usual query 0.2 MB

    def load(self, index: Index) -> Encoder:
        """The model of an index.

        Raises:
            InputError: it can't be loaded, or it is another one than the index was made with.
        """
        key = index.model_place(self.name)
        if key in self._encoders:
            index.check_model(self._encoders[key])
        else:
            self._encoders[key] = encoder_of(index, self.device, model=self.name, pictures=False, dtype=self.dtype)
        return self._encoders[key]

    @torch.no_grad()
    def query(self, encoder: Encoder, projector: Projector, text: str) -> tuple[QueryTokens, float]:
        """Unit tokens (1, M, D) of a text through a projector, with offsets if the encoder gives them.

        Returns:
            The tokens, and milliseconds: of the projection now, and of the model when it last read the text.
        """

        def states() -> tuple[Tensor, Tensor, Tensor | None, float]:
            started = time.perf_counter()
            inputs = encoder.query_inputs([text])
            hidden = encoder.hidden_states(inputs)
            took = 1000 * (time.perf_counter() - started)
            return hidden, inputs["attention_mask"].bool().to(encoder.device), inputs.get("offsets"), took

        hidden, mask, offsets, took = self._states.get((encoder.name, encoder.revision, text), states)
        started = time.perf_counter()
        encoder.use_projector(projector)
        tokens = encoder.project(hidden)
        return QueryTokens(tokens, mask, offsets), took + 1000 * (time.perf_counter() - started)
