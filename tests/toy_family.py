"""A retriever of another family in one file: grids that depend on the picture, a projection without bias, left padding.

A wide picture has 3 x 5 patches, a tall one 4 x 3; the prompt stands before the patches. Shape letters: B images or
texts, N tokens, P patches.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, PretrainedConfig, PreTrainedModel

from samer.retrievers.family import Family

PAD, IMAGE, FIRST = 0, 1, 2  # token ids; letters follow
PROMPT, PREFIX, SUFFIX, SIDE = "look:", "find: ", "..", 4


class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, width=24, embedding_dim=16, image_token_id=IMAGE, **more):
        self.width, self.embedding_dim, self.image_token_id = width, embedding_dim, image_token_id
        super().__init__(**more)


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.width, config.embedding_dim, bias=False)


class ToyForRetrieval(PreTrainedModel):
    config_class = ToyConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        sizes = {"hidden_size": config.width, "intermediate_size": 16, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 256 + FIRST}
        self.model = LlamaModel(LlamaConfig(**sizes, **heads))
        self.vision = nn.Linear(3 * SIDE * SIDE, config.width)
        self.multi_vector_head = Head(config)
        self.post_init()

    def forward(self, input_ids, attention_mask, pixel_values=None, **more):
        states = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            patches = self.vision(pixel_values.to(self.dtype))  # (sum P, width)
            states = states.masked_scatter((input_ids == IMAGE)[..., None], patches)
        hidden = self.model(inputs_embeds=states, attention_mask=attention_mask, **more).last_hidden_state
        tokens = self.multi_vector_head.proj(hidden)
        return SimpleNamespace(embeddings=tokens / tokens.norm(dim=-1, keepdim=True), last_hidden_state=hidden)


class ToyProcessor:
    image_token, image_token_id, query_prefix = "<image>", IMAGE, PREFIX

    def __call__(self, images=None, text=None, return_offsets_mapping=False):
        if images is None:
            return self.rows([[*self.ids(PREFIX + each + SUFFIX)] for each in text], return_offsets_mapping)
        grids = torch.tensor([(3, 5) if image.width >= image.height else (4, 3) for image in images])
        pixels = [self.patches(image, *grid) for image, grid in zip(images, grids.tolist())]
        words = [[*self.ids(PROMPT), *[IMAGE] * int(grid.prod()), FIRST] for grid in grids]
        return {**self.rows(words), "pixel_values": torch.cat(pixels), "image_grids": grids, "labels": grids}

    def ids(self, text):
        return [FIRST + ord(letter) % 256 for letter in text]

    def patches(self, image, rows, columns):
        points = np.asarray(image.resize((columns * SIDE, rows * SIDE)), dtype=np.float32) / 255
        cells = torch.from_numpy(points).unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE)  # (rows, columns, 3, side, side)
        return cells.flatten(2).flatten(0, 1)

    def rows(self, words, offsets=False):
        width = max(map(len, words))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in words])
        found = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
        if offsets:
            starts = torch.arange(width) - torch.tensor([[width - len(row)] for row in words])
            pairs = torch.stack([starts, starts + 1], -1)
            found["offset_mapping"] = torch.where((ids != PAD)[..., None], pairs, 0)
        return found


class Toy(Family):
    architecture = "ToyForRetrieval"
    model_type = "toy"
    projection = "multi_vector_head.proj"

    @classmethod
    def model_class(cls):
        return ToyForRetrieval

    @classmethod
    def load_processor(cls, name, **where):
        return ToyProcessor()

    @property
    def image_token_id(self):
        return self.model.config.image_token_id

    @property
    def backbone(self):
        return self.model.model

    @property
    def language_model(self):
        return self.backbone

    def model_inputs(self, inputs):
        return {name: value for name, value in super().model_inputs(inputs).items() if name != "image_grids"}

    def grids(self, inputs):
        return inputs["image_grids"]


def save_toy(folder, seed=0):
    """Writes a random toy retriever to `folder`."""
    torch.manual_seed(seed)
    ToyForRetrieval(ToyConfig()).save_pretrained(folder)
    return folder
