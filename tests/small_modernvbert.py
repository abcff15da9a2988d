"""A small random ColModernVBert of transformers' own classes, as a folder: tiles of 32 pixels, 8 x 8 tokens each."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    ColModernVBertConfig,
    ColModernVBertForRetrieval,
    ColModernVBertProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from samer.world.retriever import page_texts

SIDE, TILE = 8, 32  # tokens and pixels on a tile's side
SPECIALS = ["<pad>", "<|begin_of_text|>", "<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>"]
SPECIALS += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def trained_words(specials: list[str], **roles) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred merges with `specials` first, in order."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator(page_texts(5, 0), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", **roles)


def save_modernvbert(folder: Path, *, padding_side: str = "right", longest: int = 3 * TILE, layers: int = 7) -> Path:
    """Writes a random ColModernVBert in float32 to `folder`; a page is scaled to `longest` pixels before it is cut."""
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": TILE})
    processor = ColModernVBertProcessor(
        image_processor=pictures,
        tokenizer=trained_words(SPECIALS, padding_side=padding_side),
        image_seq_len=SIDE * SIDE,
    )
    text = {
        "model_type": "modernbert",
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "layer_types": ["sliding_attention" if number % 3 else "full_attention" for number in range(layers)],
        "local_attention": 16,
        "pad_token_id": 0,
        **dict.fromkeys(("eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id")),
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": 2,
        "vision_use_head": False,
    }
    config = ColModernVBertConfig(
        vlm_config={
            "model_type": "modernvbert",
            "text_config": text,
            "vision_config": vision,
            "image_token_id": processor.image_token_id,
            "pixel_shuffle_factor": 2,
        },
        embedding_dim=16,
    )
    torch.manual_seed(3)
    model = ColModernVBertForRetrieval(config)
    _sharpen(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _sharpen(model: ColModernVBertForRetrieval) -> None:
    """Larger weights than a fresh model's, so that pictures and places differ, and attention is far from uniform."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "embedding" not in name:
            weight.mul_(8 if "Wqkv" in name else 3)
