"""ColModernVBert of transformers: a page is cut into tiles, and a small picture of the whole follows them.

Shape letters: B images, T tiles of an image at most, N tokens, P patches of an image at most, S cells on a tile's side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from samer.config import InputError
from samer.retrievers.family import Family, RefusedPicture
from samer.tokens import ImageLayout

VIEW, NO_TAG = -1, -2  # in place of a tile's row: the view of the whole, and a token behind no tag


class ColModernVBert(Family):
    """`ModernVBERT/colmodernvbert-merged` and its like: a tag before each tile names its row and column.

    A tile has S x S tokens, row by row. The grid is that of all tiles together; the view of the whole covers the page a
    second time, with S x S tokens, which are patches that `ImageLayout.source` names nowhere. A picture that is not cut
    has the view alone, which is its grid then.
    """

    architecture = "ColModernVBertForRetrieval"
    processor_class = "ColModernVBertProcessor"
    model_type = "colmodernvbert"
    options: Mapping[str, Any] = {}  # an encoder, which keeps no cache

    def __init__(self, model: nn.Module, processor: Any) -> None:
        """Reads off the tile's side and the ids of the tags."""
        super().__init__(model, processor)
        config = model.config.vlm_config
        self.side = config.vision_config.image_size // config.vision_config.patch_size // config.pixel_shuffle_factor
        most = round(len(processor.row_col_ids) ** 0.5)
        self._tags = {tag: divmod(number, most) for number, tag in enumerate(processor.row_col_ids)}
        self._tags[processor.global_image_token_id] = (VIEW, VIEW)

    @property
    def language_model(self) -> nn.Module:
        return self.backbone.text_model

    @property
    def attentions(self) -> tuple[Any, list[nn.Module]]:
        """Layers that attend within a window are left out: they say nothing of the whole picture."""
        model = self.language_model
        return model.config, self.whole_attention(model.config, [layer.attn for layer in model.layers])

    @property
    def processing(self) -> dict[str, str]:
        """As `Family.processing`; whether pages are cut, the side of a tile, and what follows a query."""
        pictures = self.processor.image_processor
        return {
            **super().processing,
            "tiles": "cut" if pictures.do_image_splitting else "not cut",
            "tile_size": str(pictures.max_image_size["longest_edge"]),
            "query_suffix": self.processor.query_augmentation_token * 10,
        }

    def text_inputs(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(self.processor.process_queries(text=texts, return_offsets_mapping=True))

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """As `Family.image_inputs`.

        Raises:
            RefusedPicture: one with a tile whose prepared pixels are all 0, which the model takes for padding and
                leaves out: all that follow would get another tile's features. Black is 0 where the processor does
                not normalise, or with a mean of 0.
        """
        found = self.processor.process_images(images=list(images))
        inputs = {name: value for name, value in found.items() if name != "labels"}
        tiles = (inputs["input_ids"] == self.image_token_id).sum(1) // self.side**2
        seen = (inputs["pixel_values"] != 0).flatten(2).any(2)  # (B, T)
        missing = ~seen & (torch.arange(seen.shape[1]) < tiles[:, None])
        if missing.any():
            number, tile = missing.nonzero()[0].tolist()
            raise RefusedPicture(
                number,
                f"has {int(missing[number].sum())} of {int(tiles[number])} tiles all black, the first is number "
                f"{tile + 1}; the model would leave them out as padding. Crop this picture, or leave it out",
            )
        return inputs

    def _tiles(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of the tile that each token is in, and its number in it: (B, N, 2) and (B, N) long."""
        table = ids.new_full((max(self._tags) + 1, 2), NO_TAG)
        table[list(self._tags)] = ids.new_tensor(list(self._tags.values()))
        known = table[ids.clamp(max=len(table) - 1)].masked_fill((ids >= len(table))[..., None], NO_TAG)
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        is_tag = known[..., 0] != NO_TAG
        last = torch.where(is_tag, place, -1).cummax(1).values  # (B, N) where the tag before a token stands
        tile = known.gather(1, last.clamp(min=0)[..., None].expand(-1, -1, 2))
        return tile.masked_fill((last < 0)[..., None], NO_TAG), place - last - 1

    def layout(self, inputs: dict[str, Tensor]) -> ImageLayout:
        """Where each token stands: cells over the whole page, by the tag of each one's tile.

        Raises:
            InputError: an image whose tiles are no whole grid with a view of the whole behind it.
        """
        ids, side = inputs["input_ids"], self.side
        patches = ids == self.image_token_id  # (B, N)
        tile, cell = self._tiles(ids)
        view = patches & (tile[..., 0] == VIEW)
        ours = patches & ~view
        tiles = torch.where(ours[..., None], tile + 1, 0).amax(1)  # (B, 2) rows and columns of tiles
        tiles = torch.where((tiles == 0).all(1, keepdim=True), 1, tiles)
        alone = ~ours.any(1, keepdim=True)  # (B, 1): the view is the picture
        tile = torch.where(view[..., None], 0, tile)
        inside = torch.stack([cell // side, cell % side], -1)  # (B, N, 2) row and column in its tile
        size = torch.where(view[..., None], side, tiles[:, None] * side)  # of the lattice that a token belongs to
        spot = tile * side + inside
        right = (tile >= 0).all(-1) & (cell < side * side) & (spot < size).all(-1) | ~patches
        cells = tiles.prod(1) * side**2
        wanted = cells + torch.where(alone[:, 0], 0, side**2)
        self._check(right.all(1) & (patches.sum(1) == wanted), patches.sum(1), tiles)
        coords = torch.where(patches[..., None], (spot + 0.5) / size, 0.5).flip(-1)  # (x, y)
        own = ours | alone & view
        number = torch.where(own, spot[..., 0] * size[..., 1] + spot[..., 1], -1)  # (B, N) of the page's patch
        source = ids.new_full((len(ids), int(cells.max()) + 1), -1)  # the last column takes what has no number
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        source.scatter_(1, torch.where(number < 0, source.shape[1] - 1, number), position)
        source = source[:, :-1]
        self._check((source >= 0).sum(1) == cells, patches.sum(1), tiles)
        return ImageLayout(coords, patches, tiles * side, source)

    def _check(self, right: Tensor, counts: Tensor, tiles: Tensor) -> None:
        if not right.all():
            row = int((~right).nonzero()[0])
            rows, columns = tiles[row].tolist()
            raise InputError(
                f"image {row} of the batch has {int(counts[row])} image tokens, expected {self.side**2} of each of "
                f"{rows} x {columns} tiles and of the view of the whole, behind a tag each"
            )
