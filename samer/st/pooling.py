"""The token pooling, behind a model or for vectors alone, and which vector stands for which patch after it.

Shape letters: B images, N tokens per image, P patches per image, K regions, D embedding, M query tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.modules import BaseTokenPooling
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig
from samer.coords import visual_coords
from samer.retrievers import Family
from samer.settings import whole_number
from samer.st.families import repair
from samer.tokens import MergedTokens, VisualTokens, regions_of_patches

AT_ONCE = 64  # images merged together where a list of embeddings is pooled
Grid = tuple[int, int]


class SamerPooling(BaseTokenPooling):
    """N token vectors of a document to K, by any compressor that needs an image's vectors and places alone.

    Behind a model (`attach`, `load`) the places of tokens are those of the model's family, batch by batch; its raw
    outputs then tell which patch went where (`similarity_map`). Handed to `encode_document(token_pooling=...)` or asked
    with `pool` it sees vectors alone: places need a grid then, and without one vectors merge by direction alone.

    This one's "hpool" reads each row of the distance matrix as a point, as ColPali's pooler does;
    `HierarchicalTokenPooling` of sentence-transformers reads the distances. The two give other vectors.
    """

    def __init__(
        self,
        num_regions: int | str = MergeConfig.num_regions,
        *,
        grid: Sequence[int] | None = None,
        tasks: str | list[str] | None = None,
        **settings: Any,
    ) -> None:
        """Takes the settings of `MergeConfig`.

        Args:
            num_regions: K, or a share of N such as "1/16".
            grid: rows and columns of every image, whose patches come first and row by row; for use without a model.
            tasks: what is pooled, as in `BaseTokenPooling`; documents.
            settings: the others of `MergeConfig`.

        Raises:
            InputError: a setting that is not there, or a compressor that needs more than vectors and places.
        """
        super().__init__(tasks=tasks)
        known = [field.name for field in fields(MergeConfig)]
        strange = [name for name in settings if name not in known]
        if strange:
            raise InputError(f"SamerPooling has no setting {strange[0]!r}; there are {', '.join(known)}, grid, tasks")
        self.merge = MergeConfig(num_regions=num_regions, **settings)
        self.grid = None if grid is None else _as_grid(grid)
        self._compress = make_compressor(self.merge)
        more = self._compress.needs or self._compress.needs_corpus or self._compress.needs_queries
        if more or self.merge.compressor == "random":
            raise InputError(
                f"compressor {self.merge.compressor!r} needs more than an image's vectors (attention, a codebook, "
                "queries or ids), which a token pooling is not given; use samer, hpool, kmeans, grid or none"
            )
        self._family: Family | None = None

    def get_config_dict(self) -> dict[str, Any]:
        """All settings, as `samer_pooling/config.json` holds them."""
        return {**asdict(self.merge), "grid": self.grid and list(self.grid), "tasks": self.tasks}

    def on_model_ready(self, model: MultiVectorEncoder) -> None:
        """Learns the family of the model it stands in, and repairs what sentence-transformers gets wrong there.

        That is ColQwen2: positions of pictures (`retrievers.colqwen2`), and prompt tokens that are no vectors of it.

        Raises:
            InputError: a family whose pictures sentence-transformers can't prepare as they must be.
        """
        self._family = repair(model)

    def forward(self, features: dict[str, Any], task: str | None = None) -> dict[str, Any]:
        """Pools a batch; adds `samer_assignments` (B, N), `samer_source` (B, P) and `samer_grid` (B, 2), all long.

        Raises:
            InputError: where tokens stand is not known: no model, and no `grid`; a document without a vector.
        """
        tokens = features["token_embeddings"]
        if not self.applies_to(task) or not len(tokens):
            return features
        mask = features["attention_mask"].bool()
        if not mask.any(1).all():
            number = int(mask.any(1).logical_not().nonzero()[0])
            raise InputError(
                f"document {number} of the batch has no vector: this model keeps those of pictures alone, and there is "
                "none in it; encode pictures by themselves"
            )
        if self._family is None or "pixel_values" not in features:  # a text has no places
            if self._family is None and self.grid is None:
                raise InputError(
                    "SamerPooling does not know where this model's tokens stand; add it with "
                    "samer.st.attach(model, pooling), or give it grid=(rows, columns)"
                )
            kept = [row[own] for row, own in zip(tokens, mask)]
            grids = [self.grid if self._family is None else (0, 0)] * len(kept)
            merged = self._merged(kept, grids)
        else:
            layout = self._family.layout(features)
            merged = self._compress(
                VisualTokens(tokens, layout.coords, mask, layout.patches, views=layout.views)  # NaN at padding is fine
            )
            features["samer_assignments"] = merged.assignments
            features["samer_source"], features["samer_grid"] = layout.source, layout.grid
        features["token_embeddings"] = merged.tokens.to(tokens.dtype)
        features["attention_mask"] = merged.mask
        return features

    def pool_one(self, embedding: Tensor, grid: Sequence[int] | None = None, **_: Any) -> Tensor:
        """Pools one image's vectors (N, D) to (K, D); see `pool`."""
        return self.pool([embedding], grid=grid)[0]

    def pool(
        self,
        embeddings: list[Tensor] | Tensor,
        *,
        task: str | None = None,
        attention_mask: Tensor | None = None,
        padding_side: str = "right",
        grid: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> list[Tensor] | Tensor:
        """Pools vectors that are there already.

        Args:
            embeddings: (N, D) of unit length each, or all of them as a padded tensor (B, N, D).
            task, attention_mask, padding_side: as in `BaseTokenPooling.pool`; a padded tensor needs its mask.
            grid: rows and columns, of all images or one pair per image; None: as given at first, and without that
                vectors merge by direction alone. Patches come first and row by row, prompt tokens behind them.

        Returns:
            As `BaseTokenPooling.pool`: a list for a list, a tensor padded on `padding_side` for a tensor.

        Raises:
            InputError: a grid of more cells than an image has vectors; a padded tensor without its mask.
        """
        if not self.applies_to(task) or not len(embeddings):
            return embeddings
        if isinstance(embeddings, Tensor):
            if attention_mask is None or embeddings.dim() != 3:
                raise InputError(
                    f"a tensor of vectors is (B, N, D) and needs its attention_mask (B, N); this one is "
                    f"{tuple(embeddings.shape)}. A list of tensors (N, D) needs none"
                )
            kept = [row[own] for row, own in zip(embeddings, attention_mask.bool())]
            rows = self.pool(kept, task=task, grid=grid)
            return pad_sequence(rows, batch_first=True, padding_side=padding_side)
        grids = self._grids(grid, len(embeddings))
        found: list[Tensor] = []
        for first in range(0, len(embeddings), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            merged = self._merged(embeddings[part], grids[part])
            found += [row[own].to(embeddings[0].dtype) for row, own in zip(merged.tokens, merged.mask)]
        return found

    def _grids(self, grid: Any, count: int) -> list[Grid]:
        """One grid per image; (0, 0) for none, which is said once."""
        grid = self.grid if grid is None else grid
        if grid is None:
            if self.merge.compressor == "grid":
                raise InputError("compressor 'grid' pools neighbours, and needs grid=(rows, columns)")
            warnings.warn(
                "SamerPooling was given vectors without a grid: they merge by direction alone, places do not count; "
                "give grid=(rows, columns), or put it behind the model with samer.st.attach",
                stacklevel=3,
            )
            return [(0, 0)] * count
        if not hasattr(grid, "__iter__") or not any(np.ndim(each) for each in grid):
            return [_as_grid(grid)] * count
        if len(grid) != count:
            raise InputError(f"{len(grid)} grids for {count} images; give one pair for all, or a pair per image")
        return [_as_grid(pair) for pair in grid]

    def _merged(self, embeddings: Sequence[Tensor], grids: Sequence[Grid]) -> MergedTokens:
        """Merges a batch of images (N, D) of grids whose cells come first; (0, 0) means places are not known."""
        for number, (rows, grid) in enumerate(zip(embeddings, grids)):
            if rows.dim() != 2 or len(rows) < grid[0] * grid[1]:
                raise InputError(
                    f"embedding {number} of the batch is {tuple(rows.shape)}; a grid of {grid[0]} x {grid[1]} needs "
                    f"(N, D) with {grid[0] * grid[1]} patches first"
                )
        tokens = pad_sequence(list(embeddings), batch_first=True)  # (B, N, D)
        lengths = torch.tensor([len(rows) for rows in embeddings], device=tokens.device)
        cells = torch.tensor([rows * columns for rows, columns in grids], device=tokens.device)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        mask = place < lengths[:, None]  # (B, N)
        patches = torch.where(cells[:, None] > 0, place < cells[:, None], mask)
        coords = torch.full((*mask.shape, 2), 0.5, device=tokens.device)
        for row, (rows, columns) in enumerate(grids):
            if rows:
                coords[row, : rows * columns] = visual_coords(rows, columns).to(coords)
        return self._compress(VisualTokens(tokens, coords, mask, patches))

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Writes `config.json` into a folder."""
        self.save_config(str(output_path))


def _as_grid(pair: Sequence[int]) -> Grid:
    if np.ndim(pair) != 1 or len(pair) != 2:
        raise InputError(f"a grid is (rows, columns); {pair!r:.80} is none")
    rows, columns = (whole_number("grid", int(value) if isinstance(value, Tensor) else value) for value in pair)
    if rows < 1 or columns < 1:
        raise InputError(f"a grid has at least one row and one column; it is {rows} x {columns}")
    return rows, columns


def similarity_map(query: Tensor, document: Mapping[str, Tensor]) -> Tensor:
    """How similar each query token is to the vector that stands for each patch of a pooled document.

    What `maxsim_similarity_map` of sentence-transformers gives of all vectors; its `render_similarity_map_on_image`
    draws a row of this.

    Args:
        query: (M, D), of `encode_query`.
        document: of `encode_document(..., output_value=None)` of a model with a `SamerPooling` behind it.

    Returns:
        (M, rows, columns) float32; a patch that was dropped has the least similarity of all.

    Raises:
        InputError: a document without what the pooling adds.
    """
    if "samer_assignments" not in document:
        raise InputError(
            "the document does not say which patch went where; take it from encode_document(..., output_value=None) of "
            "a model that samer.st.attach or samer.st.load made"
        )
    rows, columns = document["samer_grid"].tolist()
    source = document["samer_source"][None, : rows * columns]
    region = regions_of_patches(document["samer_assignments"][None], source)[0]  # (P,)
    vectors = F.normalize(document["token_embeddings"].float(), dim=-1)
    products = query.float() @ vectors[region.clamp(min=0)].T  # (M, P)
    dropped = region < 0
    if dropped.any():
        products[:, dropped] = products[:, ~dropped].min()
    return products.view(-1, rows, columns)
