"""Small ColPali retrievers of the real classes, built from a config."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    ColPaliConfig,
    ColPaliForRetrieval,
    ColPaliProcessor,
    GemmaConfig,
    GemmaTokenizer,
    PaliGemmaConfig,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from samer.world.captions import caption_text
from samer.world.scenes import make_group

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> GemmaTokenizer:
    """Trains a Gemma tokenizer (BPE with byte fallback, spaces as U+2581) on `texts`.

    Args:
        texts: captions; merges never cross a space, so a frequent word becomes one token.
        vocab_size: upper bound of the vocabulary, specials and 256 byte tokens included.

    Returns:
        A `GemmaTokenizer` with ids <pad> 0, <eos> 1, <bos> 2, as in the released models.
    """
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, *byte_tokens],
        initial_alphabet=[chr(c) for c in range(33, 127)] + ["\u2581", "\n"],
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\u2581", "merged_with_next"), pre_tokenizers.Split(Regex("[.,:\n]"), "isolated")]
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = tokenizer.get_vocab()
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return GemmaTokenizer(vocab=dict(sorted(trained.items(), key=lambda kv: kv[1])), merges=merges)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a ColPali; the defaults are those of the retriever in assets/.

    heads: of the vision model, and of the text model where `text_heads` is 0.
    vocabulary: rows of the text model's embedding; 0: as many as the tokenizer has.
    """

    image_size: int = 128
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 3
    vision_mlp: int = 256
    text_width: int = 128
    text_layers: int = 3
    text_mlp: int = 256
    heads: int = 4
    embedding_dim: int = 64
    text_heads: int = 0
    vocabulary: int = 0


PUBLISHED = Geometry(  # vidore/colpali-v1.3-hf
    image_size=448,
    patch_size=14,
    vision_width=1152,
    vision_layers=27,
    vision_mlp=4304,
    text_width=2048,
    text_layers=18,
    text_mlp=16384,
    heads=16,
    embedding_dim=128,
    text_heads=8,
    vocabulary=257_216,
)


@contextlib.contextmanager
def in_halves(device: str) -> Iterator[None]:
    """Within the block, new weights are bfloat16 on that device: of the published size, 5.9 GB instead of 11.7."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_colpali(
    tokenizer: GemmaTokenizer, geometry: Geometry, seed: int
) -> tuple[ColPaliForRetrieval, ColPaliProcessor]:
    """Builds a randomly initialised ColPali of the real transformers classes.

    Args:
        tokenizer: a Gemma tokenizer; the processor adds <image>, <loc....> and <seg...> to it.
        geometry: sizes in pixels, patches and widths.
        seed: fixes the weights.

    Returns:
        (`ColPaliForRetrieval` in torch's default dtype and device, `ColPaliProcessor`).
    """
    patches = (geometry.image_size // geometry.patch_size) ** 2
    image_processor = SiglipImageProcessorPil(
        size={"height": geometry.image_size, "width": geometry.image_size}, image_seq_length=patches
    )
    processor = ColPaliProcessor(image_processor=image_processor, tokenizer=tokenizer)
    vocab = geometry.vocabulary or len(processor.tokenizer)
    text_heads = geometry.text_heads or geometry.heads
    config = ColPaliConfig(
        vlm_config=PaliGemmaConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=geometry.vision_width,
                intermediate_size=geometry.vision_mlp,
                num_hidden_layers=geometry.vision_layers,
                num_attention_heads=geometry.heads,
                image_size=geometry.image_size,
                patch_size=geometry.patch_size,
                vision_use_head=False,
            ),
            text_config=GemmaConfig(
                vocab_size=vocab,
                hidden_size=geometry.text_width,
                intermediate_size=geometry.text_mlp,
                num_hidden_layers=geometry.text_layers,
                num_attention_heads=text_heads,
                num_key_value_heads=1,
                head_dim=geometry.text_width // text_heads,
                max_position_embeddings=8192,
            ),
            image_token_index=processor.image_token_id,
            vocab_size=vocab,
            projection_dim=geometry.text_width,
            hidden_size=geometry.text_width,
        ),
        embedding_dim=geometry.embedding_dim,
    )
    torch.manual_seed(seed)
    return ColPaliForRetrieval(config), processor


def page_texts(count: int, seed: int) -> list[str]:
    """Caption texts of `count` groups of the `page` style, for training a tokenizer."""
    texts = ["Question: ", "Describe the image.\n"] * 50
    for group in range(count):
        for scene in make_group("page", seed, group):
            texts += [caption_text(parts)[0] for parts in scene.captions]
    return texts
